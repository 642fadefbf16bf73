"""Turn the prediction events of one replica into Parquet files without slowing its requests.

`put` only appends to a queue. A thread of low priority empties it a few times a second: it reduces
images to statistics, gathers the rows and writes a file every few seconds. Where it cannot keep
up, events are dropped and counted; nobody waits.
"""

import contextlib
import os
import sys
import threading
import time
from collections import deque

from rayloop.clock import Clock
from rayloop.config import EventsConfig
from rayloop.errors import WorkError
from rayloop.logs import stage_logger
from rayloop.serve.events.event import PredictionEvent
from rayloop.serve.events.files import DAY_S, day_of, prune
from rayloop.serve.events.table import Embed
from rayloop.serve.events.writer import EventWriter
from rayloop.storage import Storage

log = stage_logger("serve")

WAKE_S = 0.5
"""Longest pause between two looks at the queue, and so how long images are held."""

SLICE_ROWS, SLICE_BYTES = 1024, 1 << 20
"""Rows and bytes that are reduced at once. Larger slices cost less for each event, and hold the
interpreter longer while the event loop waits: about two milliseconds, twice a second."""

PAUSE_S = 0.001
"""Sleep after each slice, in which the event loop takes its turn."""

NICENESS = 10
CLOSE_TRIES, CLOSE_PAUSE_S = 3, 0.2


