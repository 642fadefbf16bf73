"""News from the workers -> a progress bar on a terminal, plain lines elsewhere, and the tracker."""

import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from rayloop.clock import SYSTEM_CLOCK, Clock
from rayloop.errors import RayloopError
from rayloop.logs import stage_logger
from rayloop.train.journal import Journal
from rayloop.train.watchdog import Hang, describe, suspects

log = stage_logger("train")

POLL_INTERVAL_S = 0.5
JOURNAL_INTERVAL_S = 5.0
"""How much of the accounts is missing at most where the driver is killed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class News:
    """What a follower asks for at each poll.

    Attributes:
        step: Steps done.
        records: The records it does not know yet, in order of their steps.
        starts: Step at which each start of the workers in this session went on.
        hangs: Every hang reported in this session, in order of arrival.
    """

    step: int
    records: list[dict[str, float]]
    starts: list[int]
    hangs: list[Hang]


class ProgressBoard:
    """A Ray actor the workers write to and the driver reads: steps, records, hangs, the journal.

    One lives for each session of a run, on the driver's behalf, and outlives worker restarts.

    Args:
        journal: What `journal()` gave in the run's earlier session, if there was one.
        began_at: When the session began, in seconds since the epoch; the actor's start if left
            out.
        clock: Its wall time is the journal's; workers only send durations.
    """

    def __init__(
        self,
        journal: dict[str, Any] | None = None,
        began_at: float | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._clock = clock
        self._step = 0
        self._records: dict[int, dict[str, float]] = {}
        self._starts: list[int] = []
        self._hangs: list[Hang] = []
        self._hangs_before = 0
        self._placement_group = ""
        self._final_error: RayloopError | None = None
        self._journal = Journal() if journal is None else Journal.from_dict(journal)
        self._journal.open_session(clock.now() if began_at is None else began_at)

    def begin_attempt(self, resumed_at_step: int, placement_group: str = "") -> None:
        """The workers start, for the first time or again; rank 0 says so before its first step.

        Args:
            resumed_at_step: Steps that were done before.
            placement_group: Id of the resources that the workers hold.
        """
        self._placement_group = placement_group
        self._journal.begin_attempt(self._clock.now(), resumed_at_step)
        self._starts.append(resumed_at_step)
        self._hangs_before = len(self._hangs)
        self._step = resumed_at_step

    def placement_group(self) -> str:
        """Id of the resources that the workers started last hold; empty before there are any."""
        return self._placement_group

    def note(self, step: int, seconds: dict[str, float]) -> None:
        """Rank 0 lives, has done so many steps, and spent its seconds so, by cause."""
        self._journal.note(self._clock.now(), step, seconds)
        self._step = step

    def set_step(self, step: int) -> None:
        """Note how many steps are done, where there are no accounts."""
        self._step = step

    def add_record(self, record: dict[str, float]) -> None:
        """Keep an epoch's record; the same step again, after a restart, replaces the first."""
        self._records[int(record["step"])] = record

    def hang(self, report: Hang) -> None:
        """Keep a rank's report that it hangs."""
        self._hangs.append(report)

    def hangs(self) -> list[Hang]:
        """The newest report of each rank since the workers started last, by rank."""
        newest = {report.rank: report for report in self._hangs[self._hangs_before :]}
        return [newest[rank] for rank in sorted(newest)]

    def suspects(self, world_size: int) -> list[int]:
        """Which of the workers started last hold up the others, by what they reported."""
        return suspects(self.hangs(), world_size)

    def set_final_error(self, error: RayloopError) -> None:
        """Keep an error that would come again at every restart; the first one stays."""
        if self._final_error is None:
            self._final_error = error

    def final_error(self) -> RayloopError | None:
        """The error that ends the run, if there is one."""
        return self._final_error

    def journal(self) -> dict[str, Any]:
        """The run's journal up to now, as plain values; see `Journal.to_dict`."""
        return self._journal.to_dict()

    def close(self) -> dict[str, Any]:
        """End the session, and give its journal."""
        self._journal.close_session(self._clock.now())
        return self._journal.to_dict()

    def read(self, after_step: int) -> tuple[int, list[dict[str, float]]]:
        """Steps done, and the records of later steps than `after_step`, in order."""
        return self._step, [r for step, r in sorted(self._records.items()) if step > after_step]

    def news(self, after_step: int) -> News:
        """All that a follower shows; records only of later steps than `after_step`."""
        step, records = self.read(after_step)
        return News(step=step, records=records, starts=list(self._starts), hangs=list(self._hangs))


class Follower:
    """A thread on the driver that shows what the board says while Ray Train blocks.

    Leaving it ends the board's session.

    Args:
        board: Handle of the `ProgressBoard` actor.
        num_steps: Steps of the whole run.
        after_step: Records up to this step are known already and not shown again.
        on_record: Called with each new record, e.g. to track it.
        on_journal: Called with the run's journal every `JOURNAL_INTERVAL_S` and at the end, e.g.
            to write it down before the driver may be killed. Where it fails, a warning says so
            and training goes on.
        clock: For that interval.
    """

    def __init__(
        self,
        board: Any,
        num_steps: int,
        after_step: int,
        on_record: Callable[[dict[str, float]], None],
        on_journal: Callable[[dict[str, Any]], None] | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._board, self._num_steps = board, num_steps
        self._on_record, self._on_journal, self._clock = on_record, on_journal, clock
        self._shown_step = after_step
        self._shown_starts, self._shown_hangs = 1, 0
        self._journal_at = clock.monotonic()
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
        try:
            while not self._stop.wait(POLL_INTERVAL_S):
                self._show()
                if self._clock.monotonic() - self._journal_at >= JOURNAL_INTERVAL_S:
                    self._journal_at = self._clock.monotonic()
                    self._hand_over_journal("journal")
            self._show()
        finally:
            self._hand_over_journal("close")

    def _show(self) -> None:
        news: News | None = self._ask("news", self._shown_step)
        if news is None:
            return
        for resumed_at_step in news.starts[self._shown_starts :]:
            log.warning("workers started again, going on at step %d", resumed_at_step)
        self._shown_starts = max(self._shown_starts, len(news.starts))
        for report in news.hangs[self._shown_hangs :]:
            log.warning("%s", describe(report))
        self._shown_hangs = len(news.hangs)
        for record in news.records:
            self._shown_step = int(record["step"])
            log.info(
                "epoch %.4g step %d/%d  loss %.4f  accuracy %.4f  validation %.4f",
                record["epoch"], news.step, self._num_steps, record["train_loss"],
                record["train_accuracy"], record["val_accuracy"],
            )  # fmt: skip
            self._on_record(record)
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=news.step)

    def _hand_over_journal(self, method: str) -> None:
        journal = self._ask(method)
        if journal is None or self._on_journal is None:
            return
        try:
            self._on_journal(journal)
        except (OSError, RayloopError) as error:
            log.warning("the run's accounts could not be kept: %s", error)

    def _ask(self, method: str, *arguments: Any) -> Any:
        """What the board answers; None, with a warning, if it does not."""
        try:
            return ray.get(getattr(self._board, method).remote(*arguments), timeout=10)
        except ray.exceptions.RayError as error:
            log.warning("no progress to show: %s", type(error).__name__)
            return None


def _progress_bar() -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f} steps"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=Console(stderr=True))
