"""Sweeps over a made-up training whose curves are known, for the tests of the tune room."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from rayloop.config import Config, DataConfig, ModelConfig, TrainConfig, TuneConfig
from rayloop.data.versions import DatasetVersion
from rayloop.storage import Storage
from rayloop.train.loop import Record
from rayloop.tune.sweep import Sweep
from rayloop.tune.trial import Trial
from tests.datasets import write_dataset

SPACE = ("train.learning_rate=log(0.001, 1)", "train.label_smoothing=linear(0, 0.4)")
STEPS_PER_EPOCH = 5


def config_of(run_id: str = "s", space: tuple[str, ...] = SPACE, **tune: Any) -> Config:
    """Settings of a small sweep of nine epochs a trial."""
    return Config(
        run_id=run_id,
        data=DataConfig(name="thirds"),
        model=ModelConfig(widths=(4, 8)),
        train=TrainConfig(
            epochs=9, global_batch_size=22, norm_group_rows=11, num_workers=1, precision="fp32"
        ),
        tune=TuneConfig(space=space, **tune),
    )


def open_sweep(folder: Path, config: Config) -> Sweep:
    """A sweep, new or continued, over a dataset on disk."""
    storage = Storage(str(folder))
    exists = storage.exists("datasets/thirds/v1/manifest.json")
    dataset: DatasetVersion = write_dataset(storage) if not exists else _dataset(storage)
    return Sweep(config, storage, dataset)


def _dataset(storage: Storage) -> DatasetVersion:
    from rayloop.data.versions import open_version

    return open_version(storage, "thirds")


def record(epoch: float, value: float) -> Record:
    """An epoch's record."""
    return {
        "step": round(epoch * STEPS_PER_EPOCH), "epoch": epoch, "val_accuracy": value,
        "val_loss": 1 - value, "train_loss": 1 - value, "train_accuracy": value,
    }  # fmt: skip


def accuracy(assignment: dict[str, Any], epoch: float) -> float:
    """Best at a learning rate of 0.03 and a smoothing of 0.1; every curve climbs."""
    off = abs(math.log10(assignment["train.learning_rate"] / 0.03)) / 1.5
    off += abs(assignment.get("train.label_smoothing", 0.1) - 0.1)
    return max(0.0, 1 - off) * (1 - 0.5**epoch)


def train(sweep: Sweep, trial: Trial, stop_at: float = math.inf) -> bool:
    """Report a trial's epochs until its end, or until told to stop; False where it broke off."""
    end = trial.stop_epochs or sweep.settings_of(trial).train.epochs
    epoch = math.floor(trial.start_epoch) + 1.0
    while epoch <= end:
        if epoch > stop_at:
            return False
        if sweep.report(trial.number, record(epoch, accuracy(trial.assignment, epoch))):
            return True
        epoch += 1
    sweep.finish(trial.number)
    return True


def run(
    sweep: Sweep, up_to: int = 10_000, told: Callable[[Trial], None] = lambda _: None
) -> list[Trial]:
    """One trial after the other until the sweep is over, or `up_to` trials were begun here."""
    for _ in range(up_to):
        trial = sweep.next()
        if not isinstance(trial, Trial):
            break
        told(trial)
        train(sweep, trial)
    return sweep.trials


def without_times(trials: list[Trial]) -> list[Trial]:
    """What two sweeps have in common."""
    return [replace(trial, seconds=0.0, attempts=0) for trial in trials]
