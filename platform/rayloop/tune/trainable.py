"""A trial's configuration -> records, reported to Ray Tune from the process that trains it."""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import ray.tune
import torch

from rayloop.config import Config
from rayloop.data.versions import DatasetVersion, Split, open_version, read_split
from rayloop.errors import Corrupt, DataMissing, Diverged, RequestError, StorageFull
from rayloop.logs import stage_logger
from rayloop.storage import Storage
from rayloop.train.alone import Segment, train_alone
from rayloop.train.checkpoint import newest_good
from rayloop.train.loop import Record
from rayloop.train.run import train
from rayloop.train.watchdog import Hang, Watchdog, describe

log = stage_logger("tune")

Measure = Callable[[Storage, Config], dict[str, float]]
"""What a network costs before it is trained: `latency_ms_b1`, `size_bytes` and so on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialWork:
    """What every trial of a sweep shares.

    Attributes:
        root: Of the storage.
        kind: `function` trains in this process, `ddp` by workers of its own.
        num_threads: Of a trial in one process.
        measure: Where a cost is among the objectives.
    """

    root: str
    kind: Literal["function", "ddp"]
    num_threads: int
    measure: Measure | None


def run_trial(settings: dict[str, Any], work: TrialWork) -> None:
    """Train one trial; what it reports is `record`, `costs`, `failed` or `stuck`.

    Tune ends it out of a report where the sweep says so. Settings that cannot train would fail
    again: the trial has failed. Where a disk is full or the data is not there, every trial would
    fail: the sweep is stuck and stops. Any other error is raised, and Tune's to try again.

    Args:
        settings: `config`, the trial's whole configuration, and `segment`, its part of a run.
        work: What all trials share.
    """
    # Read by Tune in this process when the next trial is handed over: a trial that was stopped may
    # have a checkpoint to finish. Tune's own limit is 2 s.
    os.environ.setdefault("TUNE_FUNCTION_THREAD_TIMEOUT_S", "30")
    config: Config = settings["config"]
    segment: Segment = settings["segment"]
    storage = Storage(work.root)

    def on_record(record: Record) -> None:
        ray.tune.report({"record": list(record.items())})  # Tune takes dictionaries apart

    try:
        if work.measure:
            ray.tune.report({"costs": list(work.measure(storage, config).items())})
        if work.kind == "ddp":
            _train_by_workers(config, storage, on_record)
            return
        torch.set_num_threads(work.num_threads)
        dataset, splits = _rows(work.root, config.data.dataset_name, config.data.version)
        with _watched(config) as watchdog:
            train_alone(
                config, storage, dataset, splits, on_record, segment, on_phase=watchdog.mark
            )
    except (StorageFull, DataMissing, Corrupt) as error:
        ray.tune.report({"stuck": [error]})
    except (RequestError, Diverged) as error:
        ray.tune.report({"failed": str(error)})


@contextmanager
def _watched(config: Config) -> Iterator[Watchdog]:
    """Ends this process if a step takes twice `train.step_timeout_s`; Tune then tries again."""

    def say(hang: Hang) -> None:
        log.warning("%s", describe(hang))

    with tempfile.TemporaryDirectory() as folder:
        timeout_s = config.train.step_timeout_s
        stacks = Path(folder) / "stacks" if timeout_s > 0 else None
        with Watchdog(0, timeout_s, say, stacks) as watchdog:
            yield watchdog


def _train_by_workers(
    config: Config, storage: Storage, on_record: Callable[[Record], None]
) -> None:
    """Train as the train job does it; what is known from before is told first."""
    start = newest_good(storage, config.run_id)
    for record in start.state["history"] if start else []:
        on_record(record)
    for record in train(config, storage, tracker=None, on_record=on_record).history:
        on_record(record)


@lru_cache(maxsize=1)
def _rows(root: str, name: str, version: str) -> tuple[DatasetVersion, dict[str, Split]]:
    """The rows a trial needs, read once in a process that trains one trial after the other."""
    storage = Storage(root)
    dataset = open_version(storage, name, version)
    return dataset, {split: read_split(storage, dataset, split) for split in ("train", "val")}
