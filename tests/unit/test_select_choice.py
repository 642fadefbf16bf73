"""Limits and an aim -> the candidate to register, and what is said where there is none."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayloop.config import SelectConfig
from rayloop.select.candidate import AIMS, Candidate, front_of
from rayloop.select.choice import (
    Chosen,
    NothingFits,
    choose,
    error_of_difference,
    limits_of,
)

ROWS = 200


def candidate(
    name: str,
    right: int | tuple[int, int] = 180,
    ms: float = 1.0,
    size: int = 1000,
    rate: float = 500.0,
    refused: str = "",
) -> Candidate:
    """A model that has the rows of a range right, or as many from the first on."""
    first, last = (0, right) if isinstance(right, int) else right
    rows = np.zeros(ROWS, dtype=bool)
    rows[first:last] = True
    return Candidate(
        name=name, run_id=name, method="fp32" if refused == "fp32" else "int8_static",
        accuracy=float(rows.mean()), agreement=1.0, latency_ms_b1=ms, latency_ms_p99=2 * ms,
        images_per_second=rate, spread=0.1, size_bytes=size, refused=refused, right=rows,
    )  # fmt: skip


def chosen(candidates: list[Candidate], **limits: object) -> str:
    decision = choose(candidates, SelectConfig(**limits))  # type: ignore[arg-type]
    assert isinstance(decision, Chosen), decision.why
    return decision.candidate.name


def refusal(candidates: list[Candidate], **limits: object) -> str:
    decision = choose(candidates, SelectConfig(**limits))  # type: ignore[arg-type]
    assert isinstance(decision, NothingFits)
    return decision.why


SMALL = candidate("small", 150, ms=0.5, size=500, rate=900)
MIDDLE = candidate("middle", 180, ms=1.0, size=1000, rate=500)
LARGE = candidate("large", 196, ms=2.0, size=4000, rate=100)
ALL = [SMALL, MIDDLE, LARGE]


@pytest.mark.parametrize(
    ("limits", "name"),
    [
        ({}, "large"),
        ({"prefer": "latency"}, "small"),
        ({"prefer": "throughput"}, "small"),
        ({"prefer": "bytes"}, "small"),
        ({"max_latency_ms": 1.5}, "middle"),
        ({"max_latency_ms": 1.0}, "middle"),
        ({"max_latency_ms": 0.6}, "small"),
        ({"max_bytes": 3999}, "middle"),
        ({"max_bytes": 4000}, "large"),
        ({"min_accuracy": 0.9, "prefer": "latency"}, "middle"),
        ({"min_accuracy": 0.9, "max_latency_ms": 1.5, "max_bytes": 1000}, "middle"),
    ],
)
def test_limits_decide_who_may_be_chosen_and_the_aim_who_is(
    limits: dict[str, object], name: str
) -> None:
    assert chosen(ALL, **limits) == name


def test_a_difference_within_its_standard_error_is_a_tie_the_faster_one_wins() -> None:
    best = candidate("best", (0, 184), ms=2.0, size=4000, rate=100)
    # 4 rows fewer right and 12 differ: sqrt(16) = 4 is the error, so it is a tie.
    near = candidate("near", (12, 192), ms=1.0)
    assert error_of_difference(near, best) == pytest.approx(math.sqrt(12 + 8) / ROWS)
    assert chosen([best, near]) == "near"
    # As many fewer, but the better one is right wherever this one is.
    worse = candidate("worse", (0, 179), ms=1.0)
    assert error_of_difference(worse, best) == pytest.approx(math.sqrt(5) / ROWS)
    assert chosen([best, worse]) == "best"


def test_times_within_a_twentieth_are_a_tie_that_accuracy_or_bytes_decide() -> None:
    quick = candidate("quick", 150, ms=0.98, size=900)
    assert chosen([quick, MIDDLE], prefer="latency") == "middle"
    assert chosen([replace(quick, latency_ms_b1=0.9), MIDDLE], prefer="latency") == "quick"
    light = candidate("light", 180, ms=1.04, size=900, rate=500)
    assert chosen([light, MIDDLE]) == "light"
    assert chosen([replace(light, latency_ms_b1=1.06), MIDDLE]) == "middle"
    assert chosen([light, replace(light, name="again")]) == "again"  # equal: the first by name


def test_what_ties_in_everything_is_decided_by_the_preferred_figure() -> None:
    best = candidate("best", (0, 184), ms=1.0)
    near = candidate("a", (12, 192), ms=0.99)
    decision = choose([near, best], SelectConfig())
    assert isinstance(decision, Chosen) and decision.candidate is best
    assert decision.why == "of 2 candidates: the unbeaten ones are equal within their errors"
    why = choose([near, best, SMALL], SelectConfig()).why
    assert why.endswith("of it is a; in all else they are equal within their errors")
    assert chosen([near, best], prefer="latency") == "a"


def test_the_decision_says_why() -> None:
    decision = choose([*ALL, candidate("tied", (2, 197), ms=1.9)], SelectConfig(max_bytes=5000))
    assert decision.why == (
        "of 4 candidates within the limits: the most accurate is large with 0.9800, and within "
        "one standard error of it is tied; the fastest of these is tied with 1.9 ms"
    )
    assert choose([SMALL], SelectConfig()).why == "the only one"
    beaten = replace(SMALL, name="beaten", latency_ms_b1=0.6)
    why = choose([SMALL, beaten], SelectConfig()).why
    assert why == "of 2 candidates: none of the others is better in anything"


def test_what_is_refused_is_not_chosen_and_changes_nothing() -> None:
    perfect = candidate("perfect", 200, ms=0.1, size=10, rate=9000, refused="fp32")
    assert chosen([*ALL, perfect]) == "large"
    told = refusal([perfect, replace(SMALL, refused="accuracy 0.1 is below"), perfect])
    assert "No INT8 model of the 1 compared" in told and "small: accuracy 0.1 is below" in told
    assert "perfect" not in told
    many = [replace(SMALL, name=f"run{i}", refused="too far") for i in range(9)]
    assert "and 4 more" in refusal(many)


@pytest.mark.parametrize(
    ("limits", "told"),
    [
        ({"max_latency_ms": 0.2}, "meets --max-latency-ms 0.2: small comes nearest with 0.5 ms."),
        ({"max_bytes": 100}, "--max-bytes 100: small comes nearest with 500 bytes."),
        ({"min_accuracy": 0.99}, "--min-accuracy 0.99: large comes nearest with 0.9800."),
    ],
)
def test_where_none_fits_the_nearest_are_named(limits: dict[str, object], told: str) -> None:
    assert told in refusal(ALL, **limits)
    assert "Loosen a limit" in refusal(ALL, **limits)


def test_of_several_limits_each_names_who_is_nearest_among_those_that_meet_the_rest() -> None:
    told = refusal(ALL, min_accuracy=0.95, max_latency_ms=1.5)
    assert "None of the 3 candidates meets --max-latency-ms 1.5 and --min-accuracy 0.95" in told
    assert (
        "large comes nearest with 2 ms (--max-latency-ms 1.5, of those that meet the rest)" in told
    )
    assert "middle comes nearest with 0.9000 (--min-accuracy 0.95, of those" in told
    hopeless = refusal(ALL, min_accuracy=0.999, max_latency_ms=0.01)
    assert (
        "small comes nearest with 0.5 ms (--max-latency-ms 0.01, and no candidate meets the"
        in hopeless
    )


@st.composite
def crowds(draw: st.DrawFn) -> list[Candidate]:
    count = draw(st.integers(1, 7))
    return [
        candidate(
            f"c{i}",
            (draw(st.integers(0, 3)), draw(st.integers(190, 198))),
            ms=draw(st.sampled_from((0.5, 0.51, 0.6, 1.0))),
            size=draw(st.sampled_from((10, 20, 30))),
            rate=draw(st.sampled_from((100.0, 102.0, 300.0))),
            refused=draw(st.sampled_from(("", "", "gate"))),
        )
        for i in range(count)
    ]


CONFIGS = st.builds(
    SelectConfig,
    max_latency_ms=st.sampled_from((0.0, 0.5, 0.55, 0.6)),
    min_accuracy=st.sampled_from((0.0, 0.95, 0.97)),
    max_bytes=st.sampled_from((0, 10, 20)),
    prefer=st.sampled_from(sorted(AIMS)),
)


@given(crowds(), CONFIGS, st.randoms())
def test_the_choice_is_within_all_limits_unbeaten_and_knows_no_order(crowd, config, chance) -> None:
    decision = choose(crowd, config)
    shuffled = list(crowd)
    chance.shuffle(shuffled)
    assert choose(shuffled, config) == decision
    able = [one for one in crowd if not one.refused]
    allowed = [one for one in able if all(limit.is_met(one) for limit in limits_of(config))]
    assert isinstance(decision, Chosen) == bool(allowed)
    if isinstance(decision, Chosen):
        assert decision.candidate in allowed
        assert decision.candidate in front_of(able)
        if config.prefer == "bytes":
            assert decision.candidate.size_bytes == min(one.size_bytes for one in allowed)


@given(crowds(), CONFIGS)
def test_one_that_is_beaten_in_everything_changes_nothing(crowd, config) -> None:
    decision = choose(crowd, config)
    if isinstance(decision, Chosen):
        beaten = replace(
            decision.candidate, name="a beaten one", latency_ms_b1=9.0, size_bytes=99,
            images_per_second=1.0,
        )  # fmt: skip
        assert choose([*crowd, beaten], config) == replace(
            decision, why=choose([*crowd, beaten], config).why
        )
