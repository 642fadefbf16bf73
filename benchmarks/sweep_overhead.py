"""What a sweep costs a trial beyond the bare training function, where actors are handed on.

    .venv/bin/python benchmarks/sweep_overhead.py --trials 12 --repeats 3

Two sweeps over the same configurations, one of two trials and one of `--trials`, one trial at a
time, tracked in MLflow: the difference of their wall times, over the difference of their trials, is
what one more trial costs. The bare function (`rayloop.train.alone.train_alone`) trains the same
configurations in one warm process of one thread. Prints JSON. Needs the digits dataset version.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from rayloop.cluster import connect
from rayloop.config import Config, TuneConfig
from rayloop.data.versions import open_version, read_split
from rayloop.presets import smoke
from rayloop.storage import Storage, home
from rayloop.tracking import Tracker
from rayloop.train.alone import train_alone
from rayloop.tune.declare import parse_space
from rayloop.tune.search import suggest
from rayloop.tune.space import assign
from rayloop.tune.suggestion import Suggestion
from rayloop.tune.trial import Trial


def config_of(trials: int, epochs: float, run_id: str) -> Config:
    """A random search, one trial at a time, none stopped."""
    base = smoke()
    return replace(
        base,
        run_id=run_id,
        train=replace(base.train, epochs=epochs, num_workers=1, floor_epochs=0),
        tune=TuneConfig(search="random", stopping="none", trials=trials, max_concurrent=1),
    )


def bare_seconds(config: Config, storage: Storage, first: int) -> list[float]:
    """Seconds of each configuration's training from trial `first` on, the process being warm."""
    dataset = open_version(storage, config.data.dataset_name)
    splits = {name: read_split(storage, dataset, name) for name in ("train", "val")}
    space = parse_space(config.tune.space, config)
    trials: list[Trial] = []
    seconds = []
    for number in range(config.tune.trials):
        found = suggest(config.tune, space, config.train.epochs, trials)
        assert isinstance(found, Suggestion)
        trials.append(Trial(number=number, run_id="", assignment=found.assignment))
        settings = replace(assign(config, found.assignment), run_id=f"bare-{number}")
        before = time.monotonic()
        train_alone(settings, storage, dataset, splits, lambda _: None)
        seconds.append(time.monotonic() - before)
    return seconds[first:]


def sweep_seconds(config: Config, storage: Storage) -> float:
    """Wall time of a whole sweep on the connected Ray."""
    from rayloop.tune.run import tune

    before = time.monotonic()
    tune(config, storage, Tracker(storage))
    return time.monotonic() - before


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--epochs", type=float, default=3.0)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = Path(home()) / "datasets"
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(data, Path(folder) / "datasets")
        storage = Storage(folder)
        with connect(smoke().cluster):
            sweep_seconds(config_of(2, options.epochs, "warm"), storage)
            for repeat in range(options.repeats):
                few = sweep_seconds(config_of(2, options.epochs, f"few-{repeat}"), storage)
                many_config = config_of(options.trials, options.epochs, f"many-{repeat}")
                many = sweep_seconds(many_config, storage)
                shutil.rmtree(Path(folder) / "runs" / "bare-0", ignore_errors=True)
                for path in (Path(folder) / "runs").glob("bare-*"):
                    shutil.rmtree(path)
                bare = statistics.fmean(bare_seconds(many_config, storage, first=2))
                each = (many - few) / (options.trials - 2)
                row = {"trial_s": each, "bare_s": bare, "overhead_s": each - bare}
                rows.append({name: round(value, 3) for name, value in row.items()})
                print(json.dumps(rows[-1]), flush=True)
    overheads = [row["overhead_s"] for row in rows]
    print(json.dumps({
        "overhead_s": round(statistics.fmean(overheads), 3),
        "spread_s": round(statistics.stdev(overheads), 3) if len(overheads) > 1 else None,
        "n": len(rows), "load": os.getloadavg()[0],
    }))  # fmt: skip


if __name__ == "__main__":
    main()
