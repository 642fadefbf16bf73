"""A rank's marks -> a report when they cease: who hangs, in which phase, at which line.

Two lines of defence. A daemon thread sees a silence and reports it with the stack. Where a call
into C keeps the interpreter's lock, no Python thread can run; then a timer in C writes all stacks
to a file and ends the process, so that whoever waits for it learns of its end.
"""

import faulthandler
import os
import re
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, Self, get_args

from rayloop.clock import SYSTEM_CLOCK, Clock
from rayloop.errors import ConfigError
from rayloop.logs import stage_logger

log = stage_logger("train")

Phase = Literal["data_wait", "prepare", "step", "exchange", "evaluate", "checkpoint"]
PHASES: tuple[Phase, ...] = get_args(Phase)
"""The parts of a step, in the order in which the loop comes to them."""

LOOKS_PER_TIMEOUT = 4
"""How often the thread wakes in one timeout; it sets how late a held lock is noticed."""

_FRAME = re.compile(r'^  File "(.*)", line (\d+), in (.*)(?:\n    (.*))?', re.MULTILINE)
_TORCH_EXCHANGE = re.compile(r"torch/(distributed/|nn/parallel/distributed\.py$)")
_EXCHANGE_NAME = re.compile(
    r"reduce|gather|broadcast|scatter|all_to_all|barrier|wait|recv|send|_across_processes"
)

_timer_is_taken = threading.Lock()


@dataclass(frozen=True, slots=True)
class Hang:
    """One silence of one rank.

    Attributes:
        rank: Who fell silent.
        step: The step it last marked.
        phase: The phase it last marked.
        waited_s: Seconds since that mark.
        stack: Its thread's stack as `traceback.format_stack` gives it, innermost frame last; empty
            if the thread has ended.
    """

    rank: int
    step: int
    phase: Phase
    waited_s: float
    stack: str


class _Mark(NamedTuple):
    step: int
    phase: Phase
    at_s: float


class _Frame(NamedTuple):
    file: str
    line: int
    function: str
    code: str


