"""A run id belongs to what is trained: means may change, deciding settings and data may not."""

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayloop.clock import SYSTEM_CLOCK
from rayloop.config import AugmentConfig, Config, ModelConfig, TrainConfig
from rayloop.data.versions import DatasetVersion
from rayloop.errors import ConfigError
from rayloop.storage import Storage
from rayloop.train.claim import (
    DECIDING_WITH_PLAIN_NORM,
    OPERATIONAL,
    claim_run,
    deciding_settings,
    new_run_id,
    run_digest,
)

DATASET = DatasetVersion(
    name="d", version="v", digest="aaa", parent="", created_at="", class_names=("a", "b"),
    shape=(6, 6, 1), splits={"train": 9}, class_counts={}, profile={}, pixel_mean=(0.3,),
    pixel_std=(0.2,),
)  # fmt: skip
GHOST = Config(run_id="r", train=TrainConfig(num_workers=2, worker_invariant=False))
PLAIN = replace(GHOST, train=replace(GHOST.train, norm_group_rows=0))
TYPES = get_type_hints(TrainConfig)
OTHER: dict[str, Any] = {
    "augment": AugmentConfig(flip=False), "num_workers": 1, "micro_batch_size": 32,
    "norm_group_rows": 32, "global_batch_size": 512,
}  # fmt: skip
"""Values that go with the others; for the rest any will do."""


def changed(config: Config, name: str) -> Config:
    """The configuration with another value of one train setting."""
    before = getattr(config.train, name)
    if name in OTHER:
        after = OTHER[name]
    elif isinstance(before, bool):
        after = not before
    elif isinstance(before, str):
        after = next(value for value in get_args(TYPES[name]) if value != before)
    elif isinstance(before, float):
        after = before / 2 or 0.5
    else:
        after = before + 1
    return replace(config, train=replace(config.train, **{name: after}))


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    """An empty root."""
    return Storage(str(tmp_path))


def test_operational_settings_exist() -> None:
    assert set(TYPES) >= OPERATIONAL >= DECIDING_WITH_PLAIN_NORM


def test_what_is_trained_is_kept_apart_from_how() -> None:
    how = {"num_workers", "min_workers", "cpus_per_worker", "use_gpu", "compile", "max_failures",
           "step_timeout_s", "keep_checkpoints", "checkpoint_every_epochs", "eval_batch_size",
           "micro_batch_size", "floor_epochs", "test_flip"}  # fmt: skip
    what = {"epochs", "seed", "global_batch_size", "norm_group_rows", "optimizer", "learning_rate",
            "learning_rate_rule", "reference_batch_size", "weight_decay", "warmup_share",
            "final_rate_share", "clip_norm", "label_smoothing", "ema_decay", "precision",
            "channels_last", "augment", "worker_invariant"}  # fmt: skip
    assert how <= OPERATIONAL
    assert not what & OPERATIONAL


@pytest.mark.parametrize(
    ("config", "name"),
    [
        *(pytest.param(GHOST, name, id=f"ghost-{name}") for name in TYPES),
        *(pytest.param(PLAIN, name, id=f"plain-{name}") for name in TYPES
          if name != "worker_invariant"),  # plain norms cannot be
    ],
)  # fmt: skip
def test_means_may_change_and_deciding_settings_may_not(
    storage: Storage, config: Config, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    other = changed(config, name)
    claim_run(config, DATASET, storage)
    before = storage.read_json("runs/r/config.json")
    plain = config.train.norm_group_rows == 0
    free = name in OPERATIONAL - (DECIDING_WITH_PLAIN_NORM if plain else set())
    assert (run_digest(other) == run_digest(config)) == free
    if free:
        with caplog.at_level("INFO", "rayloop"):
            claim_run(other, DATASET, storage)
        assert f"run r goes on with other means: train.{name} was " in caplog.text
    else:
        with pytest.raises(
            ConfigError, match=rf"^Run 'r' exists .*: train\.{name}\b.* was .*, now "
        ):
            claim_run(other, DATASET, storage)
    assert storage.read_json("runs/r/config.json") == before


@given(st.sets(st.sampled_from(sorted(OPERATIONAL - {"min_workers", "num_workers"}))))
@settings(max_examples=20)
def test_any_means_together_leave_the_digest(names: set[str]) -> None:
    config = GHOST
    for name in names:
        config = changed(config, name)
    assert run_digest(config) == run_digest(GHOST)
    assert deciding_settings(config) == deciding_settings(GHOST)


def test_the_same_settings_and_data_are_the_same_run(
    storage: Storage, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "rayloop"):
        for _ in range(3):
            claim_run(GHOST, DATASET, storage)
    assert caplog.text == ""
    claim_run(replace(GHOST, run_id="other", model=ModelConfig(name="linear")), DATASET, storage)


def test_other_data_is_refused(storage: Storage) -> None:
    claim_run(GHOST, DATASET, storage)
    with pytest.raises(ConfigError, match="dataset_digest was aaa, now bbb"):
        claim_run(GHOST, replace(DATASET, digest="bbb"), storage)


def test_another_model_is_refused_and_the_setting_is_named(storage: Storage) -> None:
    claim_run(GHOST, DATASET, storage)
    other = replace(GHOST, model=ModelConfig(widths=(8, 8)))
    with pytest.raises(ConfigError, match=r"model\.widths was \[16, 48, 64\], now \[8, 8\]\. Use"):
        claim_run(other, DATASET, storage)
    assert run_digest(other) != run_digest(GHOST)


def test_a_setting_within_a_section_and_many_differences_are_told(storage: Storage) -> None:
    claim_run(GHOST, DATASET, storage)
    other = replace(GHOST, train=replace(
        GHOST.train, augment=AugmentConfig(flip=False, translate_px=1), seed=1, epochs=1.0,
        weight_decay=0.5, clip_norm=9.0))  # fmt: skip
    with pytest.raises(ConfigError) as caught:
        claim_run(other, DATASET, storage)
    message = str(caught.value)
    assert "train.augment.flip was True, now False" in message
    assert message.count(" was ") == 5  # the first few


def test_settings_of_other_stages_belong_to_no_run() -> None:
    other = replace(GHOST, run_id="another", quantize=replace(GHOST.quantize, num_threads=2),
                    data=replace(GHOST.data, feed="stream"))  # fmt: skip
    assert run_digest(other) == run_digest(GHOST)


def test_new_names_are_unique_and_say_what_is_trained() -> None:
    names = {new_run_id(GHOST, SYSTEM_CLOCK) for _ in range(20)}
    assert len(names) == 20
    assert all(name.startswith("fastnet-fashion-mnist-") for name in names)
    for name in names:
        Config(run_id=name)
