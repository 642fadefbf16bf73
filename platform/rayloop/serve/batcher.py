"""Turn single requests into engine batches and back, so that each answer is the one it gets alone.

Requests queue on the event loop; the engine's thread fetches its batches itself. Size is counted
in rows. While the engine runs, requests gather; what is there when it finishes is the next batch,
so a lone request on an idle engine never waits. A more urgent request goes before all less urgent
ones that wait. A request past its deadline or cancelled never reaches the engine, and an engine
error on a joint batch is retried member by member.
"""

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from math import nan
from time import perf_counter_ns

import numpy as np

from rayloop.errors import WorkError
from rayloop.serve.execution import Answers, EngineThread, Outcome, Rows
from rayloop.serve.statistics import VersionStatistics

PRIORITY_LEVELS, DEFAULT_PRIORITY = 3, 2
"""Priorities go from 1, the most urgent, to `PRIORITY_LEVELS`."""

RECENT_SHARE = 0.2
"""Weight of the newest batch in the time that a batch takes."""


class QueueFull(WorkError):
    """As many rows wait as may."""


class DeadlinePassed(WorkError):
    """The request's time ran out before its answer was there."""


class Abandoned(WorkError):
    """Nobody waits for the answer any more."""


class Stopping(WorkError):
    """The server, or this version in it, is being stopped."""


@dataclass(slots=True)
class BatcherCounts:
    """What a batcher has done since it was made."""

    batches: int = 0
    rows: int = 0
    expired: int = 0
    cancelled: int = 0
    retried_alone: int = 0


@dataclass(slots=True)
class RequestTimes:
    """Where the time of one request went; of a split request, that of its last part."""

    queue_ms: float = nan
    """From its arrival to the start of its batch; NaN before."""

    engine_ms: float = nan
    """Of its batch in the engine."""


@dataclass(slots=True, eq=False)
class _Request:
    future: asyncio.Future[Answers]
    parts: list[Answers | None]
    arrived_ns: int
    queued_pieces: int
    priority: int
    gone: Callable[[], bool]
    times: RequestTimes | None


@dataclass(slots=True, eq=False)
class _Piece:
    request: _Request
    index: int
    rows: Rows

    @property
    def wanted(self) -> bool:
        return not self.request.future.done()


