"""Turn shares into ranges of buckets, and changes into as few moved buckets as it takes."""

from collections.abc import Mapping

BUCKETS = 1_000_000
"""Parts that all units are divided into."""

Layout = tuple[tuple[int, str], ...]
"""Ranges in rising order: the bucket each one ends before, and whose it is."""


def in_buckets(shares: Mapping[str, float]) -> dict[str, int]:
    """Whole buckets for shares that sum to 1; what rounding leaves goes to the largest remainders.

    Args:
        shares: 0..1 by name.
    """
    exact = {name: share * BUCKETS for name, share in shares.items()}
    found = {name: int(value) for name, value in exact.items()}
    missing = BUCKETS - sum(found.values())
    by_remainder = sorted(exact, key=lambda name: (found[name] - exact[name], name))
    for name in by_remainder[:missing]:
        found[name] += 1
    return found


def laid_out(wanted: Mapping[str, int]) -> Layout:
    """One range for each name that has buckets, in order."""
    ends, end = [], 0
    for name, buckets in wanted.items():
        end += buckets
        if buckets:
            ends.append((end, name))
    return tuple(ends)


def relaid(layout: Layout, wanted: Mapping[str, int]) -> Layout:
    """A layout with other sizes in which only the difference has moved.

    The first of `wanted` gives away from the end of its ranges, the others from their beginning, so
    that a share which grows and shrinks again gets the same units and loses the same.

    Args:
        layout: How it is now.
        wanted: Buckets by name, in the plan's order; names that are missing give all of theirs.
    """
    starts = [0, *(end for end, _ in layout[:-1])]
    ranges = [(start, end, name) for start, (end, name) in zip(starts, layout, strict=True)]
    first = next(iter(wanted))
    left = dict.fromkeys((name for _, name in layout), 0) | dict(wanted)
    kept, freed = [], []
    # From the end, so that the others keep their last buckets; the first one, from the beginning.
    for start, end, name in sorted(ranges, key=lambda r: r[0] if r[2] == first else -r[0]):
        keep = min(end - start, left[name])
        left[name] -= keep
        cut = start + keep if name == first else end - keep
        kept.append((start, cut, name) if name == first else (cut, end, name))
        freed.append((cut, end) if name == first else (start, cut))
    return _joined(kept + _given(sorted(freed), left))


def _given(freed: list[tuple[int, int]], left: Mapping[str, int]) -> list[tuple[int, int, str]]:
    """The freed ranges, some of them empty, handed to those who want more, in order."""
    found = []
    for name in left:
        missing = left[name]
        while missing:
            start, end = freed.pop(0)
            size = min(missing, end - start)
            found.append((start, start + size, name))
            missing -= size
            if start + size < end:
                freed.insert(0, (start + size, end))
    return found


def _joined(ranges: list[tuple[int, int, str]]) -> Layout:
    """Ranges in rising order, neighbours of the same name as one."""
    found: list[tuple[int, str]] = []
    for start, end, name in sorted(ranges):
        if start == end:
            continue
        if found and found[-1][1] == name:
            found.pop()
        found.append((end, name))
    return tuple(found)
