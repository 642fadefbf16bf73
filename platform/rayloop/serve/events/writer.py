"""Turn prediction events into rows, gather the rows, and write them as files of one date each.

A file is sealed before it is written: its name and bytes stay as they are until storage has taken
them. So a write that reports an error and yet happened is repeated, never doubled.
"""

import math
from dataclasses import dataclass
from datetime import date

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from rayloop.clock import Clock
from rayloop.config import EventsConfig
from rayloop.errors import RayloopError
from rayloop.logs import stage_logger
from rayloop.serve.events.event import PredictionEvent
from rayloop.serve.events.files import DAY_S, day_of, event_path
from rayloop.serve.events.table import Embed, Images, event_table, to_parquet
from rayloop.storage import Storage

log = stage_logger("serve")

FILE_ROWS = 16_384
FILE_BYTES = 32 << 20
"""A file is written before its time once it would have so many rows, or bytes in memory."""

FIRST_RETRY_S, LAST_RETRY_S = 1.0, 60.0
"""Pause after a write that failed; it doubles up to the second number."""


_EXAMPLE = PredictionEvent(
    prediction_id="0" * 32,
    time=0.0,
    model="",
    plan=0,
    unit="",
    variant="",
    assigned_version="",
    forced=False,
    status=200,
    images=np.zeros((2, 1, 1, 1), np.uint8),
    probabilities=np.ones((2, 1), np.float32),
    decisions=("accept", "accept"),
    versions=(),
    latency_ms=0.0,
    queue_ms=0.0,
    engine_ms=0.0,
)
"""An event of no request."""


