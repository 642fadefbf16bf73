"""Count what became of requests, variant by variant, cheaply enough for the request path."""

from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field

from rayloop.metrics import LATENCY_BUCKETS_MS
from rayloop.serve.batcher import Abandoned, DeadlinePassed, QueueFull
from rayloop.serve.execution import EngineFailed


@dataclass(slots=True)
class LatencyHistogram:
    """How many latencies fell between which limits."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(LATENCY_BUCKETS_MS) + 1))
    """By bucket, not summed up; the last one is beyond every limit."""

    sum_ms: float = 0.0

    def add(self, latency_ms: float) -> None:
        """Count one."""
        self.counts[bisect_left(LATENCY_BUCKETS_MS, latency_ms)] += 1
        self.sum_ms += latency_ms


@dataclass(slots=True)
class VariantCounts:
    """What became of the requests that one version was asked under one name."""

    latency: LatencyHistogram = field(default_factory=LatencyHistogram)
    """Of answered requests, from the arrival in the replica to the answer."""

    failures: Counter[str] = field(default_factory=Counter)
    """Requests without an answer, by the reason's name as Triton has it."""

    decisions: Counter[str] = field(default_factory=Counter)
    """Answered rows by decision."""

    forced: int = 0
    """Answered requests whose client chose the variant or version."""


def failure_reason_name(error: BaseException) -> str:
    """Triton's name for the reason of a failed request."""
    if isinstance(error, QueueFull | DeadlinePassed):
        return "REJECTED"
    if isinstance(error, EngineFailed):
        return "BACKEND"
    if isinstance(error, Abandoned) or not isinstance(error, Exception):
        return "CANCELED"
    return "OTHER"