class EventLog:
    """Appends events to `events/` in the background, from its making to `close`.

    A process that is killed loses what waits, at most `flush_s` of it. One that ends in good order
    calls `close` and loses nothing.

    Attributes:
        requests: Events that `put` was given, also those it dropped.

    Args:
        storage: Gets the files.
        config: Times, limits and shares.
        writer: First half, 16 hexadecimal digits, of all prediction ids of this replica. It is in
            the names of files, so an event with another one could not be found by its id.
        clock: For dates, ages and retries.
        embed: Computes embeddings float32 [N, D] of images uint8 [N, H, W, C] by the version that
            answered them (the assigned one where none did), in this log's thread; where it raises,
            events go without. None keeps none.
    """

    def __init__(
        self,
        storage: Storage,
        config: EventsConfig,
        writer: str,
        clock: Clock,
        embed: Embed | None = None,
    ) -> None:
        self._storage, self._config, self._clock = storage, config, clock
        self._max_rows, self._max_bytes = config.max_pending_rows, config.max_pending_bytes
        self._wake_s = min(WAKE_S, config.flush_s / 4)
        patience_s = config.flush_s - 2 * self._wake_s
        self._writer = EventWriter(storage, config, writer, clock, embed, patience_s)
        self._events: deque[PredictionEvent] = deque()
        # Taken by whoever puts, and never by the thread of low priority: nobody waits for it.
        self._door = threading.Lock()
        self._turn = threading.Lock()
        self._stop = threading.Event()
        self._closed = False
        self._accepted_rows = self._accepted_bytes = self._reduced_bytes = self._refused = 0
        self.requests = 0
        self._writer.warm()
        self._thread = threading.Thread(target=self._run, name="rayloop-events", daemon=True)
        self._thread.start()

    @property
    def written(self) -> int:
        """Rows that are in files."""
        return self._writer.written

    @property
    def dropped(self) -> int:
        """Rows that are in no file and never will be."""
        return self._refused + self._writer.lost

    @property
    def pending(self) -> int:
        """Rows that were accepted and are in no file yet."""
        return self._accepted_rows - self._writer.written - self._writer.lost

    @property
    def failed_writes(self) -> int:
        """Writes that storage refused; their rows are kept and tried again."""
        return self._writer.failed_writes

    def put(self, event: PredictionEvent) -> None:
        """Take an event, or drop and count it when too much waits; about a microsecond."""
        writer, rows, num_bytes = self._writer, len(event.images), _bytes_of(event)
        with self._door:
            self.requests += 1
            waiting = self._accepted_rows - writer.written - writer.lost
            held_bytes = self._accepted_bytes - self._reduced_bytes + writer.gathered_bytes
            if (
                waiting + rows > self._max_rows
                or held_bytes + num_bytes > self._max_bytes
                or self._closed
            ):
                self._refused += rows
                return
            self._accepted_rows += rows
            self._accepted_bytes += num_bytes
            self._events.append(event)

    def holds(self, prediction_id: str) -> bool:
        """Whether a prediction was accepted and is in no file yet.

        Ask this first and the files after it: what is not held any more is in them.
        """
        waiting = any(event.prediction_id == prediction_id for event in list(self._events))
        return waiting or self._writer.holds(prediction_id)

    def flush(self) -> None:
        """Wait until everything accepted until now is in files; not to be called on an event loop.

        Raises:
            WorkError: Storage refuses; the rows are kept and tried again.
        """
        with self._turn:
            self._drain()
            error = self._writer.write()
        if isinstance(error, WorkError):
            raise error
        if error is not None:
            raise WorkError(
                f"Events cannot be written to {self._storage.root} ({error!r}); they are kept and "
                "tried again."
            ) from error

    def close(self) -> None:
        """Write what was accepted and stop the thread; events put later are dropped and counted.

        What storage refuses until the end is counted as dropped and logged.
        """
        with self._door:
            self._closed = True
        self._stop.set()
        self._thread.join()
        with self._turn:
            self._drain()
            for attempt in range(CLOSE_TRIES):
                if self._writer.write() is None:
                    return
                if attempt + 1 < CLOSE_TRIES:
                    time.sleep(CLOSE_PAUSE_S)
            log.error("%d rows of events are lost: storage refused them.", self._writer.give_up())

    def _run(self) -> None:
        _lower_priority()
        pruned_on = None
        while True:
            today = day_of(self._clock.now())
            if today != pruned_on:
                pruned_on = today
                self._prune()
            if self._stop.wait(self._wake_s):
                return
            try:
                with self._turn:
                    self._drain()
                    self._writer.write_if_due()
            except Exception as error:  # the thread must live on, whatever it was
                self._writer.complain_once("Events cannot be gathered: %r", error)

    def _drain(self) -> None:
        """Turn what is in the queue now into rows, a slice at a time."""
        left = len(self._events)
        while left > 0:
            events, num_bytes = self._slice(left)
            self._writer.take(events)
            # Only now, so that an event is always in the queue or among the rows.
            for _ in events:
                self._events.popleft()
            self._reduced_bytes += num_bytes
            left -= len(events)
            time.sleep(PAUSE_S)

    def _slice(self, most: int) -> tuple[list[PredictionEvent], int]:
        """The oldest events of the queue, which stay there, and how many bytes they hold."""
        events: list[PredictionEvent] = []
        rows = num_bytes = 0
        while len(events) < most and rows < SLICE_ROWS and num_bytes < SLICE_BYTES:
            event = self._events[len(events)]
            events.append(event)
            rows += len(event.images)
            num_bytes += _bytes_of(event)
        return events, num_bytes

    def _prune(self) -> None:
        """Remove what is older than `retention_days`."""
        if not self._config.retention_days:
            return
        oldest = day_of(self._clock.now() - self._config.retention_days * DAY_S)
        try:
            removed = prune(self._storage, oldest)
        except Exception as error:  # it is tried again tomorrow; events matter more
            log.warning("Events older than %s cannot be removed: %r", oldest, error)
            return
        if removed:
            log.info("Removed %d folders of events older than %s.", removed, oldest)


def _bytes_of(event: PredictionEvent) -> int:
    """The memory that an event keeps from being freed."""
    answer = event.probabilities
    return event.images.nbytes + (0 if answer is None else answer.nbytes)


def _lower_priority() -> None:
    """Let the requests' threads go first on a machine that is busy; only Linux can say it."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
