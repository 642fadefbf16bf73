"""Events, clocks and places for the tests of what is remembered of predictions."""

import time
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from rayloop.serve.events.event import PredictionEvent
from rayloop.serve.events.store import EventStore
from rayloop.storage import Storage

WRITER = "00112233445566aa"
NOON = 1_700_049_600.0
"""2023-11-15 12:00:00 UTC."""

DAY = date(2023, 11, 15)


class HandClock:
    """Time that moves when told."""

    def __init__(self, now: float = NOON) -> None:
        self.seconds = now

    def now(self) -> float:
        return self.seconds

    def monotonic(self) -> float:
        return self.seconds - NOON


def name_of(number: int, writer: str = WRITER) -> str:
    return f"{writer}{number:016x}"


def event(number: int, rows: int = 1, **changes: Any) -> PredictionEvent:
    """An answered request whose every value follows from its number."""
    rng = np.random.default_rng(number)
    made = PredictionEvent(
        prediction_id=name_of(number),
        time=NOON,
        model="classifier",
        plan=3,
        unit=f"user-{number % 7}",
        variant="champion",
        assigned_version="4",
        forced=False,
        status=200,
        images=rng.integers(0, 256, (rows, 6, 5, 1), dtype=np.uint8),
        probabilities=rng.dirichlet(np.ones(4), rows).astype(np.float32),
        decisions=("accept",) * rows,
        versions=(),
        latency_ms=2.5,
        queue_ms=1.0,
        engine_ms=float("nan"),
    )
    return replace(made, **changes)


def failed(number: int, rows: int = 1, status: int = 500) -> PredictionEvent:
    """A request that was assigned and then not answered."""
    return event(number, rows, status=status, probabilities=None, decisions=())


def stored(storage: Storage) -> list[tuple[str, int]]:
    """Name and row of all rows in files, in the order of the files."""
    table = EventStore(storage).read(date.min, date.max, ["prediction_id", "row"])
    return list(zip(*table.to_pydict().values(), strict=True))


def files(storage: Storage) -> list[str]:
    """All files below events/, hidden ones too."""
    root = Path(storage.path("events"))
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())


def until(holds: Callable[[], bool], timeout_s: float = 20.0) -> None:
    """Wait for another thread to have done something; fail when it never does."""
    end = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)
