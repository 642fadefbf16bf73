"""Candidates and limits -> the one to register, or how far the nearest ones are from the limits.

Only candidates that may be registered are chosen from, and of these only the Pareto front. The aim
that is preferred decides; what it cannot tell apart from the best is a tie, and the next aim
decides among those. So of two models that are equally good the cheaper one wins; what ties in
everything is decided by the preferred figure as it stands, then by name.

- Accuracies are counted over the same n validation rows, so they are compared row by row. Where one
  model alone is right on k of them, and one has d more of these than the other, the difference is
  d / n and its standard error, if both were equally good, sqrt(k) / n (McNemar 1947). A tie is a
  difference of at most one standard error (the rule of Breiman et al., 1984, for trees).
- Times are a tie within `TIMING_TIE` of the best one: below that a second measurement often
  orders them otherwise.
- Bytes are exact.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rayloop.config import SelectConfig
from rayloop.select.candidate import AIMS, Aim, Candidate, front_of

TIMING_TIE = 0.05
"""Share of the best time, or throughput, within which another one counts as equal."""
EPSILON = 1e-9
"""Shares are quotients of row counts; equality must not be lost to their last bit."""
SHOWN_REASONS = 5
MAX_NAMED_TIES = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Limit:
    """A constraint that is set.

    Attributes:
        flag: Its option on the command line.
        aim: What it limits.
        value: The limit itself, which is allowed.
    """

    flag: str
    aim: Aim
    value: float

    def is_met(self, candidate: Candidate) -> bool:
        """Whether a candidate is within it."""
        return self.distance(candidate) <= EPSILON

    def distance(self, candidate: Candidate) -> float:
        """How far a candidate is beyond it, in the figure's own unit; 0 or less within it."""
        beyond = candidate.figure(self.aim) - self.value
        return beyond if AIMS[self.aim][1] == "lowest" else -beyond

    def __str__(self) -> str:
        return f"{self.flag} {self.value:g}" if self.aim != "bytes" else f"{self.flag} {self.value}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Chosen:
    """The candidate to register.

    Attributes:
        candidate: Which one.
        why: The decision in words.
    """

    candidate: Candidate
    why: str


@dataclass(frozen=True, kw_only=True, slots=True)
class NothingFits:
    """There is no candidate that may be registered within the limits.

    Attributes:
        why: How far the nearest ones are, and what to do.
    """

    why: str


Decision = Chosen | NothingFits


def limits_of(config: SelectConfig) -> tuple[Limit, ...]:
    """The constraints that are set."""
    limits = (
        Limit(flag="--max-latency-ms", aim="latency", value=config.max_latency_ms),
        Limit(flag="--min-accuracy", aim="accuracy", value=config.min_accuracy),
        Limit(flag="--max-bytes", aim="bytes", value=config.max_bytes),
    )
    return tuple(limit for limit in limits if limit.value)


def choose(candidates: Sequence[Candidate], config: SelectConfig) -> Decision:
    """Decide which candidate is registered.

    Args:
        candidates: All that were compared; their order has no say.
        config: Limits, and the aim that is preferred.
    """
    limits = limits_of(config)
    able = [candidate for candidate in candidates if not candidate.refused]
    if not able:
        return NothingFits(why=_all_refused(candidates))
    allowed = [candidate for candidate in able if all(limit.is_met(candidate) for limit in limits)]
    if not allowed:
        return NothingFits(why=_nearest(able, limits))
    left = front_of(allowed)
    reasons: list[str] = []
    for aim in (config.prefer, *(aim for aim in AIMS if aim != config.prefer)):
        first = best_of(left, aim)
        tied = [candidate for candidate in left if is_tie(candidate, first, aim)]
        if len(tied) < len(left):
            reasons.append(_reason(aim, first, tied, " of these" if reasons else ""))
        left = tied
    chosen = best_of(left, config.prefer)
    within = " within the limits" if limits else ""
    of = f"of {len(allowed)} candidates{within}" if len(allowed) > 1 else f"the only one{within}"
    if len(left) > 1:
        equal = "in all else they are" if reasons else "the unbeaten ones are"
        reasons.append(f"{equal} equal within their errors")
    elif len(allowed) > 1 and not reasons:
        reasons = ["none of the others is better in anything"]
    why = f"{of}: {'; '.join(reasons)}" if reasons else of
    return Chosen(candidate=chosen, why=why)


