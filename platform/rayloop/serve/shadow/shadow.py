"""Turn copies of answered requests into a comparison with a version that answers nobody.

The version runs in a process of its own, at the lowest priority the system has: it may crash, hang
or eat memory, and takes only the CPU that nobody else wants. A copy waits in a bounded queue and is
dropped and counted when that is full.
"""

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from rayloop.clock import Clock
from rayloop.logs import stage_logger
from rayloop.serve.counts import LatencyHistogram
from rayloop.serve.execution import Answers, Rows

log = stage_logger("serve")

GATHER_S = 0.1
"""Pause between two batches of a queue that is not full, so that batches are worth their cost."""

IDLE_S = 5.0
"""After so long without a copy, what was compared is handed on."""

FIRST_BACKOFF_S, LONGEST_BACKOFF_S = 1.0, 60.0
"""Pauses before a process that was lost is started again; each is twice the one before."""


@dataclass(frozen=True, slots=True)
class Copy:
    """A request that was answered."""

    prediction_id: str
    images: Rows
    """uint8 [N, H, W, C]."""

    probabilities: Answers
    """float32 [N, K], what the live version said."""

    live_version: str
    latency_ms: float
    """Of the live answer."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A copy with the shadow's answer."""

    copy: Copy
    probabilities: Answers
    latency_ms: float
    """Of the shadow's batch, without the time in the queue."""


@dataclass(slots=True)
class ShadowCounts:
    """What became of the copies, in rows, since the shadow was planned."""

    compared: int = 0
    agreed: int = 0
    """Of the compared: rows with the same class."""

    dropped: int = 0
    failed: int = 0
    """Rows lost because the process crashed, hung or raised."""

    not_finite: int = 0
    """Rows answered with NaN or infinity; they are not compared."""

    restarts: int = 0
    largest_difference: float = 0.0
    """Of a probability, 0..1."""

    latency: LatencyHistogram = field(default_factory=LatencyHistogram)


class ShadowEngine(Protocol):
    """A model that can be asked, and stopped whatever it does."""

    def predict(self, images: Rows) -> Answers:
        """Probabilities [N, K] of images [N, H, W, C].

        Raises:
            ShadowLost: The process crashed, hung or raised; it has to be started again.
        """
        ...

    def stop(self) -> None:
        """End it now."""
        ...


class Keeper(Protocol):
    """What keeps the pairs of one shadow; called in its thread alone."""

    def add(self, version: str, pairs: list[Pair]) -> None:
        """Take pairs."""
        ...

    def flush(self) -> None:
        """Nothing more will come."""
        ...


class ShadowLost(Exception):
    """The shadow's process is gone, or does not answer."""


class Shadow:
    """One version that watches.

    Args:
        version: Its number.
        start: Starts its process; called in this object's thread.
        clock: Measures its batches.
        max_batch_rows: Most rows it gets at once.
        max_pending_rows: Rows that may wait for it.
        keeper: Gets what was compared; None keeps counts only.
    """

    def __init__(
        self,
        version: str,
        start: Callable[[], ShadowEngine],
        clock: Clock,
        *,
        max_batch_rows: int,
        max_pending_rows: int,
        keeper: Keeper | None = None,
    ) -> None:
        self.version = version
        self.counts = ShadowCounts()
        self._start, self._clock, self._keeper = start, clock, keeper
        self._max_batch_rows, self._max_pending_rows = max_batch_rows, max_pending_rows
        self._pending: deque[Copy] = deque()
        self._taken_rows = self._offered_rows = 0
        self._wake, self._stopping = threading.Event(), threading.Event()
        self._engine: ShadowEngine | None = None
        self._thread = threading.Thread(target=self._work, name=f"shadow-{version}", daemon=True)
        self._thread.start()

    @property
    def pending_rows(self) -> int:
        """Rows that wait."""
        return self._offered_rows - self._taken_rows

    def offer(self, copy: Copy) -> None:
        """Put a copy into the queue, or drop it; never waits. Called by one thread alone."""
        rows = len(copy.images)
        if self._stopping.is_set() or self.pending_rows + rows > self._max_pending_rows:
            self.counts.dropped += rows
            return
        self._offered_rows += rows
        self._pending.append(copy)
        if not self._wake.is_set():
            self._wake.set()

    def close(self) -> None:
        """Stop the process; what waits is dropped."""
        self._stopping.set()
        self._wake.set()
        if self._engine is not None:
            self._engine.stop()
        self._thread.join(5.0)

    def _work(self) -> None:
        backoff_s = FIRST_BACKOFF_S
        while not self._stopping.is_set():
            try:
                compared = self.counts.compared
                self._engine = self._start()
                self._compare_until_stopped(self._engine)
            except Exception as error:  # whatever it is, the shadow starts again
                if not self._stopping.is_set():
                    self.counts.restarts += 1
                    log.warning("shadow version %s: %s", self.version, error)
                if self.counts.compared > compared:
                    backoff_s = FIRST_BACKOFF_S
            finally:
                if self._engine is not None:
                    self._engine.stop()
            self._stopping.wait(backoff_s)
            backoff_s = min(2 * backoff_s, LONGEST_BACKOFF_S)
        if self._keeper is not None:
            self._keeper.flush()

    def _compare_until_stopped(self, engine: ShadowEngine) -> None:
        while not self._stopping.is_set():
            if not self._pending:
                self._wake.clear()
                if not self._pending and not self._wake.wait(IDLE_S) and self._keeper:
                    self._keeper.flush()
                continue
            if self.pending_rows < self._max_batch_rows:
                self._stopping.wait(GATHER_S)
            self._compare(engine, self._batch())

    def _batch(self) -> list[Copy]:
        rows = 0
        copies: list[Copy] = []
        while self._pending and (
            not copies or rows + len(self._pending[0].images) <= self._max_batch_rows
        ):
            copy = self._pending.popleft()
            rows += len(copy.images)
            copies.append(copy)
        self._taken_rows += rows
        return copies

    def _compare(self, engine: ShadowEngine, copies: list[Copy]) -> None:
        counts = self.counts
        images = np.concatenate([copy.images for copy in copies])
        start = self._clock.monotonic()
        try:
            answers = engine.predict(images)
        except ShadowLost:
            counts.failed += len(images)
            raise
        latency_ms = (self._clock.monotonic() - start) * 1000
        live = np.concatenate([copy.probabilities for copy in copies])
        if answers.shape != live.shape:
            counts.failed += len(images)
            raise ShadowLost(f"it answered {answers.shape} where {live.shape} was asked for")
        finite = np.isfinite(answers).all(axis=1)
        counts.not_finite += int((~finite).sum())
        counts.compared += int(finite.sum())
        counts.agreed += int((answers.argmax(axis=1) == live.argmax(axis=1))[finite].sum())
        if finite.any():
            largest = float(np.abs(answers[finite] - live[finite]).max())
            counts.largest_difference = max(counts.largest_difference, largest)
        counts.latency.add(latency_ms)
        if self._keeper is not None and finite.all():
            self._keeper.add(self.version, _pairs(copies, answers, latency_ms))


def _pairs(copies: list[Copy], answers: NDArray[np.float32], latency_ms: float) -> list[Pair]:
    found, start = [], 0
    for copy in copies:
        end = start + len(copy.images)
        found.append(Pair(copy, answers[start:end], latency_ms))
        start = end
    return found
