"""`rayloop runs`: what was trained, with which settings, and which was best."""

import argparse
import ast
import difflib
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from rayloop.clock import iso_utc
from rayloop.errors import DataMissing, RequestError
from rayloop.storage import Storage, home
from rayloop.tracking import (
    DATASET_TAG,
    DIGEST_TAG,
    IS_PARENT_TAG,
    MOST_RUNS,
    VERSION_TAG,
    TrackedRun,
    Tracker,
    commit_of,
)
from rayloop.tune.objective import DIRECTIONS

Document = dict[str, Any]

NO_RUNS = "no runs yet; make one with: python jobs/pipeline.py smoke"
OUTCOME = "val_accuracy"
"""What trials are sorted by where their sweep does not say what it wants."""
KNOWN_NAMES = 500
"""Among so many runs the nearest name is looked for; each costs 4 ms."""
PLAIN_COLUMNS = 200
"""Width where nobody looks: a name that is broken in two cannot be searched for."""
SMALL_IS_GOOD = ("loss", "error", "_ms", "_s", "seconds", "bytes", "wait_share", "lost_steps")


def add_commands(commands: Any) -> None:
    """Add it to the parser."""
    runs = commands.add_parser("runs", help="what was trained: list, show, compare")
    runs.add_argument("--sweep", default="", metavar="RUN", help="the trials of a run, best first")
    runs.add_argument("--all", action="store_true", help="trials too, and not only their number")
    runs.add_argument("--limit", type=int, default=20, metavar="N", help="at most so many; 20")
    runs.add_argument(
        "--sort", default="", metavar="METRIC", help="best first; a loss, an error or a time: least"
    )
    verbs = runs.add_subparsers(dest="verb", metavar="show|compare")
    show = verbs.add_parser("show", help="all that is known of a run")
    show.add_argument("run", metavar="RUN")
    compare = verbs.add_parser("compare", help="settings that differ, then metrics side by side")
    compare.add_argument("run", nargs="+", metavar="RUN")
    for verb in verbs.choices.values():
        verb.add_argument("--json", action="store_true", default=argparse.SUPPRESS)


def run_runs(chosen: argparse.Namespace, _: list[str]) -> None:
    """`rayloop runs`."""
    if not 1 <= chosen.limit <= MOST_RUNS:
        raise RequestError(f"--limit {chosen.limit} must be 1 to {MOST_RUNS}.")
    book = _open()
    if chosen.verb == "show":
        _tell(chosen, shown(book, the_run(book, chosen.run)), _print_run)
    elif chosen.verb == "compare":
        names = list(dict.fromkeys(chosen.run))
        if len(names) < 2:
            raise RequestError(f"Name two runs or more, as in: rayloop runs compare {names[0]} RUN")
        _tell(chosen, compared([the_run(book, name) for name in names]), _print_comparison)
    elif chosen.sweep:
        _tell(chosen, trials(book, chosen.sweep, chosen.sort, chosen.limit), _print_trials)
    else:
        rows = listed(book, chosen.sort, chosen.limit, everything=chosen.all)
        _tell(chosen, rows, _print_list)


def _open() -> Tracker | None:
    """The database of this environment; None where there is none, since a look makes none."""
    storage, uri = Storage(home()), os.environ.get("MLFLOW_TRACKING_URI", "")
    if storage.is_local and not uri and not storage.exists("mlflow.db"):
        return None
    return Tracker(storage, uri)


def the_run(book: Tracker | None, name: str) -> TrackedRun:
    """A run by its name.

    Raises:
        DataMissing: There is none; the nearest name is offered.
    """
    found = book.read(name) if book else None
    if found:
        return found
    names = [run.run_id for run in book.runs(None, KNOWN_NAMES)] if book else []
    if not names:
        raise DataMissing(f"There is no run {name!r}: {NO_RUNS}")
    raise DataMissing(
        f"There is no run {name!r}; the nearest is {_nearest(name, names)!r}. "
        "List them with: rayloop runs --all"
    )


def listed(book: Tracker | None, sort: str, limit: int, everything: bool) -> list[Document]:
    """A row for each run, newest first or best first.

    Args:
        book: The database, if there is one.
        sort: A metric; empty for the newest first.
        limit: At most so many.
        everything: Trials too; else they are counted with their parent.

    Raises:
        RequestError: No run has that metric.
    """
    if book is None:
        return []
    runs = book.runs(None if everything else "", limit, sort, ascending=is_small_good(sort))
    _refuse_unknown(sort, runs)
    return [_line(run) | {"trials": _count(book, run)} for run in runs]


