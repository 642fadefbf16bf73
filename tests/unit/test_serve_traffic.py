"""Traffic plans: who gets what, what moves, and what cannot be."""

import json
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from rayloop.errors import ConfigError, Corrupt
from rayloop.serve.traffic.layout import BUCKETS, in_buckets, laid_out, relaid
from rayloop.serve.traffic.plan import (
    LowConfidence,
    PlannedVariant,
    TrafficPlan,
    bucket_of,
    laid_out_shares,
    plan_from_json,
    plan_of,
    single,
)
from rayloop.serve.traffic.store import PlanStore, StalePlan
from rayloop.storage import Storage

VECTORS = json.loads(
    (Path(__file__).parents[2] / "docs" / "traffic-vectors.json").read_text("utf-8")
)


def variants(**shares: float) -> tuple[PlannedVariant, ...]:
    return tuple(
        PlannedVariant(name=name, version=str(number), share=share)
        for number, (name, share) in enumerate(shares.items(), 1)
    )


def plan(**shares: float) -> TrafficPlan:
    return plan_of("classifier", variants(**shares))


@st.composite
def splits(draw) -> dict[str, int]:
    """Buckets by name, in any order, for two to five variants out of six."""
    names = draw(st.lists(st.sampled_from("abcdef"), min_size=2, max_size=5, unique=True))
    cuts = sorted(
        draw(st.lists(st.integers(0, 40), min_size=len(names) - 1, max_size=len(names) - 1))
    )
    ends = [*(cut * (BUCKETS // 40) for cut in cuts), BUCKETS]
    starts = [0, *ends[:-1]]
    return dict(
        zip(names, (end - start for start, end in zip(starts, ends, strict=True)), strict=True)
    )


def moved_buckets(one, other) -> int:
    """Buckets with another owner."""
    edges = sorted({0, *(end for end, _ in one), *(end for end, _ in other)})

    def owner(layout, bucket: int) -> str:
        return next(name for end, name in layout if bucket < end)

    return sum(
        end - start for start, end in pairwise(edges) if owner(one, start) != owner(other, start)
    )


@given(splits(), st.lists(splits(), min_size=1, max_size=4))
def test_a_change_gives_each_its_share_and_moves_no_more_than_the_difference(first, later) -> None:
    layout, have = laid_out(first), first
    for wanted in later:
        changed = relaid(layout, wanted)
        assert laid_out_shares(changed) == {name: n for name, n in wanted.items() if n}
        assert [end for end, _ in changed] == sorted({end for end, _ in changed})
        names = {*have, *wanted}
        difference = sum(max(0, wanted.get(n, 0) - have.get(n, 0)) for n in names)
        assert moved_buckets(layout, changed) == difference
        layout, have = changed, wanted


@given(st.floats(0.001, 0.999), st.floats(0.001, 0.999))
def test_a_ramp_up_and_down_again_gets_the_same_units(one: float, other: float) -> None:
    before = laid_out(in_buckets({"champion": 1 - one, "challenger": one}))
    between = relaid(before, in_buckets({"champion": 1 - other, "challenger": other}))
    assert relaid(between, in_buckets({"champion": 1 - one, "challenger": one})) == before


def test_a_third_variant_leaves_the_second_where_it_is() -> None:
    two = plan(champion=0.9, challenger=0.1)
    three = plan_of("classifier", variants(champion=0.8, challenger=0.1, third=0.1), two)
    units = [f"user-{n}" for n in range(20_000)]
    moved = [(two.assign(u), three.assign(u)) for u in units if two.assign(u) != three.assign(u)]
    assert set(moved) == {("champion", "third")}
    assert 0.09 < len(moved) / len(units) < 0.11


@given(st.dictionaries(st.sampled_from("abcdefgh"), st.floats(0, 1), min_size=1))
def test_buckets_are_whole_and_nearest(weights) -> None:
    total = sum(weights.values())
    if total < 1e-3:
        return
    shares = {name: weight / total for name, weight in weights.items()}
    found = in_buckets(shares)
    assert sum(found.values()) == BUCKETS
    assert all(abs(found[name] - share * BUCKETS) < 2 for name, share in shares.items())


def test_a_hundred_thousand_units_fit_the_shares_and_a_ramp_moves_five_percent() -> None:
    units = [f"user-{number}" for number in range(100_000)]
    five = plan(champion=0.95, challenger=0.05)
    ten = plan_of("classifier", variants(champion=0.9, challenger=0.1), five)
    found = {p: [p.assign(unit) for unit in units] for p in (five, ten)}
    for p, names in found.items():
        counts = [names.count(variant.name) for variant in p.variants]
        wanted = [variant.share * len(units) for variant in p.variants]
        assert stats.chisquare(counts, wanted).pvalue > 0.001
    moved = sum(a != b for a, b in zip(found[five], found[ten], strict=True))
    assert stats.binomtest(moved, len(units), 0.05).pvalue > 0.001
    assert all(
        after == "challenger"
        for before, after in zip(found[five], found[ten], strict=True)
        if before == "challenger"
    )


def test_two_salts_are_independent() -> None:
    units = [f"user-{number}" for number in range(20_000)]
    one, other = (
        [bucket_of(salt, unit) < BUCKETS // 2 for unit in units] for salt in ("one", "other")
    )
    table = [
        [sum(a == x and b == y for a, b in zip(one, other, strict=True)) for y in (0, 1)]
        for x in (0, 1)
    ]
    assert stats.chi2_contingency(table).pvalue > 0.001


def test_the_published_vectors_hold_here_and_in_a_shell() -> None:
    assert len(VECTORS["buckets"]) >= 20
    for vector in VECTORS["buckets"]:
        assert bucket_of(vector["salt"], vector["unit"]) == vector["bucket"], vector
    published = plan_from_json(VECTORS["plan"], "the vectors")
    for unit, name in VECTORS["assignments"].items():
        assert published.assign(unit) == name
    script = (
        "while IFS=$'\\t' read -r salt unit; do "
        'hash=$(printf \'%s\\0%s\' "$salt" "$unit" | sha256sum); '
        "echo $(( (16#${hash:0:8} * 1000000) >> 32 )); done"
    )
    lines = "".join(f"{v['salt']}\t{v['unit']}\n" for v in VECTORS["buckets"])
    done = subprocess.run(
        ["bash", "-c", script], input=lines, capture_output=True, text=True, check=True
    )
    assert [int(line) for line in done.stdout.split()] == [v["bucket"] for v in VECTORS["buckets"]]


def test_any_text_is_a_unit() -> None:
    for unit in ("", "\ud800", "\0", "ü" * 10_000):
        assert 0 <= bucket_of("salt", unit) < BUCKETS


@given(splits())
def test_a_plan_survives_json(split) -> None:
    made = plan_of(
        "m", variants(**{name: n / BUCKETS for name, n in split.items()}), shadows=("9",),
        low_confidence=LowConfidence(below=0.5, fallback="8", max_share=0.2), by="a", why="b",
    )  # fmt: skip
    assert plan_from_json(json.loads(json.dumps(made.to_json())), "here") == made


@pytest.mark.parametrize(
    ("shares", "remedy"),
    [
        ({"champion": 0.9, "challenger": 0.2}, "sum to 1.1, not 1; use e.g. champion=0.8"),
        ({"champion": 0.5, "challenger": 0.4}, "sum to 0.9, not 1; use e.g. champion=0.6"),
        ({"a": 0.1, "b": 1.0, "c": 1.0}, "use e.g. a=0.047619 b=0.47619"),
        ({"champion": -0.5, "challenger": 1.5}, "champion=-0.5 must be 0, or from"),
        ({"champion": float("nan")}, "champion=nan must be"),
        ({"champion": 1.0, "c": 1e-9}, "c=1e-09 must be 0, or from"),
        ({"": 1.0}, "must be letters, digits"),
        ({}, "must be one or more different names"),
    ],
)
def test_an_impossible_split_is_refused_with_the_remedy(shares, remedy) -> None:
    with pytest.raises(ConfigError, match=remedy.replace(".", r"\.")):
        plan(**shares)


def test_the_rest_of_an_impossible_plan_is_refused() -> None:
    with pytest.raises(ConfigError, match="would fall back to itself"):
        single("m", "champion", "1", low_confidence=LowConfidence(fallback="1"))
    with pytest.raises(ConfigError, match="must be different ones"):
        single("m", "champion", "1", shadows=("2", "2"))
    with pytest.raises(ConfigError, match="must be a whole number"):
        single("m", "champion", "one")
    with pytest.raises(ConfigError, match=r"low_confidence\.below=2"):
        single("m", "champion", "1", low_confidence=LowConfidence(below=2))
    with pytest.raises(ConfigError, match="different names"):
        plan_of("m", variants(a=0.5) * 2)


def test_a_variant_without_a_share_gets_nobody_and_one_of_one_everybody() -> None:
    off = plan(off=0.0, on=1.0, also_off=0.0)
    assert {off.assign(str(number)) for number in range(1000)} == {"on"}
    assert off.variant("off") is not None
    assert off.variant("nobody") is None


def test_the_store_keeps_every_plan_and_refuses_a_lost_update(tmp_path) -> None:
    store = PlanStore(Storage(str(tmp_path)), "classifier")
    assert (store.newest(), store.after(0), store.history()) == (None, None, [])
    first = single("classifier", "champion", "1")
    store.put(first)
    second = plan_of("classifier", variants(champion=0.9, challenger=0.1), first)
    also_second = plan_of("classifier", variants(champion=0.8, challenger=0.2), first)
    store.put(second)
    with pytest.raises(StalePlan, match="from plan 1, and plan 2 is in force"):
        store.put(also_second)
    assert store.newest() == second
    assert (store.after(0), store.after(1), store.after(2)) == (second, second, None)
    assert store.history() == [first, second]


def test_a_damaged_plan_is_told_by_its_file(tmp_path) -> None:
    storage = Storage(str(tmp_path))
    store = PlanStore(storage, "m")
    store.put(single("m", "champion", "1"))
    good = storage.read_json("traffic/m/000001.json")
    for wrong in (
        {**good, "layout": [[1000, "champion"]]},
        {**good, "variants": "x"},
        {**good, "more": 1},
        {name: value for name, value in good.items() if name != "salt"}
        | {"number": None, "low_confidence": 3},
    ):
        storage.write_json("traffic/m/000001.json", wrong)
        with pytest.raises(Corrupt, match="000001.json is no traffic plan"):
            store.newest()
