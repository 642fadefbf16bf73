"""Turn single requests into engine batches and back, so that each answer is the one it gets alone.

One task on the event loop forms batches, one thread runs the engine. Size is counted in rows.
While the engine runs, requests gather; what is there when it finishes is the next batch, so a lone
request on an idle engine never waits. A more urgent request goes before all less urgent ones that
wait. A request past its deadline or cancelled never reaches the engine, and an engine error on a
joint batch is retried member by member.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from time import perf_counter_ns

import numpy as np
from numpy.typing import NDArray

from rayloop.errors import WorkError
from rayloop.serve.statistics import BatchTimes, VersionStatistics

PRIORITY_LEVELS, DEFAULT_PRIORITY = 3, 2
"""Priorities go from 1, the most urgent, to `PRIORITY_LEVELS`."""

RECENT_SHARE = 0.2
"""Weight of the newest batch in the time that a batch takes."""

Rows = NDArray[np.uint8]
Answers = NDArray[np.float32]


class QueueFull(WorkError):
    """As many rows wait as may."""


class DeadlinePassed(WorkError):
    """The request's time ran out before its answer was there."""


class Abandoned(WorkError):
    """Nobody waits for the answer any more."""


class Stopping(WorkError):
    """The server, or this version in it, is being stopped."""


class EngineFailed(WorkError):
    """The engine raised on this request alone."""


@dataclass(slots=True)
class BatcherCounts:
    """What a batcher has done since it was made."""

    batches: int = 0
    rows: int = 0
    expired: int = 0
    cancelled: int = 0
    retried_alone: int = 0


@dataclass(slots=True, eq=False)
class _Request:
    future: asyncio.Future[Answers]
    parts: list[Answers | None]
    arrived_at: float
    arrived_ns: int
    queued_pieces: int
    priority: int
    gone: Callable[[], bool]


@dataclass(slots=True, eq=False)
class _Piece:
    request: _Request
    index: int
    rows: Rows

    @property
    def wanted(self) -> bool:
        return not self.request.future.done()


@dataclass(slots=True)
class _Outcome:
    answers: list[Answers | Exception] = field(default_factory=list)
    calls: list[BatchTimes] = field(default_factory=list)
    """One engine call for all pieces, or one for each."""

    retried: int = 0


def still_there() -> bool:
    """Says of a request that somebody waits for it."""
    return False


