"""Run the engine on batches, in a thread of its own, so that one bad request fails alone."""

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from time import perf_counter_ns
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from rayloop.errors import WorkError
from rayloop.serve.statistics import BatchTimes

Rows = NDArray[np.uint8]
Answers = NDArray[np.float32]


class EngineFailed(WorkError):
    """The engine raised on this request alone."""


@dataclass(slots=True)
class Outcome:
    """What the engine made of a batch."""

    answers: list[Answers | Exception] = field(default_factory=list)
    """One for each part."""

    calls: list[BatchTimes] = field(default_factory=list)
    """One engine call for all parts, or one for each."""

    retried: int = 0
    """Parts that were run again alone, after the batch failed."""

    seconds: float = 0.0


Job = TypeVar("Job")


class EngineThread(Generic[Job]):
    """The one thread an engine runs in.

    It fetches its batches itself, so that it is never idle while something waits, however busy the
    event loop is.

    Args:
        predict: The engine: [N, ...] -> [N, K].
        take: Waits for the next batch: whatever `tell` needs, and its parts, each [N, ...]; None
            ends the thread.
        tell: Called with the first of these and the outcome.
    """

    def __init__(
        self,
        predict: Callable[[Rows], Answers],
        take: Callable[[], tuple[Job, list[Rows]] | None],
        tell: Callable[[Job, Outcome], None],
    ) -> None:
        self._predict, self._take, self._tell = predict, take, tell
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)

    def start(self) -> None:
        """Begin to take batches, unless that was done before."""
        if self._thread.ident is None:
            self._thread.start()

    def join(self) -> None:
        """Wait until `take` has given None."""
        if self._thread.ident is not None:
            self._thread.join()

    def _work(self) -> None:
        while (batch := self._take()) is not None:
            job, parts = batch
            start_ns = perf_counter_ns()
            outcome = self._run(parts)
            outcome.seconds = (perf_counter_ns() - start_ns) / 1e9
            self._tell(job, outcome)

    def _run(self, parts: list[Rows]) -> Outcome:
        """Run the engine on a batch; on an error run each member alone."""
        outcome = Outcome()
        if len(parts) > 1:
            start_ns = perf_counter_ns()
            try:
                rows = np.concatenate(parts)
                put_ns = perf_counter_ns()
                joint = self._checked(rows)
                run_ns = perf_counter_ns()
                outcome.answers.extend(_split(joint, parts))
            except Exception:  # whichever member it was, the others get their answer
                outcome.retried = len(parts)
            else:
                end_ns = perf_counter_ns()
                times = BatchTimes(put_ns - start_ns, run_ns - put_ns, end_ns - run_ns)
                outcome.calls.append(times)
                return outcome
        for part in parts:
            self._solo(part, outcome)
        return outcome

    def _solo(self, part: Rows, outcome: Outcome) -> None:
        start_ns = perf_counter_ns()
        try:
            outcome.answers.append(self._checked(part))
        except Exception as error:  # becomes the answer of this request alone
            failure = EngineFailed(f"The model failed on this input: {str(error)[:200]}")
            failure.__cause__ = error
            outcome.answers.append(failure)
        outcome.calls.append(BatchTimes(0, perf_counter_ns() - start_ns, 0))

    def _checked(self, rows: Rows) -> Answers:
        answers = self._predict(rows)
        if len(answers) != len(rows):
            raise EngineFailed(f"The engine gave {len(answers)} answers to {len(rows)} rows.")
        return answers


def _split(joint: Answers, parts: list[Rows]) -> Iterator[Answers]:
    """Each part's own answers; slices, since `np.split` takes longer than a small model."""
    start = 0
    for part in parts:
        end = start + len(part)
        yield joint[start:end]
        start = end