def trials(book: Tracker | None, name: str, sort: str, limit: int) -> list[Document]:
    """A row for each trial of a sweep, best first, with the settings in which they differ.

    Raises:
        DataMissing: There is no such run.
        RequestError: It has no trials, or none has that metric.
    """
    parent = the_run(book, name)
    by = sort or objective_of(parent) or OUTCOME
    runs = book.runs(name, limit, by, ascending=is_small_good(by)) if book else []
    if not runs:
        raise RequestError(f"Run {name!r} has no trials. Look at it with: rayloop runs show {name}")
    _refuse_unknown(sort, runs)
    differing = differences([run.params for run in runs])
    return [
        _line(run)
        | {"sorted_by": by, by: run.metrics.get(by)}
        | {"settings": {key: values[at] for key, values in differing.items()}}
        for at, run in enumerate(runs)
    ]


def shown(book: Tracker | None, run: TrackedRun) -> Document:
    """All that is known of a run."""
    told = ("rayloop.", "mlflow.")
    return {
        **_line(run),
        "mlflow_run_id": run.mlflow_run_id,
        "trials": _count(book, run) if book else 0,
        "dataset": run.tags.get(DATASET_TAG, ""),
        "dataset_digest": run.tags.get(DIGEST_TAG, ""),
        "commit": commit_of(run.tags),
        "version": run.tags.get(VERSION_TAG, ""),
        "best": run.tags.get("rayloop.best", ""),
        "error": run.tags.get("rayloop.error", ""),
        "tags": {
            name: value
            for name, value in run.tags.items()
            if not name.startswith(told) and name not in (DATASET_TAG, DIGEST_TAG)
        },
        "metrics": {name: run.metrics[name] for name in _in_order(run.metrics)},
        "metric_steps": run.steps,
        "params": run.params,
    }


def compared(runs: Sequence[TrackedRun]) -> Document:
    """The settings in which runs differ, data and code among them, and the metrics of all.

    A setting or metric that a run does not have is None.
    """
    about = [
        {"data": run.tags.get(DATASET_TAG), "code": commit_of(run.tags), **run.params}
        for run in runs
    ]
    metrics = _in_order(name for run in runs for name in run.metrics)
    return {
        "runs": [run.run_id for run in runs],
        "settings": differences(about),
        "metrics": {name: [run.metrics.get(name) for run in runs] for name in metrics},
    }


def differences(settings: Sequence[Mapping[str, str | None]]) -> dict[str, list[str | None]]:
    """The settings that are not the same in all, with their values; the name is none of them."""
    names = dict.fromkeys(name for one in settings for name in one if name != "run_id")
    found = {name: [one.get(name) for one in settings] for name in names}
    return {name: values for name, values in found.items() if len(set(values)) > 1}


def objective_of(sweep: TrackedRun) -> str:
    """What a sweep wants first; empty where its settings do not say."""
    try:
        objectives = ast.literal_eval(sweep.params.get("tune.objectives", "[]"))
        return str(objectives[0])
    except (ValueError, SyntaxError, IndexError, TypeError):
        return ""


def is_small_good(metric: str) -> bool:
    """Whether less of a metric is better, by what is known of it or by its name."""
    if metric in DIRECTIONS:
        return DIRECTIONS[metric] == "minimize"
    return metric.endswith(SMALL_IS_GOOD)


def _line(run: TrackedRun) -> Document:
    """What a list shows; a sweep's accuracy is its best trial's."""
    metrics = run.metrics
    best = metrics.get("best_score") if objective_of(run) == OUTCOME else None
    return {
        "run_id": run.run_id,
        "parent": run.parent,
        "status": run.tags.get("rayloop.status") or run.status.lower(),
        "started": iso_utc(run.started),
        "val_accuracy": metrics.get("val_accuracy", best),
        "test_accuracy": metrics.get("test_accuracy"),
        "epochs": metrics.get("epoch", metrics.get("budget_epochs")),
        "steps": None if "step" not in metrics else int(metrics["step"]),
        "seconds": round(run.seconds, 1),
    }


def _count(book: Tracker, run: TrackedRun) -> int:
    return len(book.runs(run.run_id, MOST_RUNS)) if IS_PARENT_TAG in run.tags else 0


def _refuse_unknown(metric: str, runs: Sequence[TrackedRun]) -> None:
    known = _in_order(name for run in runs for name in run.metrics)
    if metric and runs and metric not in known:
        hint = f"; the nearest is {_nearest(metric, known)!r}" if known else ""
        raise RequestError(
            f"--sort {metric}: none of these runs has a metric of that name{hint}. "
            f"There are: {', '.join(known) or 'none'}."
        )


def _nearest(name: str, known: Sequence[str]) -> str:
    return difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]


