"""Turn what replicas said twice, some seconds apart, into the rows of `rayloop status`."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from rayloop.metrics import LATENCY_BUCKETS_MS

Document = dict[str, Any]
Pair = tuple[Document, Document]
"""One thing in one replica, before and after."""

CLIENT_LEFT = "CANCELED"
"""The reason that is no error of the server's."""


def status_tables(before: list[Document], after: list[Document], seconds: float) -> Document:
    """What is live, and how it did in the time between.

    A replica that was not asked before has no rates yet, since its counts go back to its start. A
    variant that is new in a replica, and a count that shrank, began at 0.

    Args:
        before: Snapshots of the replicas.
        after: The same later.
        seconds: The time between them.

    Returns:
        `header`, one document; `variants` and `shadows`, lists of rows with the same keys each.
        Shares are 0 to 1, latencies milliseconds; None is what nothing happened to tell by.

    Raises:
        ValueError: No time passed, or no replica answered.
    """
    if seconds <= 0 or not after:
        raise ValueError("status needs a time above 0 and at least one replica")
    known = {snapshot["replica"]: snapshot for snapshot in before}
    pairs = [(known.get(snapshot["replica"], snapshot), snapshot) for snapshot in after]
    return {
        "header": _header(after, seconds),
        "variants": _variants(pairs, seconds),
        "shadows": _shadows(pairs, seconds),
    }


def _header(after: list[Document], seconds: float) -> Document:
    plans = [snapshot["plan"] for snapshot in after]
    refused = max(after, key=lambda snapshot: int(snapshot["refused_plan"]))
    return {
        "model": after[0]["model"],
        "plan": max(plans),
        "same_plan": len(set(plans)) == 1,
        "replicas": len(after),
        "ready": sum(snapshot["ready"] for snapshot in after),
        "refused_plan": refused["refused_plan"] or None,
        "refused_reason": refused["refused_reason"],
        "refused_limits": next((s["refused_limits"] for s in after if s.get("refused_limits")), ""),
        "ongoing": sum(snapshot["ongoing"] for snapshot in after),
        "pending_rows": _total(after, "versions", "pending_rows"),
        "events_written": sum(s["events"].get("written_rows", 0) for s in after),
        "events_dropped": sum(s["events"].get("dropped_rows", 0) for s in after),
        "seconds": round(seconds, 3),
    }


def _total(snapshots: list[Document], part: str, name: str) -> int:
    return sum(entry[name] for snapshot in snapshots for entry in snapshot[part])


def _variants(pairs: list[Pair], seconds: float) -> list[Document]:
    """Planned ones, and others that were asked in this time."""
    planned = _planned([snapshot for _, snapshot in pairs])
    found = _matched(pairs, "variants", ("variant", "version"))
    assigned = {key: _assigned(entries) for key, entries in found.items()}
    rows = [
        {
            "variant": name,
            "version": version,
            "planned_share": _rounded(planned.get((name, version), 0.0)),
            "measured_share": _share(assigned[name, version], sum(assigned.values())),
            **_rates(entries, seconds),
            **_latencies(entries),
            **_decided(entries),
        }
        for (name, version), entries in found.items()
    ]
    return sorted(
        (
            row
            for row in rows
            if row["requests_per_s"] or (row["variant"], row["version"]) in planned
        ),
        key=lambda row: (-row["planned_share"], int(row["version"]), row["variant"]),
    )


def _planned(snapshots: list[Document]) -> dict[tuple[str, str], float]:
    """The shares of the newest plan that any replica follows."""
    newest = max(snapshots, key=lambda snapshot: int(snapshot["plan"]))
    return {
        (entry["variant"], entry["version"]): entry["share"]
        for entry in newest["variants"]
        if entry["planned"]
    }


def _assigned(entries: list[Pair]) -> int:
    """Answered requests that the plan gave a variant, not the client."""
    answered, forced = _added(entries, "answered", "forced")
    return answered - forced


def _rates(entries: list[Pair], seconds: float) -> Document:
    (answered,) = _added(entries, "answered")
    failures = _grown(entries, "failures")
    asked = answered + sum(failures.values())
    errors = sum(count for reason, count in failures.items() if reason != CLIENT_LEFT)
    return {
        "requests_per_s": _rounded(asked / seconds),
        "error_share": _share(errors, answered + errors),
    }


