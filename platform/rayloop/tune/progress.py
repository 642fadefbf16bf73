"""News of a sweep's trials -> a progress bar on a terminal, and plain lines."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from rayloop.logs import stage_logger
from rayloop.tune.sweep import Sweep
from rayloop.tune.trial import Trial

log = stage_logger("tune")


class Progress:
    """Shows each trial as it ends."""

    def __init__(self, sweep: Sweep) -> None:
        self._sweep = sweep
        self._bar: Bar | None = None
        if sys.stderr.isatty():
            columns = (
                TextColumn("{task.description}"), BarColumn(),
                TextColumn("{task.completed:.0f}/{task.total:.0f} trials"), TimeElapsedColumn(),
            )  # fmt: skip
            self._bar = Bar(*columns, console=Console(stderr=True))

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show the bar as long as the block runs."""
        if self._bar is None:
            yield
            return
        with self._bar:
            total = self._sweep.num_trials
            self._bar.add_task("sweep", total=total, completed=self._num_over())
            yield

    def show(self, trial: Trial) -> None:
        """Say how a trial ended, and which is the best now."""
        name, best = self._sweep.config.tune.objectives[0], self._sweep.best()
        score = f"{name} {trial.figures[name]:.4f}" if name in trial.figures else "no record"
        settings = ", ".join(
            f"{field.rsplit('.', 1)[1]}={_short(value)}"
            for field, value in trial.assignment.items()
        )
        log.info(
            "trial %d %s after %g epochs: %s%s; %s", trial.number, trial.status,
            trial.records[-1]["epoch"] if trial.records else 0, score,
            f"; best {best.figures[name]:.4f} of trial {best.number}" if best else "", settings,
        )  # fmt: skip
        if trial.status == "failed":
            log.warning("trial %d: %s", trial.number, trial.error)
        if self._bar:
            self._bar.update(self._bar.task_ids[0], completed=self._num_over())

    def _num_over(self) -> int:
        return sum(trial.is_over for trial in self._sweep.trials)


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value).replace(" ", "")
