"""What happened to a run over all its starts -> seconds by cause that add up to its wall time.

A *session* is one driver's `fit`. It has *attempts*, each a start of the worker group, and of each
attempt the newest thing rank 0 said. Three times cut a session into stretches:

    session begins ... first step | the loop | ... first step | the loop | ... session ends
          start                              restart                       finish

The loop's stretch is divided by what the worker's own ledger booked; what it booked nowhere is
`other`. Moments are all read from one clock, that of whoever keeps the journal, and of the workers'
clocks only durations are used, since they may be on other machines.

The time between sessions belongs to nobody and is left out. A session whose driver was killed ends
at its last sign of life.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from rayloop.errors import Corrupt

LOOP_CAUSES = ("step", "compile", "data_wait", "evaluate", "checkpoint")
"""What a worker's ledger books while it is in the loop; `step` alone is productive."""

CAUSES = (
    "step", "data_wait", "evaluate", "checkpoint", "compile", "start", "restart", "lost_work",
    "finish", "other",
)  # fmt: skip
"""All causes, in the order in which they are shown."""


@dataclass(kw_only=True, slots=True)
class Attempt:
    """One start of the worker group.

    Attributes:
        began_at: When it began.
        resumed_at_step: Steps done by the checkpoint it went on from.
        last_at: Its last sign of life.
        step: Steps done then, counted from the start of the run.
        first_step_at: When its loop began; None as long as no step is done.
        seconds: Seconds by cause, as of `last_at`.
    """

    began_at: float
    resumed_at_step: int
    last_at: float
    step: int
    first_step_at: float | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    def loop_seconds(self) -> dict[str, float]:
        """What the ledger booked in the loop, by cause, never more than the loop has lasted."""
        if self.first_step_at is None:
            return dict.fromkeys(LOOP_CAUSES, 0.0)
        booked = {cause: self.seconds.get(cause, 0.0) for cause in LOOP_CAUSES}
        lasted, total = self.last_at - self.first_step_at, sum(booked.values())
        scale = lasted / total if total > lasted else 1.0
        return {cause: spent * scale for cause, spent in booked.items()}


@dataclass(kw_only=True, slots=True)
class Session:
    """One driver's `fit`.

    Attributes:
        began_at: When it began.
        ended_at: When it ended; None while it lasts, and for ever if its driver was killed.
        attempts: The starts of the worker group, in order.
    """

    began_at: float
    ended_at: float | None = None
    attempts: list[Attempt] = field(default_factory=list)

    @property
    def last_at(self) -> float:
        """Its end, or else its last sign of life."""
        if self.ended_at is not None:
            return self.ended_at
        return self.attempts[-1].last_at if self.attempts else self.began_at