@dataclass(frozen=True, slots=True)
class _Batch:
    pieces: list[_Piece]
    left: list[_Piece]
    """Of requests whose clients have gone."""

    taken_ns: int


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
        self._max_batch_rows = max_batch_rows
        self.limit(max_wait_s, max_queued_rows)
        self._loop: asyncio.AbstractEventLoop
        self._levels: tuple[deque[_Piece], ...] = tuple(deque() for _ in range(PRIORITY_LEVELS))
        self._waiting = [0] * PRIORITY_LEVELS
        self._batch_s = 0.0
        self._unfinished = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._changed = threading.Condition(threading.Lock())
        self._wake_at_rows = self._free_ns = 0
        self._stopped = self._closing = self._has_run = False
        self.counts = BatcherCounts()
        self.statistics = VersionStatistics()
        self._engine = EngineThread(predict, self._take, self._tell)

    def limit(self, max_wait_s: float, max_queued_rows: int) -> None:
        """Change how long a batch waits for company, and how much may wait; rows that wait stay."""
        self._max_wait_s = max_wait_s
        self._max_queued_rows = max_queued_rows

    @property
    def queued_rows(self) -> int:
        """Rows that wait and are still wanted."""
        return sum(self._waiting)

    @property
    def queued_requests(self) -> int:
        """Requests of which at least a part waits."""
        with self._changed:
            return len({id(piece.request) for level in self._levels for piece in level})

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
        times: RequestTimes | None = None,
    ) -> Answers:
        """The engine's answers [N, K] to rows [N, ...].

        Args:
            rows: At least one row.
            timeout_s: Seconds from now after which the answer is no longer wanted.
            priority: 1 (most urgent) to `PRIORITY_LEVELS`.
            gone: Asked before the engine gets the rows: whether nobody waits any more.
            times: Filled in before the answer is given.

        Raises:
            Abandoned: Nobody waits any more.
            Stopping: The batcher is being closed.
            QueueFull: There is no room for the rows.
            DeadlinePassed: The time ran out first.
            EngineFailed: The engine raises on these rows.
        """
        if self._closing:
            raise Stopping("The server is stopping.")
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
        self._loop = asyncio.get_running_loop()  # a batcher may be made in another thread
        request = self._enqueue(rows, priority, gone, times)
        timer = self._loop.call_later(timeout_s, self._expire, request, timeout_s)
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
        self._closing = True
        await self._idle.wait()
        await self._stop_engine()

    async def close(self) -> None:
        """Let the batch that runs finish, fail what waits, and stop the thread."""
        self._closing = True
        with self._changed:
            waiting = [piece for level in self._levels for piece in level]
        for piece in waiting:
            if piece.wanted:
                piece.request.future.set_exception(Stopping("The server is stopping."))
        await self._idle.wait()
        await self._stop_engine()

    async def _stop_engine(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify()
        await asyncio.to_thread(self._engine.join)

    def _enqueue(
        self, rows: Rows, priority: int, gone: Callable[[], bool], times: RequestTimes | None
    ) -> _Request:
        step = self._max_batch_rows
        slices = [rows[start : start + step] for start in range(0, len(rows), step)]
        request = _Request(
            self._loop.create_future(),
            [None] * len(slices),
            perf_counter_ns(),
            len(slices),
            priority,
            gone,
            times,
        )
        pieces = [_Piece(request, i, part) for i, part in enumerate(slices)]
        self._engine.start()
        self._unfinished += len(pieces)
        self._idle.clear()
        with self._changed:
            self._levels[priority - 1].extend(pieces)
            self._waiting[priority - 1] += len(rows)
            if self._wake_at_rows and self.queued_rows >= self._wake_at_rows:
                self._changed.notify()
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
        with self._changed:
            left = [piece for piece in level if piece.request is request]
            for piece in left:
                level.remove(piece)
                self._waiting[request.priority - 1] -= len(piece.rows)
        self._finished(len(left))

    def _take(self) -> tuple[_Batch, list[Rows]] | None:
        """The engine's next batch, once there is one; None at the end. In the engine's thread."""
        with self._changed:
            if self._has_run:
                self._wait_for_company()
            while not self.queued_rows and not self._stopped:
                self._wait(1, None)
            if self._stopped:
                return None
            batch = _Batch([], [], perf_counter_ns())
            self._fill(batch)
            self._has_run = True
        return batch, [piece.rows for piece in batch.pieces]

    def _wait(self, rows: int, seconds: float | None) -> None:
        self._wake_at_rows = rows
        self._changed.wait(seconds)
        self._wake_at_rows = 0

    def _wait_for_company(self) -> None:
        """Right after a batch, wait a little for a fuller one, if somebody waits already."""
        while 0 < self.queued_rows < self._max_batch_rows and not self._stopped:
            oldest_ns = min(level[0].request.arrived_ns for level in self._levels if level)
            if oldest_ns >= self._free_ns:  # it found an idle engine
                return
            left_s = self._max_wait_s - (perf_counter_ns() - oldest_ns) / 1e9
            if left_s <= 0:
                return
            self._wait(self._max_batch_rows, left_s)

    def _fill(self, batch: _Batch) -> None:
        """Move pieces still wanted into a batch: the most urgent first, then the oldest."""
        room = self._max_batch_rows
        for level in self._levels:
            while level and len(level[0].rows) <= room:
                piece = level.popleft()
                piece.request.queued_pieces -= 1
                self._waiting[piece.request.priority - 1] -= len(piece.rows)
                if piece.wanted and not piece.request.gone():
                    batch.pieces.append(piece)
                    room -= len(piece.rows)
                else:
                    batch.left.append(piece)
            if level:
                break

    def _tell(self, batch: _Batch, outcome: Outcome) -> None:
        """In the engine's thread."""
        self._free_ns = perf_counter_ns()
        with suppress(RuntimeError):  # the loop is closed, and nobody waits any more
            self._loop.call_soon_threadsafe(self._deliver, batch, outcome)

    def _finished(self, pieces: int) -> None:
        self._unfinished -= pieces
        if not self._unfinished:
            self._idle.set()

    def _count(self, batch: _Batch, outcome: Outcome) -> None:
        pieces = batch.pieces
        self._batch_s += RECENT_SHARE * (outcome.seconds - self._batch_s)
        for piece in pieces:
            if piece.index == 0:
                self.statistics.queue.add(batch.taken_ns - piece.request.arrived_ns)
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

    def _deliver(self, batch: _Batch, outcome: Outcome) -> None:
        for piece in batch.left:
            self._leave(piece)
        if batch.pieces:
            self._count(batch, outcome)
        for piece, answer in zip(batch.pieces, outcome.answers, strict=True):
            request = piece.request
            if request.future.done():
                continue
            if request.times is not None:
                request.times.queue_ms = (batch.taken_ns - request.arrived_ns) / 1e6
                request.times.engine_ms = outcome.seconds * 1000
            if isinstance(answer, Exception):
                request.future.set_exception(answer)
                continue
            request.parts[piece.index] = answer
            done = [part for part in request.parts if part is not None]
            if len(done) == len(request.parts):
                request.future.set_result(done[0] if len(done) == 1 else np.concatenate(done))
        self._finished(len(batch.pieces) + len(batch.left))

    def _leave(self, piece: _Piece) -> None:
        if piece.wanted:
            self.counts.cancelled += 1
            piece.request.future.set_exception(Abandoned("The client left before its answer."))