class Watchdog:
    """Watches the thread that enters it, until it leaves.

    `on_hang` runs in the watchdog's thread and must come back soon; what it raises is logged. A
    silence of about twice `timeout_s` ends the process with exit code 1, whether it was reported
    or not, if there is a `dump_path`.

    Args:
        rank: Whose progress is watched.
        timeout_s: Longest time between two marks; 0 turns the watchdog off.
        on_hang: Told of each silence once, and again only after a new mark and a new silence.
        dump_path: Where all threads' stacks are added before the process ends; removed on leaving
            if nothing was written. Two processes must not share it. None: no second line of
            defence, the process is never ended. A process can have one at a time.
        clock: For tests.

    Raises:
        ConfigError: `timeout_s` is negative or no finite number.
    """

    def __init__(
        self,
        rank: int,
        timeout_s: float,
        on_hang: Callable[[Hang], None],
        dump_path: Path | None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        if not 0 <= timeout_s <= threading.TIMEOUT_MAX / 2:
            raise ConfigError(
                f"train.step_timeout_s={timeout_s} is no time to wait; use seconds above 0, or 0 "
                "to turn the watchdog off."
            )
        self._rank, self._timeout_s, self._on_hang = rank, timeout_s, on_hang
        self._dump_path, self._now = dump_path, clock.monotonic
        self._mark = _Mark(0, PHASES[0], 0.0)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._last_resort: _LastResort | None = None
        self._watched = 0

    def mark(self, step: int, phase: Phase) -> None:
        """Say that a phase begins; one store, so that a loop can afford it at every phase.

        Args:
            step: The step in work, from 0. `evaluate` and `checkpoint` belong to the step they
                follow, so a rank in them is not ahead of one that waits for the next batch.
            phase: One of `PHASES`.
        """
        self._mark = _Mark(step, phase, self._now())

    def __enter__(self) -> Self:
        self.mark(self._mark.step, self._mark.phase)
        if self._timeout_s == 0:
            return self
        self._watched = threading.get_ident()
        self._stop.clear()
        if self._dump_path is not None:
            self._last_resort = _LastResort(self._dump_path, 2 * self._timeout_s)
        self._thread = threading.Thread(
            target=self._watch, args=(self._mark,), name="rayloop-watchdog", daemon=True
        )
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._last_resort is not None:
            self._last_resort.close()
            self._last_resort = None

    def _watch(self, seen: _Mark) -> None:
        reported: _Mark | None = None
        while not self._stop.wait(self._pause_s()):
            mark = self._mark
            if mark is not seen and self._last_resort is not None:
                self._last_resort.arm()
            seen = mark
            if mark is reported or self._now() - mark.at_s < self._timeout_s:
                continue
            hang = self._look(mark)
            if self._mark is mark:  # else it went on while its stack was taken
                reported = mark
                self._report(hang)

    def _pause_s(self) -> float:
        pause_s = self._timeout_s / LOOKS_PER_TIMEOUT
        left_s = self._timeout_s - (self._now() - self._mark.at_s)
        return min(pause_s, left_s) if left_s > 0 else pause_s

    def _look(self, mark: _Mark) -> Hang:
        frame = sys._current_frames().get(self._watched)
        stack = "" if frame is None else "".join(traceback.format_stack(frame))
        return Hang(self._rank, mark.step, mark.phase, self._now() - mark.at_s, stack)

    def _report(self, hang: Hang) -> None:
        try:
            self._on_hang(hang)
        except Exception as error:  # the watch goes on; its end would end the process
            log.error("%s; the report of it failed: %r", describe(hang), error)


class _LastResort:
    """Faulthandler's timer, of which a process has one, and the file it writes to."""

    def __init__(self, path: Path, after_s: float) -> None:
        if not _timer_is_taken.acquire(blocking=False):
            raise RuntimeError(
                f"another watchdog of this process has a dump file; {path} would take over its "
                "timer. Watch one loop in a process, or give dump_path=None."
            )
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._path, self._after_s, self._file = path, after_s, path.open("ab")
        except BaseException:
            _timer_is_taken.release()
            raise
        self.arm()

    def arm(self) -> None:
        """Start the time anew."""
        faulthandler.dump_traceback_later(self._after_s, exit=True, file=self._file)

    def close(self) -> None:
        """Stop the timer; keep the file only if it says something."""
        faulthandler.cancel_dump_traceback_later()
        _timer_is_taken.release()
        is_empty = os.fstat(self._file.fileno()).st_size == 0
        self._file.close()
        if is_empty:
            self._path.unlink(missing_ok=True)


def suspects(hangs: Sequence[Hang], world_size: int) -> list[int]:
    """Which ranks hold up the others, in ascending order; never nobody.

    Ranks that said nothing come first and alone: they hold the interpreter's lock, or are gone.
    Else those with the least progress; if all have the same, those that are not in an exchange
    with others; if that is nobody, all of them.

    Ranks fall silent one after another, so ask when each had the time to speak: a timeout after
    the first report. A rank that has left its loop while others are in theirs looks like one that
    is gone; let all ranks leave together.

    Args:
        hangs: What the ranks reported; of several reports of one rank the last counts.
        world_size: Number of ranks.

    Raises:
        ValueError: A report comes from a rank that is not in 0..world_size-1.
    """
    latest = {hang.rank: hang for hang in hangs}
    everyone = range(world_size)
    strangers = sorted(set(latest).difference(everyone))
    if strangers:
        raise ValueError(
            f"reports of ranks {strangers} among world_size={world_size}: they come from an "
            "earlier start of the workers; forget reports when workers start."
        )
    silent = [rank for rank in everyone if rank not in latest]
    if silent:
        return silent
    progress = [(latest[rank].step, PHASES.index(latest[rank].phase)) for rank in everyone]
    behind = [rank for rank in everyone if progress[rank] == min(progress)]
    if len(behind) < world_size:
        return behind
    at_work = [rank for rank in everyone if not _waits_for_others(latest[rank].stack)]
    return at_work or behind


def describe(hang: Hang) -> str:
    """One line for people: who hangs, in what, since when, and where in the code."""
    frames = _frames(hang.stack)
    where = "its thread has ended"
    if frames:
        where = f"{frames[-1].file}:{frames[-1].line} {frames[-1].function}"
    waited = f"{hang.waited_s:.0f}" if hang.waited_s >= 10 else f"{hang.waited_s:.1f}"
    return (
        f"rank {hang.rank} has been stuck in {hang.phase} at step {hang.step} for {waited} s "
        f"(train.step_timeout_s): {where}"
    )


def _frames(stack: str) -> list[_Frame]:
    """The frames of a formatted stack, innermost last."""
    found = _FRAME.findall(stack)
    return [_Frame(file, int(line), function, code) for file, line, function, code in found]


def _waits_for_others(stack: str) -> bool:
    """Whether the innermost frame is a collective, or a backward pass, which may hold DDP's."""
    frames = [frame for frame in _frames(stack) if not frame.file.endswith("torch/_ops.py")]
    if not frames:
        return False
    file, _, function, code = frames[-1]
    return (
        (function == "_engine_run_backward" and "torch/autograd/" in file)
        or (_TORCH_EXCHANGE.search(file) is not None and bool(_EXCHANGE_NAME.search(function)))
        or ".wait()" in code  # a pending exchange; waits on threads end in frames of their own
    )