class Batcher:
    """Gathers rows for one engine. Make it and use it on one event loop.

    Args:
        predict: The engine: [N, ...] -> [N, K]; runs in a thread of its own, one call at a time.
        max_batch_rows: Most rows in one engine call; a longer request is split.
        max_wait_s: Longest time, counted from its arrival, that a row which came while the engine
            was busy waits for company after the engine is free; 0 never waits.
        max_queued_rows: Rows that may wait.
    """

    def __init__(
        self,
        predict: Callable[[Rows], Answers],
        *,
        max_batch_rows: int,
        max_wait_s: float,
        max_queued_rows: int,
    ) -> None:
        self._predict = predict
        self._max_batch_rows = max_batch_rows
        self._max_wait_s = max_wait_s
        self._max_queued_rows = max_queued_rows
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self._levels: tuple[deque[_Piece], ...] = tuple(deque() for _ in range(PRIORITY_LEVELS))
        self._waiting = [0] * PRIORITY_LEVELS
        self._batch_s = 0.0
        self._full = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.counts = BatcherCounts()
        self.statistics = VersionStatistics()

    @property
    def queued_rows(self) -> int:
        """Rows that wait and are still wanted."""
        return sum(self._waiting)

    def wait_s(self, priority: int = 1) -> float:
        """Seconds until what waits before a new request is done, by what batches took lately.

        It is 0 when nothing waits, so that a request which finds no queue is always tried.

        Args:
            priority: The request's; less urgent ones come after it.
        """
        ahead = sum(self._waiting[:priority])
        return -(-ahead // self._max_batch_rows) * self._batch_s

    async def submit(
        self,
        rows: Rows,
        timeout_s: float,
        priority: int = DEFAULT_PRIORITY,
        gone: Callable[[], bool] = still_there,
    ) -> Answers:
        """The engine's answers [N, K] to rows [N, ...].

        Args:
            rows: At least one row.
            timeout_s: Seconds from now after which the answer is no longer wanted.
            priority: 1 (most urgent) to `PRIORITY_LEVELS`.
            gone: Asked before the engine gets the rows: whether nobody waits any more.

        Raises:
            Abandoned: Nobody waits any more.
            QueueFull: There is no room for the rows.
            DeadlinePassed: The time ran out first.
            EngineFailed: The engine raises on these rows.
        """
        if timeout_s <= 0:
            self.counts.expired += 1
            raise DeadlinePassed("The deadline had passed on arrival; give more time.")
        queued_rows = self.queued_rows
        if queued_rows + len(rows) > self._max_queued_rows:
            raise QueueFull(
                f"{queued_rows} rows wait and {len(rows)} more exceed the limit of "
                f"{self._max_queued_rows}; try again shortly."
            )
        if queued_rows and (wait_s := self.wait_s(priority)) > timeout_s:
            raise QueueFull(
                f"What waits already takes {wait_s * 1000:.0f} ms, and the request has "
                f"{timeout_s * 1000:.0f} ms left; try again shortly."
            )
        loop = asyncio.get_running_loop()
        request = self._enqueue(rows, loop, priority, gone)
        timer = loop.call_later(timeout_s, self._expire, request, timeout_s)
        try:
            return await request.future
        except asyncio.CancelledError:
            self.counts.cancelled += 1
            raise
        finally:
            timer.cancel()
            self._forget(request)

    async def drain(self) -> None:
        """Answer everything that waits, then stop the thread; nothing new may be submitted."""
        while self._task is not None:
            await asyncio.shield(self._task)
        self._thread.shutdown(wait=True)

    async def close(self) -> None:
        """Let the batch that runs finish, fail what waits, and stop the thread."""
        for piece in [piece for level in self._levels for piece in level]:
            if piece.wanted:
                piece.request.future.set_exception(Stopping("The server is stopping."))
        if self._task is not None:
            await self._task
        self._thread.shutdown(wait=True)

    def _enqueue(
        self,
        rows: Rows,
        loop: asyncio.AbstractEventLoop,
        priority: int,
        gone: Callable[[], bool],
    ) -> _Request:
        step = self._max_batch_rows
        slices = [rows[start : start + step] for start in range(0, len(rows), step)]
        request = _Request(
            loop.create_future(),
            [None] * len(slices),
            loop.time(),
            perf_counter_ns(),
            len(slices),
            priority,
            gone,
        )
        self._levels[priority - 1].extend(_Piece(request, i, part) for i, part in enumerate(slices))
        self._waiting[priority - 1] += len(rows)
        if self.queued_rows >= self._max_batch_rows:
            self._full.set()
        if self._task is None:
            self._task = loop.create_task(self._run())
        return request

    def _expire(self, request: _Request, timeout_s: float) -> None:
        if not request.future.done():
            self.counts.expired += 1
            request.future.set_exception(
                DeadlinePassed(
                    f"The deadline of {timeout_s * 1000:.0f} ms passed before the answer was "
                    "there; give more time or send fewer rows."
                )
            )

    def _forget(self, request: _Request) -> None:
        """Take what is left of a finished request out of the queue."""
        if not request.queued_pieces:
            return
        level = self._levels[request.priority - 1]
        for piece in [piece for piece in level if piece.request is request]:
            level.remove(piece)
            self._waiting[request.priority - 1] -= len(piece.rows)

    async def _run(self) -> None:
        """Serve batches until nothing waits."""
        loop = asyncio.get_running_loop()
        try:
            while self.queued_rows:
                pieces = self._take()
                if not pieces:
                    continue
                began_at = loop.time()
                outcome = await loop.run_in_executor(self._thread, self._compute, pieces)
                self._batch_s += RECENT_SHARE * (loop.time() - began_at - self._batch_s)
                self._deliver(pieces, outcome)
                await self._gather_company(loop)
        finally:
            self._task = None

    async def _gather_company(self, loop: asyncio.AbstractEventLoop) -> None:
        """After a batch, wait a little for a fuller one, if somebody waits already."""
        if self._max_wait_s <= 0 or not self.queued_rows:
            return
        oldest = min(level[0].request.arrived_at for level in self._levels if level)
        left_s = oldest + self._max_wait_s - loop.time()
        if left_s <= 0 or self.queued_rows >= self._max_batch_rows:
            return
        self._full.clear()
        try:
            async with asyncio.timeout(left_s):
                await self._full.wait()
        except TimeoutError:
            return

    def _take(self) -> list[_Piece]:
        """The next batch of pieces still wanted: the most urgent first, then the oldest."""
        pieces: list[_Piece] = []
        room, now_ns = self._max_batch_rows, perf_counter_ns()
        for level in self._levels:
            while level and len(level[0].rows) <= room:
                piece = level.popleft()
                piece.request.queued_pieces -= 1
                self._waiting[piece.request.priority - 1] -= len(piece.rows)
                if not self._is_wanted(piece):
                    continue
                pieces.append(piece)
                room -= len(piece.rows)
                if piece.index == 0:
                    self.statistics.queue.add(now_ns - piece.request.arrived_ns)
            if level:
                break
        return pieces

    def _is_wanted(self, piece: _Piece) -> bool:
        if piece.wanted and piece.request.gone():
            self.counts.cancelled += 1
            piece.request.future.set_exception(Abandoned("The client left before its answer."))
        return piece.wanted

    def _compute(self, pieces: list[_Piece]) -> _Outcome:
        """Run the engine on a batch; on an error run each member alone. In the engine's thread."""
        outcome = _Outcome()
        if len(pieces) > 1:
            start_ns = perf_counter_ns()
            try:
                rows = np.concatenate([piece.rows for piece in pieces])
                put_ns = perf_counter_ns()
                joint = self._checked(rows)
                run_ns = perf_counter_ns()
                outcome.answers.extend(_split(joint, pieces))
            except Exception:  # whichever member it was, the others get their answer
                outcome.retried = len(pieces)
            else:
                end_ns = perf_counter_ns()
                times = BatchTimes(put_ns - start_ns, run_ns - put_ns, end_ns - run_ns)
                outcome.calls.append(times)
                return outcome
        for piece in pieces:
            self._solo(piece, outcome)
        return outcome

    def _solo(self, piece: _Piece, outcome: _Outcome) -> None:
        start_ns = perf_counter_ns()
        try:
            outcome.answers.append(self._checked(piece.rows))
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

    def _count(self, pieces: list[_Piece], outcome: _Outcome) -> None:
        self.counts.batches += 1
        self.counts.retried_alone += outcome.retried
        if len(outcome.calls) == 1:
            rows = sum(len(piece.rows) for piece in pieces)
            requests = sum(piece.index == 0 for piece in pieces)
            self.counts.rows += rows
            if not isinstance(outcome.answers[0], Exception):
                self.statistics.executed(rows, requests, outcome.calls[0])
            return
        for piece, answer, times in zip(pieces, outcome.answers, outcome.calls, strict=True):
            self.counts.rows += len(piece.rows)
            if not isinstance(answer, Exception):
                self.statistics.executed(len(piece.rows), int(piece.index == 0), times)

    def _deliver(self, pieces: list[_Piece], outcome: _Outcome) -> None:
        self._count(pieces, outcome)
        for piece, answer in zip(pieces, outcome.answers, strict=True):
            request = piece.request
            if request.future.done():
                continue
            if isinstance(answer, Exception):
                request.future.set_exception(answer)
                continue
            request.parts[piece.index] = answer
            done = [part for part in request.parts if part is not None]
            if len(done) == len(request.parts):
                request.future.set_result(done[0] if len(done) == 1 else np.concatenate(done))


def _split(joint: Answers, pieces: list[_Piece]) -> Iterator[Answers]:
    """Each piece's own answers; slices, since `np.split` takes longer than a small model."""
    start = 0
    for piece in pieces:
        end = start + len(piece.rows)
        yield joint[start:end]
        start = end