class Journal:
    """The sessions of a run, fed with events as they come.

    Times are seconds since the epoch. One that lies before an earlier one of the same session (a
    clock was set back) counts as that earlier one.
    """

    def __init__(self) -> None:
        self.sessions: list[Session] = []

    def open_session(self, now: float) -> None:
        """A driver begins its `fit`; an earlier session that was not closed was killed."""
        self.sessions.append(Session(began_at=now))

    def begin_attempt(self, now: float, resumed_at_step: int) -> None:
        """The workers start, for the first time or again.

        Args:
            now: The time.
            resumed_at_step: Steps done by the checkpoint they go on from; 0 without one.

        Raises:
            ValueError: No session is open.
        """
        session = self._open("An attempt can't begin")
        now = max(now, session.last_at)
        session.attempts.append(
            Attempt(began_at=now, resumed_at_step=resumed_at_step, last_at=now,
                    step=resumed_at_step)
        )  # fmt: skip

    def note(self, now: float, step: int, seconds: Mapping[str, float]) -> None:
        """Rank 0 lives and has got this far.

        A step below one that was noted before in this attempt is an old message and left out.

        Args:
            now: The time at which the news arrived.
            step: Steps done, counted from the start of the run.
            seconds: Seconds by cause since this attempt's loop began, at least 0 each. Causes that
                are not in `LOOP_CAUSES` count as `other`.

        Raises:
            ValueError: No attempt has begun, or a duration is not a number from 0 on.
        """
        session = self._open("Nothing can be noted")
        if not session.attempts:
            raise ValueError("Nothing can be noted before begin_attempt() in this session.")
        if not all(0 <= spent < math.inf for spent in seconds.values()):
            raise ValueError(f"Seconds by cause must be numbers from 0 on, got {dict(seconds)}.")
        attempt = session.attempts[-1]
        if step < attempt.step:
            return
        now = max(now, session.last_at)
        if attempt.first_step_at is None and step > attempt.resumed_at_step:
            attempt.first_step_at = min(now, max(attempt.began_at, now - sum(seconds.values())))
        attempt.last_at, attempt.step, attempt.seconds = now, step, dict(seconds)

    def close_session(self, now: float) -> None:
        """The driver's `fit` ends, well or with an error.

        Raises:
            ValueError: No session is open.
        """
        session = self._open("No session can end")
        session.ended_at = max(now, session.last_at)

    def _open(self, what: str) -> Session:
        if not self.sessions or self.sessions[-1].ended_at is not None:
            raise ValueError(f"{what} while no session is open; call open_session() first.")
        return self.sessions[-1]

    def causes(self) -> dict[str, float]:
        """Seconds by cause over all sessions, each at least 0; they add up to `total_s`.

        start: from a session's begin to its first attempt's first step.
        restart: from an attempt's last sign of life to the next one's first step.
        finish: from the last sign of life to the session's end. A session whose last attempt did
            no step ends in `start` or `restart`.
        lost_work: step seconds of steps that a later attempt threw away, see `lost_steps`.
        step, data_wait, evaluate, checkpoint, compile: from the workers' ledgers.
        other: the rest.
        """
        causes = dict.fromkeys(CAUSES, 0.0)
        lost = iter(self._lost_steps())
        for session in self.sessions:
            here, waiting_for = session.began_at, "start"
            for index, attempt in enumerate(session.attempts):
                num_lost = next(lost)
                waiting_for = "restart" if index else "start"
                upto = attempt.began_at if attempt.first_step_at is None else attempt.first_step_at
                causes[waiting_for] += upto - here
                here = upto
                if attempt.first_step_at is not None:
                    _add_loop(causes, attempt, num_lost)
                    here, waiting_for = attempt.last_at, "finish"
            causes[waiting_for] += session.last_at - here
        known = sum(spent for cause, spent in causes.items() if cause != "other")
        causes["other"] = max(0.0, self.total_s - known)
        return causes

    @property
    def total_s(self) -> float:
        """Wall time of all sessions, in seconds."""
        return sum(session.last_at - session.began_at for session in self.sessions)

    @property
    def goodput(self) -> float:
        """Share (0..1) of the total spent in training steps that were kept; 0 before any time."""
        return self.causes()["step"] / self.total_s if self.total_s > 0 else 0.0

    @property
    def interruptions(self) -> int:
        """How often the workers had to start again, in the same session or in a later one."""
        return max(0, sum(len(session.attempts) for session in self.sessions) - 1)

    @property
    def lost_steps(self) -> int:
        """Steps thrown away: a later attempt that got to a step had resumed below them."""
        return sum(self._lost_steps())

    def _lost_steps(self) -> list[int]:
        """Lost steps of each attempt, in order."""
        lost, kept_upto = [], math.inf
        for attempt in reversed([a for session in self.sessions for a in session.attempts]):
            kept = max(attempt.resumed_at_step, min(attempt.step, kept_upto))
            lost.append(int(attempt.step - kept))
            if attempt.step > attempt.resumed_at_step:
                kept_upto = min(kept_upto, attempt.resumed_at_step)
        return lost[::-1]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a JSON file: the accounts for readers, the sessions to go on from."""
        return {
            "seconds": self.causes(),
            "total_s": self.total_s,
            "goodput": self.goodput,
            "interruptions": self.interruptions,
            "lost_steps": self.lost_steps,
            "sessions": [asdict(session) for session in self.sessions],
        }

    @staticmethod
    def from_dict(saved: Mapping[str, Any]) -> "Journal":
        """The journal that `to_dict` was called on; only its sessions are read.

        Raises:
            Corrupt: These are not the values of a journal.
        """
        journal = Journal()
        try:
            journal.sessions = list(_read_sessions(saved["sessions"]))
        except (KeyError, TypeError, ValueError) as error:
            raise Corrupt(
                f"The run's journal (ledger.json) can't be read ({type(error).__name__}: {error}). "
                "Delete the file; the accounts then begin anew, the training does not."
            ) from None
        return journal


def _add_loop(causes: dict[str, float], attempt: Attempt, num_lost: int) -> None:
    """Book an attempt's loop; of its step time the share of its lost steps is lost work."""
    seconds = attempt.loop_seconds()
    lost_s = seconds["step"] * (num_lost / (attempt.step - attempt.resumed_at_step))
    seconds["step"] -= lost_s
    causes["lost_work"] += lost_s
    for cause, spent in seconds.items():
        causes[cause] += spent


def _read_sessions(saved: list[dict[str, Any]]) -> Iterator[Session]:
    for session in saved:
        ended_at = session["ended_at"]
        yield Session(
            began_at=float(session["began_at"]),
            ended_at=None if ended_at is None else float(ended_at),
            attempts=[_read_attempt(attempt) for attempt in session["attempts"]],
        )


def _read_attempt(saved: dict[str, Any]) -> Attempt:
    first_step_at = saved["first_step_at"]
    step, resumed_at_step = int(saved["step"]), int(saved["resumed_at_step"])
    if step < resumed_at_step or (first_step_at is not None) != (step > resumed_at_step):
        raise ValueError(f"step {step}, resumed at {resumed_at_step}, began at {first_step_at}")
    return Attempt(
        began_at=float(saved["began_at"]),
        resumed_at_step=resumed_at_step,
        last_at=float(saved["last_at"]),
        step=step,
        first_step_at=None if first_step_at is None else float(first_step_at),
        seconds={cause: float(spent) for cause, spent in saved["seconds"].items()},
    )
