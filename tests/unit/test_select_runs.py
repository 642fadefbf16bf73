"""Which finished runs are compared, and what is said where they are not there."""

from dataclasses import replace
from pathlib import Path

import pytest

from rayloop.config import Config, DataConfig, SelectConfig
from rayloop.errors import ConfigError, DataMissing, RequestError
from rayloop.select.runs import find_runs
from rayloop.storage import Storage
from rayloop.train.result import TrainResult, save_result
from tests.datasets import write_dataset

DIGEST = "e" * 64


def config(*runs: str, **section: object) -> Config:
    return Config(data=DataConfig(name="thirds"), select=SelectConfig(runs=runs, **section))  # type: ignore[arg-type]


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path))


def add_run(storage: Storage, name: str, digest: str = "", version: str = "v1") -> None:
    """The record of a run that never was."""
    result = TrainResult(
        run_id=name, checkpoint="c", checkpoint_digest="d", model_name="fastnet", num_parameters=1,
        dataset_name="thirds", dataset_version=version, dataset_digest=digest, class_names=("a",),
        shape=(6, 6, 2), pixel_mean=(0.3,), pixel_std=(0.3,), val_accuracy=0.9, test_accuracy=None,
        floor_accuracy=None, steps=1, images_per_second=1.0, data_wait_share=0.0, mfu=None,
        goodput=1.0, step_ms={}, seconds=1.0, precision="fp32", feed="resident", num_workers=1,
        resumed_at_step=0,
    )  # fmt: skip
    save_result(storage, result)


@pytest.fixture
def digest(storage: Storage) -> str:
    """The digest of a dataset with four runs, one of them on other data and one not finished."""
    dataset = write_dataset(storage)
    for name in ("mine", "yours", "search-0000", "search-0001", "search-other"):
        add_run(storage, name, dataset.digest)
    add_run(storage, "old", DIGEST, "v0")
    storage.write_json("runs/begun/config.json", {})
    storage.write_json("runs/search/sweep.json", {})
    storage.write_json("runs/empty/sweep.json", {})
    return dataset.digest


def names(storage: Storage, settings: Config) -> list[str]:
    return [run.run_id for run in find_runs(storage, settings).runs]


def test_without_names_all_finished_runs_of_the_newest_version_count(
    storage: Storage, digest: str
) -> None:
    storage.write_json("runs/odd/result.json", {"run_id": "odd"})
    found = find_runs(storage, config())
    assert [run.run_id for run in found.runs] == [
        "mine", "search-0000", "search-0001", "search-other", "yours"
    ]  # fmt: skip
    assert found.dataset.digest == digest
    assert "train again" in found.left_out["odd"]


def test_runs_can_be_named_and_trials_of_a_sweep_too(storage: Storage, digest: str) -> None:
    assert names(storage, config("yours", "mine", "yours")) == ["mine", "yours"]
    assert names(storage, config(sweep="search")) == ["search-0000", "search-0001"]
    mine = find_runs(storage, replace(config("mine"), data=DataConfig(name="gone")))
    assert mine.dataset.digest == digest  # the data of the run, whatever the preset says


@pytest.mark.parametrize(
    ("settings", "kind", "told"),
    [
        (config("mina"), DataMissing, r"There is no run 'mina' under .*did you mean 'mine'\?"),
        (config("what"), DataMissing, "the finished runs are mine, old, search-0000"),
        (config("begun"), DataMissing, "'begun' is not finished .*train.py PRESET --run-id begun"),
        (config("mine", "old"), RequestError, r"'mine' was trained on thirds:v1 .* and run 'old' on"
         r" thirds:v0 \(digest eeeeeeeeeeee\)"),
        (config(sweep="serch"), DataMissing, "no sweep 'serch' .*did you mean 'search'"),
        (config(sweep="mine"), DataMissing, "no sweep 'mine' .*the sweeps are empty, search"),
        (config(sweep="empty"), DataMissing, "'empty' .*has no finished trial yet"),
        (replace(config(), run_id="mine"), ConfigError, "run_id='mine' says nothing here"),
        (replace(config(), data=DataConfig(name="none")), DataMissing, "no dataset 'none'"),
    ],
)  # fmt: skip
def test_what_is_not_there_is_told_with_what_is(
    storage: Storage, digest: str, settings: Config, kind: type[Exception], told: str
) -> None:
    with pytest.raises(kind, match=told):
        find_runs(storage, settings)


def test_a_dataset_without_runs_says_how_to_train_one(storage: Storage) -> None:
    write_dataset(storage)
    with pytest.raises(DataMissing, match=r"no finished run on thirds:v1 .*jobs/train.py"):
        find_runs(storage, config())
    add_run(storage, "old", DIGEST)
    with pytest.raises(DataMissing, match="1 are there, on other data"):
        find_runs(storage, config())
    with pytest.raises(DataMissing, match="there are no sweeps"):
        find_runs(storage, config(sweep="a"))