@dataclass(frozen=True, slots=True)
class Part:
    """Rows of one date that are in no file yet."""

    day: date
    table: pa.Table
    taken_at: float
    """Monotonic seconds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sealed:
    """A file that storage has not taken yet."""

    path: str
    content: pa.Buffer
    ids: pa.ChunkedArray
    num_bytes: int
    """What its rows take in memory, as they were counted when they were gathered."""


class EventWriter:
    """Gathers the rows of one replica and writes them; one thread at a time may call it.

    Attributes:
        written: Rows in files.
        lost: Rows that could not be made or were given up.
        failed_writes: Writes that storage refused.
        gathered_rows: Rows that are in no file yet.
        gathered_bytes: What they take in memory.

    Args:
        storage: Gets the files.
        config: Times, limits and shares.
        writer: First half of the replica's prediction ids.
        clock: For ages and retries.
        embed: Computes embeddings by a version; None keeps none.
        patience_s: Age in seconds at which the oldest gathered row is due; None means
            `config.flush_s`.
    """

    def __init__(
        self,
        storage: Storage,
        config: EventsConfig,
        writer: str,
        clock: Clock,
        embed: Embed | None = None,
        patience_s: float | None = None,
    ) -> None:
        self._storage, self._config, self._writer, self._clock = storage, config, writer, clock
        self._embedder = embed
        self._patience_s = config.flush_s if patience_s is None else patience_s
        self._file_rows = max(1, min(FILE_ROWS, config.max_pending_rows // 2))
        self._file_bytes = min(FILE_BYTES, config.max_pending_bytes // 2)
        self._parts: list[Part] = []
        self._sealed: list[Sealed] = []
        self._retry_s, self._retry_at = 0.0, -math.inf
        self._complaints: set[str] = set()
        self.written = self.lost = self.failed_writes = 0
        self.gathered_rows = self.gathered_bytes = 0

    def warm(self) -> None:
        """Do once what takes half a second the first time, mostly pyarrow's search for pandas."""
        self._file(event_table([_EXAMPLE], EventsConfig(), self._embed), 0)

    def take(self, events: list[PredictionEvent]) -> None:
        """Gather the rows of some events; one that contradicts itself is lost, the others not."""
        by_day: dict[float, list[PredictionEvent]] = {}
        for event in events:
            by_day.setdefault(event.time // DAY_S, []).append(event)
        for group in by_day.values():
            try:
                self._gather(group)
            except Exception:  # which one it is shows when each is taken alone
                for event in group:
                    self._take_alone(event)

    def _take_alone(self, event: PredictionEvent) -> None:
        try:
            self._gather([event])
        except Exception as error:
            self.lost += len(event.images)
            self.complain_once("Event %s is lost: %r", event.prediction_id, error)

    def _gather(self, events: list[PredictionEvent]) -> None:
        """Make the rows of events of one date."""
        day, table = day_of(events[0].time), event_table(events, self._config, self._embed)
        self._parts.append(Part(day, table, self._clock.monotonic()))
        self.gathered_rows += table.num_rows
        self.gathered_bytes += table.get_total_buffer_size()

    def _embed(self, version: str, images: Images) -> NDArray[np.float32] | None:
        """Embeddings, or none where the embedder fails: an event is worth more than its extras."""
        if self._embedder is None:
            return None
        try:
            found = self._embedder(version, images)
            if found is not None and len(found) != len(images):
                raise ValueError(f"{len(images)} images have {len(found)} embeddings")
        except Exception as error:
            self.complain_once("Events of version %s go without embeddings: %r", version, error)
            return None
        return found

    def write_if_due(self) -> None:
        """Write what is gathered when it is old, much, or of two dates; never raises."""
        now = self._clock.monotonic()
        if now >= self._retry_at and (self._sealed or self._is_due(now)):
            self.write()

    def _is_due(self, now: float) -> bool:
        return bool(self._parts) and (
            now - self._parts[0].taken_at >= self._patience_s
            or self.gathered_rows >= self._file_rows
            or self.gathered_bytes >= self._file_bytes
            or self._parts[0].day != self._parts[-1].day
        )

    def write(self) -> Exception | None:
        """Write all that is gathered.

        Returns:
            Why it could not be written, or None. What is not written is kept.
        """
        try:
            self._write_sealed()
            self._seal()
            self._write_sealed()
        except Exception as error:  # storage of any kind fails in ways of its own
            self._note_failure(error)
            return error
        if self._retry_s:
            log.info("Events are written again.")
        self._retry_s, self._retry_at = 0.0, -math.inf
        return None

    def _seal(self) -> None:
        """Make the files of what is gathered, one for each date."""
        files = []
        for day in sorted({part.day for part in self._parts}):
            tables = [part.table for part in self._parts if part.day == day]
            num_bytes = sum(table.get_total_buffer_size() for table in tables)
            files.append(self._file(pa.concat_tables(tables), num_bytes))
        # In this order: whoever asks what is held looks at the parts first.
        self._sealed = files
        self._parts = []

    def _file(self, table: pa.Table, num_bytes: int) -> Sealed:
        ids = table["prediction_id"]
        limits = pc.min_max(ids).as_py()
        began_at = pc.min(table["time"]).value / 1e6
        first, last = limits["min"][16:], limits["max"][16:]
        return Sealed(
            path=event_path(began_at, self._writer, first, last),
            content=to_parquet(table.combine_chunks()),
            ids=ids,
            num_bytes=num_bytes,
        )

    def _write_sealed(self) -> None:
        while self._sealed:
            file = self._sealed[0]
            self._storage.write(file.path, file.content.to_pybytes())
            self.written += len(file.ids)
            self.gathered_rows -= len(file.ids)
            self.gathered_bytes -= file.num_bytes
            del self._sealed[0]

    def _note_failure(self, error: Exception) -> None:
        self.failed_writes += 1
        if not self._retry_s:
            why = error if isinstance(error, RayloopError) else repr(error)
            log.warning(
                "Events cannot be written and are kept in memory, at most %d rows, and tried "
                "again: %s",
                self._config.max_pending_rows,
                why,
            )
        self._retry_s = min(LAST_RETRY_S, 2 * self._retry_s) or FIRST_RETRY_S
        self._retry_at = self._clock.monotonic() + self._retry_s

    def holds(self, prediction_id: str) -> bool:
        """Whether rows of a prediction are in no file yet; any thread may ask."""
        columns = [part.table["prediction_id"] for part in [*self._parts]]
        columns += [file.ids for file in [*self._sealed]]
        return any(pc.any(pc.equal(ids, prediction_id)).as_py() for ids in columns)

    def give_up(self) -> int:
        """Count all that is gathered as lost.

        Returns:
            How many rows that were.
        """
        rows, self._parts, self._sealed = self.gathered_rows, [], []
        self.lost += rows
        self.gathered_rows = self.gathered_bytes = 0
        return rows

    def complain_once(self, message: str, *values: object) -> None:
        """Log the first message of a kind; thousands would follow."""
        if message not in self._complaints:
            self._complaints.add(message)
            log.warning(message, *values)