def best_of(candidates: Sequence[Candidate], aim: Aim) -> Candidate:
    """The best candidate in one figure; of equal ones the first by name."""
    sign = 1.0 if AIMS[aim][1] == "lowest" else -1.0
    return min(candidates, key=lambda candidate: (sign * candidate.figure(aim), candidate.name))


def is_tie(candidate: Candidate, best: Candidate, aim: Aim) -> bool:
    """Whether a candidate cannot be told apart from the best one in a figure."""
    gap = abs(candidate.figure(aim) - best.figure(aim))
    if aim == "bytes":
        return gap == 0
    if aim == "accuracy":
        return gap <= error_of_difference(candidate, best) + EPSILON
    return gap <= TIMING_TIE * best.figure(aim)


def error_of_difference(one: Candidate, other: Candidate) -> float:
    """Standard error of the difference of two accuracies over the same rows, were they equal.

    Args:
        one: A candidate with its `right` rows.
        other: Another one, on the same rows.
    """
    return math.sqrt((one.right != other.right).sum()) / len(one.right)


def amount(aim: Aim, value: float) -> str:
    """A figure with its unit, as a sentence or a table says it."""
    return {
        "accuracy": f"{value:.4f}",
        "latency": f"{value:.3g} ms",
        "bytes": f"{value:,.0f} bytes",
        "throughput": f"{value:,.0f} images/s",
    }[aim]


def _reason(aim: Aim, best: Candidate, tied: Sequence[Candidate], among: str) -> str:
    superlative = {
        "accuracy": "the most accurate", "latency": "the fastest", "bytes": "the smallest",
        "throughput": "the one of highest throughput",
    }[aim]  # fmt: skip
    told = f"{superlative}{among} is {best.name} with {amount(aim, best.figure(aim))}"
    if len(tied) == 1:
        return told
    margin = {
        "accuracy": "within one standard error of it",
        "bytes": "as small as it",
    }.get(aim, f"within {TIMING_TIE:.0%} of it")
    others = sorted(candidate.name for candidate in tied if candidate is not best)
    if len(others) > MAX_NAMED_TIES:
        others = [*others[: MAX_NAMED_TIES - 1], f"{len(others) - MAX_NAMED_TIES + 1} others"]
    names = " and ".join(filter(None, [", ".join(others[:-1]), others[-1]]))
    return f"{told}, and {margin} {'is' if len(others) == 1 else 'are'} {names}"


def _all_refused(candidates: Sequence[Candidate]) -> str:
    reasons = [
        f"{candidate.name}: {candidate.refused}"
        for candidate in sorted(candidates, key=lambda candidate: candidate.name)
        if candidate.method != "fp32"
    ]
    more = len(reasons) - SHOWN_REASONS
    shown = [*reasons[:SHOWN_REASONS], *([f"and {more} more"] if more > 0 else [])]
    return (
        f"No INT8 model of the {len(reasons)} compared passes the quantization gate on the "
        f"validation split, and only INT8 models are registered. {'; '.join(shown)}. Train longer, "
        "or set other limits with --quantize.max_accuracy_drop, --quantize.min_agreement or "
        "--quantize.max_excluded_layers."
    )


def _nearest(able: Sequence[Candidate], limits: Sequence[Limit]) -> str:
    parts = []
    for limit in limits:
        rest = [other for other in limits if other is not limit]
        within = [c for c in able if all(other.is_met(c) for other in rest)]
        near = min(within or able, key=lambda c: (limit.distance(c), c.name))
        place = "comes nearest" if not limit.is_met(near) else "meets it"
        among = "" if not rest else ", of those that meet the rest" if within else ""
        if not within:
            among = ", and no candidate meets the rest"
        figure = amount(limit.aim, near.figure(limit.aim))
        parts.append(f"{near.name} {place} with {figure}" + (f" ({limit}{among})" if rest else ""))
    wanted = " and ".join(map(str, limits))
    return (
        f"None of the {len(able)} candidates meets {wanted}: {'; '.join(parts)}. Loosen a limit, "
        "or train models of other sizes (--model.widths, or jobs/tune.py)."
    )
