"""Sweeps on a local Ray: real trials, tracked, crashed, stopped, by workers of their own."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rayloop.config import AugmentConfig, Config, DataConfig, ModelConfig, TrainConfig, TuneConfig
from rayloop.errors import ConfigError, DataMissing, DoesNotFit, StorageFull, WorkError
from rayloop.storage import Storage
from rayloop.tracking import Tracker
from rayloop.train.result import load_result
from rayloop.train.run import train
from rayloop.tune.run import tune
from rayloop.tune.trial import load_trials
from tests.datasets import write_dataset

pytestmark = pytest.mark.usefixtures("local_ray")

GOOD_AND_BAD = ("train.learning_rate=choice(0.05, 0.000001)",)


@pytest.fixture
def storage(home: Path) -> Storage:
    """A root with a dataset."""
    storage = Storage(str(home))
    write_dataset(storage)
    return storage


def config_of(run_id: str = "s", epochs: float = 8, workers: int = 1, **tune: Any) -> Config:
    """Settings of a sweep of small trials."""
    return Config(
        run_id=run_id,
        data=DataConfig(name="thirds"),
        model=ModelConfig(widths=(4, 8)),
        train=TrainConfig(
            epochs=epochs, global_batch_size=22, norm_group_rows=11, num_workers=workers,
            precision="fp32", floor_epochs=1, learning_rate=0.05,
            augment=AugmentConfig(translate_px=1),
        ),
        tune=TuneConfig(**tune),
    )  # fmt: skip


def test_a_sweep_finds_the_better_one_and_everything_is_tracked(storage: Storage) -> None:
    config = config_of(space=GOOD_AND_BAD, search="grid")
    tracker = Tracker(storage)
    result = tune(config, storage, tracker)
    assert result.best_config == {"train.learning_rate": 0.05}
    assert (result.num_trials, result.failed) == (2, 0)
    trials = load_trials(storage, "s")
    assert result.best_score == max(t.figures["val_accuracy"] for t in trials)
    assert result.budget_epochs == pytest.approx(sum(t.epochs for t in trials))
    # Only the winner has seen the test split, and it is what later stages take.
    winner = load_result(storage)
    assert winner.run_id == result.best_run_id == "s-0000"
    assert winner.test_accuracy == result.test_accuracy is not None
    assert winner.floor_accuracy is not None
    for trial in trials[1:]:
        if trial.status == "finished":
            assert load_result(storage, trial.run_id).test_accuracy is None
    assert storage.read(result.picture).startswith(b"\x89PNG")

    parent = tracker.read("s")
    assert parent is not None and parent.status == "FINISHED"
    assert parent.metrics["best_score"] == pytest.approx(result.best_score)
    children = {run.run_id: run for run in tracker.runs(parent="s")}
    assert set(children) == {"s-0000", "s-0001"}
    for trial in trials:
        child = children[trial.run_id]
        assert child.params["train.learning_rate"] == str(trial.assignment["train.learning_rate"])
        assert child.metrics["val_accuracy"] == trial.figures["val_accuracy"]
        assert child.tags["rayloop.status"] == trial.status
        assert child.tags["dataset_digest"] == write_dataset(storage).digest
        assert child.tags["rayloop.version"]
        assert history(tracker, child.mlflow_run_id) == [int(r["step"]) for r in trial.records]

    again = tune(config, storage, Tracker(storage))
    assert replace(again, seconds=0.0) == replace(result, seconds=0.0)
    assert [t.attempts for t in load_trials(storage, "s")] == [1, 1]


def history(tracker: Tracker, run_id: str) -> list[int]:
    """Steps at which a run's validation accuracy was written, in order."""
    points = tracker._client.get_metric_history(run_id, "val_accuracy")
    return [point.step for point in points]


def test_a_trial_is_the_run_that_the_train_job_makes(storage: Storage) -> None:
    """Bit for bit, though that one is trained by two workers."""
    tune(config_of(space=("train.learning_rate=choice(0.05)",), search="grid"), storage,
         Tracker(storage))  # fmt: skip
    single = train(
        replace(config_of("single", workers=2), train=replace(
            config_of().train, num_workers=2, norm_group_rows=11)), storage, Tracker(storage)
    )  # fmt: skip
    trial = load_result(storage, "s-0000")
    assert trial.checkpoint_digest == single.checkpoint_digest
    assert trial.test_accuracy == single.test_accuracy
    assert trial.floor_accuracy == single.floor_accuracy


class Crash:
    """What a network costs, where the process that measures it dies, the first times."""

    def __init__(self, folder: Path, times: int, learning_rate: float) -> None:
        self._folder, self._times, self._learning_rate = folder, times, learning_rate

    def __call__(self, storage: Storage, config: Config) -> dict[str, float]:
        crashes = len(list(self._folder.iterdir()))
        if config.train.learning_rate == self._learning_rate and crashes < self._times:
            (self._folder / str(crashes)).touch()
            os._exit(1)
        return {"size_bytes": 1000.0}


LONG = pytest.mark.skipif(
    not os.environ.get("RAYLOOP_LONG"), reason="half a minute or more; RAYLOOP_LONG=1 runs it"
)


