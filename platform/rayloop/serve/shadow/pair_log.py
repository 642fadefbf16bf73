"""Turn what a shadow said beside the live version into files that a paired comparison can read."""

from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa

from rayloop.clock import Clock
from rayloop.logs import stage_logger
from rayloop.serve.events.files import SHADOWS, day_folder, day_of
from rayloop.serve.events.table import to_parquet
from rayloop.serve.shadow.shadow import Pair
from rayloop.storage import Storage

log = stage_logger("serve")

FLUSH_S, FLUSH_ROWS = 5.0, 50_000
"""A file is written after so long, or so many rows."""

SCHEMA = pa.schema(
    [
        ("prediction_id", pa.string()),
        ("row", pa.int32()),
        ("time", pa.timestamp("us", tz="UTC")),
        ("live_version", pa.string()),
        ("shadow_version", pa.string()),
        ("live_class_index", pa.int32()),
        ("shadow_class_index", pa.int32()),
        ("live_confidence", pa.float32()),
        ("shadow_confidence", pa.float32()),
        ("largest_difference", pa.float32()),
        ("live_latency_ms", pa.float32()),
        ("shadow_batch_ms", pa.float32()),
    ]
)
"""A row for each image that both answered; the join with events and labels is by prediction and
row."""


class PairLog:
    """Writes the pairs of one shadow; used in its thread alone.

    Args:
        storage: Gets `shadows/date=YYYY-MM-DD/*.parquet`.
        writer: First half of this replica's prediction ids, for the files' names.
        clock: For dates and ages.
    """

    def __init__(self, storage: Storage, writer: str, clock: Clock) -> None:
        self._storage, self._writer, self._clock = storage, writer, clock
        self._tables: list[pa.Table] = []
        self._rows = self._files = 0
        self._since = clock.monotonic()

    def add(self, version: str, pairs: list[Pair]) -> None:
        """Take pairs, and write a file when it is time."""
        if not self._tables:
            self._since = self._clock.monotonic()
        table = pair_table(version, pairs, self._clock.now())
        self._tables.append(table)
        self._rows += table.num_rows
        if self._rows >= FLUSH_ROWS or self._clock.monotonic() - self._since >= FLUSH_S:
            self.flush()

    def flush(self) -> None:
        """Write what there is; pairs that storage refuses are lost and told."""
        if not self._tables:
            return
        now = self._clock.now()
        version = self._tables[0]["shadow_version"][0].as_py()
        self._files += 1
        stamp = datetime.fromtimestamp(now, UTC).strftime("%H%M%S")
        name = f"{stamp}-{self._writer}-version-{version}-{self._files:06d}.parquet"
        content = to_parquet(pa.concat_tables(self._tables)).to_pybytes()
        try:
            self._storage.write(f"{day_folder(SHADOWS, day_of(now))}/{name}", content)
        except Exception as error:  # a shadow must not end because a disk is full
            log.error("%d rows of shadow version %s are lost: %s", self._rows, version, error)
        self._tables, self._rows = [], 0


def pair_table(version: str, pairs: list[Pair], now: float) -> pa.Table:
    """Pairs as rows of `SCHEMA`.

    Args:
        version: The shadow's.
        pairs: At least one.
        now: Seconds since the epoch.
    """
    live = np.concatenate([pair.copy.probabilities for pair in pairs])
    shadow = np.concatenate([pair.probabilities for pair in pairs])
    sizes = [len(pair.copy.images) for pair in pairs]
    total = len(live)

    def spread(values: list[Any]) -> list[Any]:
        return [value for value, size in zip(values, sizes, strict=True) for _ in range(size)]

    columns = {
        "prediction_id": spread([pair.copy.prediction_id for pair in pairs]),
        "row": [row for size in sizes for row in range(size)],
        "time": [datetime.fromtimestamp(now, UTC)] * total,
        "live_version": spread([pair.copy.live_version for pair in pairs]),
        "shadow_version": [version] * total,
        "live_class_index": live.argmax(axis=1),
        "shadow_class_index": shadow.argmax(axis=1),
        "live_confidence": live.max(axis=1),
        "shadow_confidence": shadow.max(axis=1),
        "largest_difference": np.abs(live - shadow).max(axis=1),
        "live_latency_ms": spread([pair.copy.latency_ms for pair in pairs]),
        "shadow_batch_ms": spread([pair.latency_ms for pair in pairs]),
    }
    return pa.table(columns, schema=SCHEMA)
