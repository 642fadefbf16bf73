"""Snapshots of replicas that nobody started, made of the counters that real ones hold."""

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from rayloop.serve.batcher import BatcherCounts
from rayloop.serve.counts import LatencyHistogram
from rayloop.serve.shadow.shadow import ShadowCounts
from rayloop.serve.statistics import BatchTimes, VersionStatistics

Document = dict[str, Any]
MODEL = "classifier"


def histogram(latencies_ms: Iterable[float]) -> LatencyHistogram:
    counted = LatencyHistogram()
    for latency_ms in latencies_ms:
        counted.add(latency_ms)
    return counted


def variant(
    name: str,
    version: str,
    share: float | None,
    latencies_ms: Iterable[float] = (),
    *,
    forced: int = 0,
    failures: dict[str, int] | None = None,
    decisions: dict[str, int] | None = None,
) -> Document:
    """A variant; a share of None is that of one outside the plan."""
    latency = histogram(latencies_ms)
    return {
        "variant": name,
        "version": version,
        "share": share or 0.0,
        "planned": share is not None,
        "answered": sum(latency.counts),
        "forced": forced,
        "failures": failures or {},
        "decisions": decisions or {},
        "latency": asdict(latency),
    }


def version(number: str, role: str, batches: Iterable[int] = (), **more: int) -> Document:
    """A loaded version.

    Args:
        number: Its number.
        role: What for.
        batches: Rows of each engine call, which took 1 µs, 2 ms and 3 µs for two requests.
        more: Counts of its batcher.
    """
    statistics = VersionStatistics()
    for rows in batches:
        statistics.executed(rows, 2, BatchTimes(1_000, 2_000_000, 3_000))
        statistics.queue.add(500_000, 2)
        statistics.finished(True, 4_000_000, 1.0)
    return {
        "version": number,
        "role": role,
        "pending_rows": 5,
        "pending_requests": 2,
        "statistics": statistics.to_json(MODEL, number),
        "counts": asdict(BatcherCounts(**more)),
    }


def shadow(number: str, latencies_ms: Iterable[float] = (), **more: float) -> Document:
    """A shadow with counts of its own."""
    counts = ShadowCounts(latency=histogram(latencies_ms), **more)  # type: ignore[arg-type]
    return {"version": number, "pending_rows": 4, **asdict(counts)}


def snapshot(replica: str = "replica-1", **more: Any) -> Document:
    """A replica in which nothing happened, but for what is given."""
    return {
        "replica": replica,
        "model": MODEL,
        "ready": True,
        "ongoing": 0,
        "plan": 1,
        "refused_plan": 0,
        "refused_reason": "",
        "variants": [],
        "versions": [],
        "shadows": [],
        "fallback": {"capped_rows": 0, "failed_rows": 0},
        "events": {},
        **more,
    }


def busy(replica: str = "replica-1", turns: int = 1) -> Document:
    """A replica that has something to say about everything, the more the more turns it made."""
    return snapshot(
        replica,
        plan=7,
        ongoing=3,
        refused={429: 2 * turns},
        fallback={"capped_rows": turns, "failed_rows": turns},
        events={
            "written_rows": 90 * turns,
            "dropped_rows": turns,
            "pending_rows": 6,
            "failed_writes": turns,
        },
        variants=[
            variant(
                "champion", "11", 0.9, [3.0, 4.0, 20.0] * 30 * turns,
                forced=10 * turns, failures={"REJECTED": 6 * turns, "BACKEND": 4 * turns},
                decisions={"accept": 80 * turns, "fallback": 15 * turns, "review": 5 * turns},
            ),
            variant(
                "challenger", "12", 0.1, [8.0] * 10 * turns,
                decisions={"accept": 10 * turns, "review": turns},
            ),
            variant(
                "version-11", "11", None, [2.0] * turns,
                forced=turns, decisions={"accept": turns},
            ),
        ],
        versions=[
            version("11", "live", [1, 2, 40] * turns, expired=turns, cancelled=turns),
            version("12", "live", [3] * turns, retried_alone=turns),
            version("13", "fallback", [1000] * turns),
        ],
        shadows=[
            shadow(
                "14", [30.0] * turns, compared=50 * turns, agreed=49 * turns, dropped=10 * turns,
                failed=turns, not_finite=turns, restarts=turns, largest_difference=0.25,
            )
        ],
    )  # fmt: skip