@pytest.mark.parametrize("times", [pytest.param(1, marks=LONG), 9])
def test_a_trial_that_crashes_is_tried_again_and_then_recorded(
    storage: Storage, tmp_path: Path, times: int
) -> None:
    folder = tmp_path / "crashes"
    folder.mkdir()
    config = config_of(
        epochs=1, space=("train.learning_rate=choice(0.02, 0.01, 0.03)",), search="grid",
        objectives=("val_accuracy", "size_bytes"), max_failures=1,
    )  # fmt: skip
    result = tune(config, storage, Tracker(storage), Crash(folder, times, 0.01))
    trials = load_trials(storage, "s")
    second = "finished" if times == 1 else "failed"
    assert [t.status for t in trials] == ["finished", second, "finished"]
    assert trials[1].attempts == 2
    assert len(list(folder.iterdir())) == min(times, 2)
    assert result.failed == (times > 1)
    assert trials[0].costs == {"size_bytes": 1000.0}
    if times > 1:
        assert trials[1].error
        child = Tracker(storage).read("s-0001")
        assert child is not None and child.status == "FAILED"


def test_an_error_of_ours_is_recorded_at_once_and_a_sweep_of_them_says_the_first(
    storage: Storage,
) -> None:
    """A learning rate that ends in numbers that are none would do so again."""
    config = config_of(epochs=2, space=("train.learning_rate=choice(900, 1000)",), search="grid")
    config = replace(config, train=replace(config.train, optimizer="sgd", clip_norm=0.0))
    with pytest.raises(WorkError, match=r"None of the 2 trials of sweep s came to its end.*nan"):
        tune(config, storage, Tracker(storage))
    assert [t.attempts for t in load_trials(storage, "s")] == [1, 1]
    parent = Tracker(storage).read("s")
    assert parent is not None and parent.status == "FAILED"


@LONG
def test_trials_by_workers_of_their_own_and_one_is_stopped(storage: Storage) -> None:
    """The one after it gets the stopped one's CPUs."""
    space = ("train.learning_rate=choice(0.05, 0.000001, 0.07)",)
    config = config_of(workers=2, space=space, search="grid", trainable="ddp", grace_epochs=2)
    result = tune(config, storage, Tracker(storage))
    good, bad, last = load_trials(storage, "s")
    assert (good.status, bad.status) == ("finished", "stopped")
    assert last.is_over and last.records
    assert bad.epochs < 8
    assert load_result(storage, good.run_id).num_workers == 2
    assert result.test_accuracy is not None


def test_a_sweep_that_can_never_run_is_refused_at_once(storage: Storage) -> None:
    config = config_of(space=GOOD_AND_BAD)
    tracker = Tracker(storage)
    wide = replace(config, train=replace(config.train, cpus_per_worker=64))
    with pytest.raises(DoesNotFit, match=r"needs 64 CPUs.*the cluster has 4 CPUs"):
        tune(wide, storage, tracker)
    with pytest.raises(DoesNotFit, match=r"tune.max_concurrent=9.*room for 2"):
        tune(replace(config, tune=replace(config.tune, max_concurrent=9)), storage, tracker)
    with pytest.raises(DoesNotFit, match="0 GPUs"):
        tune(replace(config, train=replace(config.train, use_gpu=True)), storage, tracker)
    with pytest.raises(DataMissing, match="There is no dataset 'none'"):
        tune(replace(config, data=DataConfig(name="none")), storage, tracker)
    with pytest.raises(ConfigError, match="there is nothing here that measures it"):
        tune(replace(config, tune=replace(config.tune, stopping="none",
             objectives=("val_accuracy", "latency_ms_b1"))), storage, tracker)  # fmt: skip
    assert not storage.exists("runs/s/trials")


@pytest.mark.parametrize("search", ["pbt", pytest.param("tpe", marks=LONG)])
def test_searches_that_learn_run_on_ray(storage: Storage, search: str) -> None:
    config = config_of(
        epochs=4, search=search, trials=4, startup_trials=2, perturb_epochs=2,
        space=("train.learning_rate=log(0.01, 0.1)", "train.label_smoothing=linear(0, 0.2)"),
    )  # fmt: skip
    result = tune(config, storage, Tracker(storage))
    trials = load_trials(storage, "s")
    assert result.num_trials == len(trials) == (8 if search == "pbt" else 4)
    assert result.failed == 0 and result.test_accuracy is not None
    if search == "pbt":
        assert [step["from_epoch"] for step in result.schedule] == [0, 2]
        assert load_result(storage).history[-1]["epoch"] == 4
        assert len(load_result(storage).history) == 4


def test_a_full_disk_ends_the_sweep_and_not_its_trials(storage: Storage) -> None:
    config = config_of(epochs=1, space=GOOD_AND_BAD, search="grid", stopping="none",
                       objectives=("val_accuracy", "size_bytes"))  # fmt: skip
    with pytest.raises(StorageFull, match="the disk is full"):
        tune(config, storage, Tracker(storage), full_disk)
    assert all(trial.status == "running" for trial in load_trials(storage, "s"))
    children = Tracker(storage).runs(parent="s")
    assert children and all(run.status == "KILLED" for run in children)
    result = tune(config, storage, Tracker(storage), lambda *_: {"size_bytes": 1.0})
    assert (result.num_trials, result.failed) == (2, 0)


def full_disk(storage: Storage, config: Config) -> dict[str, float]:
    raise StorageFull("the disk is full")
