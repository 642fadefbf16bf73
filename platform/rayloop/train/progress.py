"""News from the workers -> a progress bar on a terminal, plain lines elsewhere, and the tracker."""

import sys
import threading
from collections.abc import Callable
from typing import Any

import ray
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from rayloop.logs import stage_logger

log = stage_logger("train")

POLL_INTERVAL_S = 0.5


class ProgressBoard:
    """A Ray actor rank 0 writes to and the driver reads: steps done, and a record per epoch.

    One lives for each run, on the driver's behalf, and outlives worker restarts.
    """

    def __init__(self) -> None:
        self._step = 0
        self._records: dict[int, dict[str, float]] = {}

    def set_step(self, step: int) -> None:
        """Note how many steps are done."""
        self._step = step

    def add_record(self, record: dict[str, float]) -> None:
        """Keep an epoch's record; the same step again, after a restart, replaces the first."""
        self._records[int(record["step"])] = record

    def read(self, after_step: int) -> tuple[int, list[dict[str, float]]]:
        """Steps done, and the records of later steps than `after_step`, in order."""
        return self._step, [r for step, r in sorted(self._records.items()) if step > after_step]


class Follower:
    """A thread on the driver that shows what the board says while Ray Train blocks.

    Args:
        board: Handle of the `ProgressBoard` actor.
        num_steps: Steps of the whole run.
        after_step: Records up to this step are known already and not shown again.
        on_record: Called with each new record, e.g. to track it.
    """

    def __init__(
        self,
        board: Any,
        num_steps: int,
        after_step: int,
        on_record: Callable[[dict[str, float]], None],
    ) -> None:
        self._board, self._num_steps, self._on_record = board, num_steps, on_record
        self._shown_step = after_step
        self._stop = threading.Event()
        self._bar = _progress_bar() if sys.stderr.isatty() else None
        self._thread = threading.Thread(target=self._run, name="rayloop-progress", daemon=True)

    def __enter__(self) -> "Follower":
        if self._bar is not None:
            self._bar.start()
            self._bar.add_task("training", total=self._num_steps)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if self._bar is not None:
            self._bar.stop()

    def _run(self) -> None:
        while not self._stop.wait(POLL_INTERVAL_S):
            self._show()
        self._show()

    def _show(self) -> None:
        try:
            step, records = ray.get(self._board.read.remote(self._shown_step), timeout=10)
        except ray.exceptions.RayError as error:
            log.warning("no progress to show: %s", type(error).__name__)
            return
        for record in records:
            self._shown_step = int(record["step"])
            log.info(
                "epoch %.4g step %d/%d  loss %.4f  accuracy %.4f  validation %.4f",
                record["epoch"], step, self._num_steps, record["train_loss"],
                record["train_accuracy"], record["val_accuracy"],
            )  # fmt: skip
            self._on_record(record)
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step)


def _progress_bar() -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f} steps"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=Console(stderr=True))
