"""Turn single requests into engine batches and back, so that each answer is the one it gets alone.

One task on the event loop forms batches, one thread runs the engine. Size is counted in rows.
While the engine runs, requests gather; what is there when it finishes is the next batch, so a lone
request on an idle engine never waits. A request past its deadline or cancelled never reaches the
engine, and an engine error on a joint batch is retried member by member.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from rayloop.errors import WorkError

Rows = NDArray[np.uint8]
Answers = NDArray[np.float32]


class QueueFull(WorkError):
    """As many rows wait as may."""


class DeadlinePassed(WorkError):
    """The request's time ran out before its answer was there."""


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
    queued_pieces: int


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
    retried: int = 0


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
        self._pending: deque[_Piece] = deque()
        self._queued_rows = 0
        self._full = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.counts = BatcherCounts()

    @property
    def queued_rows(self) -> int:
        """Rows that wait and are still wanted."""
        return self._queued_rows

    async def submit(self, rows: Rows, timeout_s: float) -> Answers:
        """The engine's answers [N, K] to rows [N, ...].

        Args:
            rows: At least one row.
            timeout_s: Seconds from now after which the answer is no longer wanted.

        Raises:
            QueueFull: There is no room for the rows.
            DeadlinePassed: The time ran out first.
            EngineFailed: The engine raises on these rows.
        """
        if timeout_s <= 0:
            self.counts.expired += 1
            raise DeadlinePassed("The deadline had passed on arrival; give more time.")
        if self._queued_rows + len(rows) > self._max_queued_rows:
            raise QueueFull(
                f"{self._queued_rows} rows wait and {len(rows)} more exceed the limit of "
                f"{self._max_queued_rows}; try again shortly."
            )
        loop = asyncio.get_running_loop()
        request = self._enqueue(rows, loop)
        timer = loop.call_later(timeout_s, self._expire, request, timeout_s)
        try:
            return await request.future
        except asyncio.CancelledError:
            self.counts.cancelled += 1
            raise
        finally:
            timer.cancel()
            self._forget(request)

    async def close(self) -> None:
        """Let the batch that runs finish, fail what waits, and stop the thread."""
        for piece in list(self._pending):
            if piece.wanted:
                piece.request.future.set_exception(QueueFull("The server is stopping."))
        if self._task is not None:
            await self._task
        self._thread.shutdown(wait=True)

    def _enqueue(self, rows: Rows, loop: asyncio.AbstractEventLoop) -> _Request:
        step = self._max_batch_rows
        slices = [rows[start : start + step] for start in range(0, len(rows), step)]
        request = _Request(loop.create_future(), [None] * len(slices), loop.time(), len(slices))
        self._pending.extend(_Piece(request, i, part) for i, part in enumerate(slices))
        self._queued_rows += len(rows)
        if self._queued_rows >= self._max_batch_rows:
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
        for piece in [piece for piece in self._pending if piece.request is request]:
            self._pending.remove(piece)
            self._queued_rows -= len(piece.rows)

    async def _run(self) -> None:
        """Serve batches until nothing waits."""
        loop = asyncio.get_running_loop()
        try:
            while self._pending:
                pieces = self._take()
                if not pieces:
                    continue
                outcome = await loop.run_in_executor(self._thread, self._compute, pieces)
                self._deliver(pieces, outcome)
                await self._gather_company(loop)
        finally:
            self._task = None

    async def _gather_company(self, loop: asyncio.AbstractEventLoop) -> None:
        """After a batch, wait a little for a fuller one, if somebody waits already."""
        if self._max_wait_s <= 0 or not self._pending:
            return
        left_s = self._pending[0].request.arrived_at + self._max_wait_s - loop.time()
        if left_s <= 0 or self._queued_rows >= self._max_batch_rows:
            return
        self._full.clear()
        try:
            async with asyncio.timeout(left_s):
                await self._full.wait()
        except TimeoutError:
            return

    def _take(self) -> list[_Piece]:
        """The next batch, oldest first, of pieces that are still wanted."""
        pieces: list[_Piece] = []
        room = self._max_batch_rows
        while self._pending and len(self._pending[0].rows) <= room:
            piece = self._pending.popleft()
            piece.request.queued_pieces -= 1
            self._queued_rows -= len(piece.rows)
            if piece.wanted:
                pieces.append(piece)
                room -= len(piece.rows)
        return pieces

    def _compute(self, pieces: list[_Piece]) -> _Outcome:
        """Run the engine on a batch; on an error run each member alone. In the engine's thread."""
        if len(pieces) > 1:
            try:
                joint = self._checked(np.concatenate([piece.rows for piece in pieces]))
                ends = np.cumsum([len(piece.rows) for piece in pieces])[:-1]
                return _Outcome(list(np.split(joint, ends)))
            except Exception:  # whichever member it was, the others get their answer
                alone = [self._solo(piece) for piece in pieces]
                return _Outcome(alone, retried=len(pieces))
        return _Outcome([self._solo(pieces[0])])

    def _solo(self, piece: _Piece) -> Answers | Exception:
        try:
            return self._checked(piece.rows)
        except Exception as error:  # becomes the answer of this request alone
            failure = EngineFailed(f"The model failed on this input: {str(error)[:200]}")
            failure.__cause__ = error
            return failure

    def _checked(self, rows: Rows) -> Answers:
        answers = self._predict(rows)
        if len(answers) != len(rows):
            raise EngineFailed(f"The engine gave {len(answers)} answers to {len(rows)} rows.")
        return answers

    def _deliver(self, pieces: list[_Piece], outcome: _Outcome) -> None:
        self.counts.batches += 1
        self.counts.retried_alone += outcome.retried
        for piece, answer in zip(pieces, outcome.answers, strict=True):
            self.counts.rows += len(piece.rows)
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