def _latencies(entries: list[Pair]) -> Document:
    counts = [0] * (len(LATENCY_BUCKETS_MS) + 1)
    for before, after in entries:
        old, new = before["latency"]["counts"], after["latency"]["counts"]
        fresh = any(now < then for then, now in zip(old, new, strict=True))
        for place, now in enumerate(new):
            counts[place] += now if fresh else now - old[place]
    return {f"p{share}_ms": quantile_ms(counts, share / 100) for share in (50, 99)}


def _decided(entries: list[Pair]) -> Document:
    decisions = _grown(entries, "decisions")
    rows = sum(decisions.values())
    return {
        f"{what}_share": _share(decisions.get(what, 0), rows) for what in ("review", "fallback")
    }


def _shadows(pairs: list[Pair], seconds: float) -> list[Document]:
    """Rates and what is dropped are of the time between, all else from when it was planned."""
    rows = []
    for (version,), entries in _matched(pairs, "shadows", ("version",)).items():
        now = [after for _, after in entries]
        compared, dropped = _added(entries, "compared", "dropped")
        all_compared = sum(entry["compared"] for entry in now)
        rows.append(
            {
                "version": version,
                "agreement": _share(sum(entry["agreed"] for entry in now), all_compared),
                "compared_rows": all_compared,
                "rows_per_s": _rounded(compared / seconds),
                "dropped_share": _share(dropped, compared + dropped),
                "failed_rows": sum(entry["failed"] + entry["not_finite"] for entry in now),
                "restarts": sum(entry["restarts"] for entry in now),
                "largest_difference": _rounded(max(entry["largest_difference"] for entry in now)),
            }
        )
    return sorted(rows, key=lambda row: int(row["version"]))


def quantile_ms(counts: Sequence[int], share: float) -> float | None:
    """A latency below which a share of all lies, as Prometheus estimates it from a histogram.

    Within a bucket latencies are taken as evenly spread; beyond the last limit, it is that limit.

    Args:
        counts: By bucket of `LATENCY_BUCKETS_MS`, not summed up, the last one beyond every limit.
        share: 0 to 1.

    Returns:
        Milliseconds; None where nothing was counted.
    """
    left = share * sum(counts)
    if not sum(counts):
        return None
    for (lower, upper), count in zip(pairwise((0.0, *LATENCY_BUCKETS_MS)), counts, strict=False):
        if count and left <= count:
            return round(lower + (upper - lower) * left / count, 3)
        left -= count
    return LATENCY_BUCKETS_MS[-1]


def _matched(
    pairs: list[Pair], part: str, names: tuple[str, ...]
) -> dict[tuple[str, ...], list[Pair]]:
    """The entries of all replicas by their names; before one that is new there was nothing."""
    found: dict[tuple[str, ...], list[Pair]] = {}
    for before, after in pairs:
        old = {tuple(entry[name] for name in names): entry for entry in before[part]}
        for entry in after[part]:
            key = tuple(entry[name] for name in names)
            found.setdefault(key, []).append((old.get(key, _ZERO), entry))
    return found


def _added(entries: list[Pair], *names: str) -> list[int]:
    """How much counts grew, over all replicas."""
    return [
        sum(_growth(before.get(name, 0), after[name]) for before, after in entries)
        for name in names
    ]


def _grown(entries: list[Pair], name: str) -> dict[str, int]:
    """How much counts by name grew, over all replicas."""
    grown: dict[str, int] = {}
    for before, after in entries:
        for key, count in after[name].items():
            grown[key] = grown.get(key, 0) + _growth(before.get(name, {}).get(key, 0), count)
    return grown


def _growth(before: int, after: int) -> int:
    """A count that shrank began anew."""
    return after - before if after >= before else after


def _share(part: int, whole: int) -> float | None:
    return _rounded(part / whole) if whole else None


def _rounded(value: float) -> float:
    return round(value, 6)


_ZERO: Document = {"latency": {"counts": [0] * (len(LATENCY_BUCKETS_MS) + 1)}}
