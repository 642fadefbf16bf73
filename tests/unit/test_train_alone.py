"""A run in this process alone: stopped anywhere, continued, cut into segments, tested once."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rayloop.config import AugmentConfig, Config, DataConfig, ModelConfig, TrainConfig
from rayloop.data.versions import read_split
from rayloop.errors import ConfigError, RequestError
from rayloop.storage import Storage
from rayloop.train.alone import Segment, train_alone
from rayloop.train.final_test import final_test
from rayloop.train.loop import Record
from rayloop.train.result import TrainResult, load_result
from tests.datasets import write_dataset

CONFIG = Config(
    run_id="a",
    data=DataConfig(name="thirds"),
    model=ModelConfig(widths=(4, 8)),
    train=TrainConfig(
        epochs=4,
        global_batch_size=22,
        norm_group_rows=11,
        num_workers=1,
        precision="fp32",
        checkpoint_every_epochs=1,
        floor_epochs=1,
        augment=AugmentConfig(translate_px=1),
    ),
)


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    """A root with a dataset."""
    storage = Storage(str(tmp_path))
    write_dataset(storage)
    return storage


def without_times(record: Record) -> Record:
    """What two runs have in common."""
    return {name: value for name, value in record.items() if name != "data_wait_share"}


def run(
    storage: Storage,
    config: Config = CONFIG,
    segment: Segment | None = None,
    stop_after: float = 99,
) -> tuple[TrainResult | None, list[Record]]:
    """Train; leaves as a sweep stops a trial, with SystemExit out of a record."""
    dataset = write_dataset(storage)
    splits = {name: read_split(storage, dataset, name) for name in ("train", "val")}
    records: list[Record] = []

    def on_record(record: Record) -> None:
        records.append(without_times(record))
        if record["epoch"] >= stop_after:
            raise SystemExit

    try:
        return train_alone(config, storage, dataset, splits, on_record, segment), records
    except SystemExit:
        return None, records


def test_it_leaves_a_run_that_later_stages_can_read(storage: Storage) -> None:
    result, records = run(storage)
    assert result is not None
    assert load_result(storage, "a") == result
    assert (
        [record["epoch"] for record in records]
        == [1, 2, 3, 4]
        == [record["epoch"] for record in result.history]
    )
    assert result.val_accuracy == records[-1]["val_accuracy"]
    assert result.test_accuracy is None
    assert not storage.exists("runs/latest.json")


@pytest.mark.parametrize(
    ("stop_after", "optimizer"), [(1, "adamw"), (2, "muon"), (3, "sgd"), (3, "adamw")]
)
def test_a_stopped_run_goes_on_to_the_same_weights(
    storage: Storage, stop_after: int, optimizer: Any
) -> None:
    config = replace(CONFIG, train=replace(CONFIG.train, optimizer=optimizer))
    whole, records = run(storage, replace(config, run_id="whole"))
    stopped, first = run(storage, config, stop_after=stop_after)
    assert stopped is None
    result, second = run(storage, config)
    assert whole is not None and result is not None
    assert result.checkpoint_digest == whole.checkpoint_digest
    # What was told before the newest checkpoint is told again, for a reader that was killed too.
    assert second == records
    assert first == records[:stop_after]


def test_a_finished_run_is_told_again_and_not_trained(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, told = run(storage)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr("rayloop.train.alone.run_loop", refuse)
    assert run(storage) == (first, told)


def test_a_watchdog_hears_of_every_phase(storage: Storage) -> None:
    dataset = write_dataset(storage)
    splits = {name: read_split(storage, dataset, name) for name in ("train", "val")}
    phases: list[tuple[int, str]] = []
    train_alone(
        CONFIG, storage, dataset, splits, lambda _: None,
        on_phase=lambda step, phase: phases.append((step, phase)),
    )  # fmt: skip
    assert {"data_wait", "step", "evaluate", "checkpoint"} <= {phase for _, phase in phases}
    assert [step for step, phase in phases if phase == "data_wait"] == list(range(20))


def test_segments_with_equal_settings_make_the_whole_run(storage: Storage) -> None:
    whole, records = run(storage, replace(CONFIG, run_id="whole"))
    first, head = run(storage, segment=Segment(stop_epochs=2))
    assert first is not None and whole is not None
    assert [record["epoch"] for record in head] == [1, 2]
    second, _ = run(storage, replace(CONFIG, run_id="b"), Segment(begin_with="a", stop_epochs=4))
    assert second is not None
    assert second.checkpoint_digest == whole.checkpoint_digest
    assert [without_times(record) for record in second.history] == records
    assert second.resumed_at_step == first.steps


def test_a_segment_may_have_other_settings_than_the_one_before(storage: Storage) -> None:
    run(storage, segment=Segment(stop_epochs=2))
    digests = set()
    for name, decay in (("b", 0.0), ("c", 0.5)):
        config = replace(CONFIG, run_id=name, train=replace(CONFIG.train, weight_decay=decay))
        result, _ = run(storage, config, Segment(begin_with="a", stop_epochs=3))
        assert result is not None
        digests.add(result.checkpoint_digest)
    assert len(digests) == 2  # the decay is the new settings', not the stored optimizer's


def test_the_chosen_model_is_tested_once(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    run(storage)
    tested = final_test(storage, "a", CONFIG.train)
    assert tested.test_accuracy is not None and tested.test_accuracy > 0.4
    assert tested.floor_accuracy is not None
    assert storage.read_json("runs/latest.json") == {"run_id": "a"}

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("tested again")

    monkeypatch.setattr("rayloop.train.final_test.evaluate", refuse)
    assert final_test(storage, "a", CONFIG.train) == tested


def test_a_share_that_is_less_than_a_batch_is_refused(storage: Storage) -> None:
    config = replace(CONFIG, train=replace(CONFIG.train, data_share=0.1))
    with pytest.raises(RequestError, match=r"22 is more than the 11 training rows.*data_share=0.1"):
        run(storage, config)


def test_a_run_id_of_other_settings_is_refused(storage: Storage) -> None:
    run(storage, stop_after=1)
    config = replace(CONFIG, train=replace(CONFIG.train, learning_rate=0.02))
    with pytest.raises(ConfigError, match=r"train.learning_rate was 0.01, now 0.02"):
        run(storage, config)
