"""How many epochs TPE with ASHA needs to reach what random search ends with, over several seeds.

    .venv/bin/python benchmarks/sweep_budget.py --seeds 10

Same space (the default one), same recipe (preset `smoke`: digits, with 40% of the rows to
validate on, so that scores can be told apart), same first trials. For each seed random search
trains `--trials` configurations to their end; its final score is the best validation accuracy. Then
TPE with ASHA runs until it has a finished trial at least as good, or has spent what random spent.
The sweep's own code decides (`rayloop.tune.sweep`); the trials run in this process, one after the
other, without Ray, which changes no epoch. A configuration that both try is trained once.

Prints a line a seed and writes a result file. Needs the dataset version made by

    .venv/bin/python jobs/prepare_data.py smoke --data.name digits-to-validate --data.val-share 0.4
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from rayloop.config import Config, TuneConfig, digest_of
from rayloop.data.versions import DatasetVersion, open_version, read_split
from rayloop.errors import Diverged
from rayloop.presets import smoke
from rayloop.storage import Storage, home
from rayloop.train.alone import train_alone
from rayloop.train.loop import Record
from rayloop.tune.sweep import Sweep
from rayloop.tune.trial import Trial

HERE = Path(__file__).parent
NAME = "digits-to-validate"


class Stopped(Exception):
    """The sweep ended a trial early."""


class Bench:
    """Trains configurations once and remembers their curves."""

    def __init__(self, folder: str) -> None:
        self._data = Storage(home())
        self.dataset: DatasetVersion = open_version(self._data, NAME)
        self._splits = {n: read_split(self._data, self.dataset, n) for n in ("train", "val")}
        self.scratch = Storage(folder)
        self._curves: dict[str, list[Record]] = {}
        self.trained_epochs = 0.0

    def curve(self, config: Config, tell: Callable[[Record], bool]) -> bool:
        """Tell every epoch's record until told to stop; gives False where the loss diverged."""
        key = digest_of([str(config.train), str(config.model)])
        known = self._curves.setdefault(key, [])
        for record in known:
            if tell(record):
                return True

        def on_record(record: Record) -> None:
            if known and record["step"] <= known[-1]["step"]:
                return
            known.append(record)
            self.trained_epochs += 1
            if tell(record):
                raise Stopped

        settings = replace(config, run_id=f"c-{key[:16]}")
        try:
            with contextlib.suppress(Stopped):
                train_alone(settings, self.scratch, self.dataset, self._splits, on_record)
        except Diverged:
            return False
        return True


def run_sweep(
    bench: Bench, config: Config, enough: Callable[[Sweep, Trial], bool]
) -> tuple[float, float | None, int]:
    """Run a sweep; gives the epochs spent, the best score, and how many trials there were."""
    sweep = Sweep(config, bench.scratch, bench.dataset)
    while isinstance(trial := sweep.next(), Trial):
        number = trial.number
        fine = bench.curve(
            sweep.settings_of(trial), lambda record, number=number: sweep.report(number, record)
        )
        if fine:
            sweep.finish(number)
        else:
            sweep.fail(number, "diverged")
        if enough(sweep, sweep.trial(number)):
            break
    best = sweep.best()
    return sweep.budget_epochs, best.figures["val_accuracy"] if best else None, len(sweep.trials)


def compare(bench: Bench, seed: int, trials: int, epochs: float, startup: int) -> dict[str, Any]:
    """Both searches with one seed."""
    base = smoke()
    base = replace(base, train=replace(base.train, epochs=epochs, num_workers=1))

    def config(name: str, **changes: Any) -> Config:
        tune = TuneConfig(seed=seed, startup_trials=startup, **changes)
        return replace(base, run_id=f"{name}-{seed}", tune=tune)

    spent, goal, _ = run_sweep(
        bench, config("random", search="random", stopping="none", trials=trials), lambda *_: False
    )
    assert goal is not None

    def reached(sweep: Sweep, trial: Trial) -> bool:
        best = sweep.best()
        is_there = best is not None and best.figures["val_accuracy"] >= goal
        return is_there or sweep.budget_epochs >= spent

    used, score, count = run_sweep(
        bench, config("asha", search="tpe", stopping="asha", trials=10_000), reached
    )
    return {
        "seed": seed, "random_score": goal, "random_epochs": round(spent, 2),
        "score": score, "epochs": round(used, 2), "trials": count,
        "share": round(used / spent, 4), "reached": score is not None and score >= goal,
    }  # fmt: skip


def main() -> None:
    """Compare over the seeds, print, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--trials", type=int, default=16, help="of random search")
    parser.add_argument("--epochs", type=float, default=12.0)
    parser.add_argument("--startup", type=int, default=TuneConfig().startup_trials)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    began = time.monotonic()
    rows = []
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        with tempfile.TemporaryDirectory() as folder:
            bench = Bench(folder)
            row = compare(bench, seed, options.trials, options.epochs, options.startup)
        rows.append(row)
        print(json.dumps(row), flush=True)
    shares = [row["share"] for row in rows]
    summary = {
        "median_share": statistics.median(shares),
        "mean_share": round(statistics.fmean(shares), 4),
        "reached": sum(row["reached"] for row in rows),
        "seeds": len(rows),
        "commit": _commit(),
        "seconds": round(time.monotonic() - began, 1),
    }
    print(json.dumps(summary))
    if options.out:
        options.out.write_text(json.dumps({"rows": rows, "summary": summary}, indent=1))


def _commit() -> str:
    words = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(
        words, capture_output=True, text=True, cwd=HERE, check=False
    ).stdout.strip()


if __name__ == "__main__":
    main()
