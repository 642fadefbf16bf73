"""The only reader of wall time: code that needs time takes a `Clock` and tests give a fake one."""

import time
from datetime import UTC, datetime
from typing import Protocol


class Clock(Protocol):
    """What the rest of the package may ask about time."""

    def now(self) -> float:
        """Seconds since the epoch."""
        ...

    def monotonic(self) -> float:
        """Seconds from an arbitrary start that never go backwards."""
        ...


class SystemClock:
    """The machine's own clock."""

    def now(self) -> float:
        """Seconds since the epoch."""
        return time.time()

    def monotonic(self) -> float:
        """Seconds since an arbitrary point, never going backwards."""
        return time.perf_counter()


def iso_utc(seconds: float) -> str:
    """Write seconds since the epoch as an ISO 8601 time in UTC, to the second."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


SYSTEM_CLOCK: Clock = SystemClock()
