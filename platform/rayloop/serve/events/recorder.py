"""Turn answered requests into events, and what is said about them later into labels."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayloop.clock import Clock
from rayloop.config import EventsConfig
from rayloop.serve.events.embedding import Embedder
from rayloop.serve.events.feedback import parse_feedback, record
from rayloop.serve.events.labels import LabelStore
from rayloop.serve.events.log import EventLog
from rayloop.serve.events.store import EventStore
from rayloop.storage import Storage

EMBEDDERS = 4
"""Versions whose embedders are kept."""

FlushOthers = Callable[[str], Awaitable[None]]
"""Let the replica that made a prediction write what it holds."""


async def nobody_else(prediction_id: str) -> None:
    """The other replicas of a server that has one."""


class Recorder:
    """What one replica remembers.

    Args:
        storage: Gets events and labels.
        config: What is kept, and for how long.
        writer: First half of this replica's prediction ids.
        clock: Stamps.
        embedder: Makes what computes embeddings for a version; asked once for each.
    """

    def __init__(
        self,
        storage: Storage,
        config: EventsConfig,
        writer: str,
        clock: Clock,
        embedder: Callable[[str], Embedder],
    ) -> None:
        self.writer = writer
        self.flush_others: FlushOthers = nobody_else
        self._embedder = embedder
        self._embedders: dict[str, Embedder | None] = {}
        embed = self._embed if config.embedding_share > 0 else None
        self._log = EventLog(storage, config, writer, clock, embed)
        self._store = EventStore(storage)
        self._labels = LabelStore(storage, clock)
        self.put = self._log.put

    async def learn(self, body: bytes, class_names: Sequence[str]) -> dict[str, Any]:
        """Take the truth about a prediction, as the body of `POST /feedback` has it.

        An event that is not in a file yet is written now, wherever it waits.

        Raises:
            ProtocolError: 400 or 422 malformed; 404 unknown prediction; 409 another label is there.
        """
        feedback = parse_feedback(body, class_names)
        prediction_id = feedback.prediction_id
        rows = await asyncio.to_thread(self._store.find, prediction_id)
        if not rows:
            await asyncio.to_thread(self.flush_own, prediction_id)
            await self.flush_others(prediction_id)
            rows = await asyncio.to_thread(self._store.find, prediction_id)
        found = await asyncio.to_thread(record, feedback, rows, self._labels)
        return {"prediction_id": prediction_id, "row": feedback.row, "label": feedback.label,
                "known_before": found == "same"}  # fmt: skip

    def flush_own(self, prediction_id: str) -> None:
        """Write what waits here, if the prediction is among it; blocks until that is done."""
        if self._log.holds(prediction_id):
            self._log.flush()

    def counts(self) -> dict[str, int]:
        """What became of the events, in rows."""
        log = self._log
        return {
            "written_rows": log.written,
            "dropped_rows": log.dropped,
            "pending_rows": log.pending,
            "failed_writes": log.failed_writes,
        }

    def close(self) -> None:
        """Write everything that was taken; blocks until it is done."""
        self._log.close()

    def _embed(self, version: str, images: NDArray[np.uint8]) -> NDArray[np.float32] | None:
        if version not in self._embedders:
            self._embedders[version] = None  # one that cannot be made is not tried again
            while len(self._embedders) > EMBEDDERS:
                del self._embedders[next(iter(self._embedders))]
            self._embedders[version] = self._embedder(version)
        embedder = self._embedders[version]
        return None if embedder is None else embedder.embed(images)