def _in_order(names: Iterable[str]) -> list[str]:
    """Metrics without repetition: those that choose among runs first, the rest by name."""
    first = ["val_accuracy", "test_accuracy", "val_loss"]
    found = set(names)
    return [name for name in first if name in found] + sorted(found - set(first))


def _tell(chosen: argparse.Namespace, told: Any, show: Callable[[Console, Any], None]) -> None:
    """Print what was found, as JSON or for people."""
    if chosen.json:
        print(json.dumps(told))
        return
    is_read = sys.stdout.isatty() or "COLUMNS" in os.environ
    show(Console(width=None if is_read else PLAIN_COLUMNS, highlight=False, markup=False), told)


def _print_list(console: Console, rows: Sequence[Document]) -> None:
    if not rows:
        console.print(NO_RUNS)
        return
    table = _table("run", "status", "started", ">val", ">test", ">epochs", ">steps", ">time",
                   folds=["run"])  # fmt: skip
    for row in rows:
        number = f" ({row['trials']} trials)" if row["trials"] else ""
        table.add_row(
            row["run_id"] + number, row["status"], _when(row["started"], "%m-%d %H:%M"),
            _accuracy(row["val_accuracy"]), _accuracy(row["test_accuracy"]),
            _figure(row["epochs"]), _figure(row["steps"]), _time(row["seconds"]),
        )  # fmt: skip
    console.print(table)


def _print_trials(console: Console, rows: Sequence[Document]) -> None:
    by = rows[0]["sorted_by"]
    table = _table(
        "trial", "status", f">{by}", ">epochs", ">time", "settings", folds=["trial", "settings"]
    )
    for row in rows:
        settings = (
            f"{name.removeprefix('train.')}={_short(value)}"
            for name, value in row["settings"].items()
        )
        table.add_row(
            row["run_id"], row["status"], _accuracy(row[by]), _figure(row["epochs"]),
            _time(row["seconds"]), " ".join(settings),
        )  # fmt: skip
    console.print(table)


def _print_run(console: Console, run: Document) -> None:
    code = " ".join(part for part in (run["version"], run["commit"]) if part)
    about = {
        "run": run["run_id"],
        "status": run["status"],
        "error": run["error"],
        "started": f"{_when(run['started'], '%Y-%m-%d %H:%M:%S')}, {_time(run['seconds'])}",
        "part of": run["parent"],
        "trials": f"{run['trials']}: rayloop runs --sweep {run['run_id']}" if run["trials"] else "",
        "best": run["best"],
        "data": run["dataset"] or run["dataset_digest"],
        "code": code,
        "in mlflow": run["mlflow_run_id"],
        **run["tags"],
    }
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    for name, value in about.items():
        if value:
            table.add_row(name, value)
    console.print(table)
    if run["metrics"]:
        table = _table("metric", ">value", ">step", folds=["metric"])
        for name, value in run["metrics"].items():
            table.add_row(name, _figure(value), str(run["metric_steps"][name]))
        console.print("", table)
    if run["params"]:
        table = _table("setting", "value", folds=["setting", "value"])
        for name, value in run["params"].items():
            table.add_row(name, value)
        console.print("", table)


def _print_comparison(console: Console, told: Document) -> None:
    names = told["runs"]
    columns = [f">{name}" for name in names]
    if told["settings"]:
        table = _table("setting", *columns, folds=["setting", *names])
        for name, values in told["settings"].items():
            table.add_row(name, *(_short(value) for value in values))
        console.print(table)
    else:
        console.print("the settings, the data and the code are the same")
    table = _table("metric", *columns, folds=["metric", *names])
    for name, values in told["metrics"].items():
        table.add_row(name, *(_figure(value) for value in values))
    console.print("", table)


def _table(*columns: str, folds: Sequence[str]) -> Table:
    """A table without lines.

    Args:
        columns: Headings; one with `>` stands right.
        folds: Those that are broken where the terminal is narrow.
    """
    table = Table(box=None, padding=(0, 1, 0, 0))
    for column in columns:
        name = column.removeprefix(">")
        side: Literal["left", "right"] = "left" if name == column else "right"
        table.add_column(name, justify=side, no_wrap=name not in folds, overflow="fold")
    return table


def _short(setting: str | None) -> str:
    """A setting in few letters: six digits tell two learning rates apart."""
    if not setting:
        return "-"
    try:
        return f"{float(setting):.6g}" if len(setting) > 8 else setting
    except ValueError:
        return setting


def _when(iso: str, shape: str) -> str:
    """A time in UTC as the clock on the wall has it."""
    return datetime.fromisoformat(iso).astimezone().strftime(shape)


def _time(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest:02}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02}m"


def _accuracy(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _figure(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if value == round(value) and abs(value) < 1e9 else f"{value:.4g}"
