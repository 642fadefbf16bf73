"""News of a sweep's trials -> a progress bar on a terminal, and plain lines."""

import sys
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from rayloop.logs import stage_logger
from rayloop.tune.sweep import Sweep
from rayloop.tune.trial import Trial

log = stage_logger("tune")


class Progress:
    """Shows each trial as it ends; a context that owns the bar."""

    def __init__(self, sweep: Sweep) -> None:
        self._sweep = sweep
        self._bar: Bar | None = None
        if sys.stderr.isatty():
            columns = (
                TextColumn("{task.description}"), BarColumn(),
                TextColumn("{task.completed:.0f}/{task.total:.0f} trials"), TimeElapsedColumn(),
            )  # fmt: skip
            self._bar = Bar(*columns, console=Console(stderr=True))

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
            self._bar.add_task("sweep", total=self._sweep.num_trials, completed=self._num_over())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar:
            self._bar.stop()

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
