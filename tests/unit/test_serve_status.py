"""What `rayloop status` says, from what replicas said before and after."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayloop.metrics import LATENCY_BUCKETS_MS
from rayloop.serve.status import quantile_ms, status_tables
from tests.unit.serve_snapshots import busy, histogram, shadow, snapshot, variant, version


def row_of(before: list[dict], after: list[dict], seconds: float = 2.0, place: int = 0) -> dict:
    return status_tables(before, after, seconds)["variants"][place]


def one(*words, replica: str = "replica-1", plan: int = 1, **more) -> dict:
    return snapshot(replica, plan=plan, variants=[variant(*words, **more)])


def test_rates_and_shares_over_two_replicas() -> None:
    before = [busy("one", 1), busy("two", 4)]
    tables = status_tables(before, [busy("one", 3), busy("two", 5)], 10.0)
    champion, challenger, forced = tables["variants"]
    assert (champion["variant"], champion["version"]) == ("champion", "11")
    assert champion["planned_share"] == 0.9
    assert champion["measured_share"] == pytest.approx(80 / 90, abs=1e-6)
    assert champion["requests_per_s"] == 3 * 100 / 10
    assert champion["error_share"] == pytest.approx(0.1)
    assert champion["review_share"] == 0.05
    assert champion["fallback_share"] == 0.15
    assert champion["p50_ms"] == pytest.approx(2.5 + 2.5 * 135 / 180, abs=1e-3)
    assert champion["p99_ms"] == pytest.approx(10 + 15 * (0.99 * 270 - 180) / 90, abs=1e-3)
    assert challenger["measured_share"] == pytest.approx(10 / 90, abs=1e-6)
    assert challenger["error_share"] == 0.0
    assert (forced["variant"], forced["planned_share"], forced["measured_share"]) == (
        "version-11", 0.0, 0.0,
    )  # fmt: skip
    assert tables["shadows"] == [
        {
            "version": "14",
            "agreement": 0.98,
            "compared_rows": 400,
            "rows_per_s": 15.0,
            "dropped_share": pytest.approx(10 / 60, abs=1e-6),
            "failed_rows": 16,
            "restarts": 8,
            "largest_difference": 0.25,
        }
    ]
    assert tables["header"] == {
        "model": "classifier",
        "plan": 7,
        "same_plan": True,
        "replicas": 2,
        "ready": 2,
        "refused_plan": None,
        "refused_reason": "",
        "refused_limits": "",
        "ongoing": 6,
        "pending_rows": 30,
        "events_written": 720,
        "events_dropped": 8,
        "seconds": 10.0,
    }


@given(st.integers(0, 4), st.integers(0, 4), st.integers(0, 4))
def test_it_is_plain_and_every_row_has_the_same_columns(first, second, turns) -> None:
    after = [busy("one", turns), busy("two", turns), busy("three", turns)]
    tables = status_tables([busy("one", first), busy("two", second)], after, 0.5)
    assert json.loads(json.dumps(tables)) == tables
    for rows in (tables["variants"], tables["shadows"]):
        assert len({tuple(row) for row in rows}) == 1
    for row in tables["variants"]:
        for name, number in row.items():
            if name.endswith("_share") and number is not None:
                assert 0 <= number <= 1
        assert row["requests_per_s"] >= 0
    shares = [row["measured_share"] for row in tables["variants"]]
    assert shares[0] is None or sum(shares) == pytest.approx(1.0, abs=1e-5)


def test_where_nothing_happened_nothing_is_claimed() -> None:
    row = row_of([busy()], [busy()])
    assert row["requests_per_s"] == 0.0
    unknown = ("measured_share", "error_share", "p50_ms", "p99_ms", "review_share")
    assert [row[name] for name in unknown] == [None] * 5
    assert len(status_tables([busy()], [busy()], 1.0)["variants"]) == 2
    asleep = snapshot(shadows=[shadow("14")])
    (idle,) = status_tables([asleep], [asleep], 1.0)["shadows"]
    assert (idle["agreement"], idle["dropped_share"], idle["rows_per_s"]) == (None, None, 0.0)


def test_a_replica_that_was_not_asked_before_has_no_rates_yet() -> None:
    tables = status_tables([busy("one", 1)], [busy("one", 2), busy("new", 1000)], 1.0)
    assert tables["variants"][0]["requests_per_s"] == 100.0
    assert tables["header"]["replicas"] == 2
    gone = status_tables([busy("one", 1), busy("gone", 1)], [busy("one", 2)], 1.0)
    assert gone["variants"][0]["requests_per_s"] == 100.0


def test_a_variant_that_is_new_counts_from_nothing() -> None:
    after = one("champion", "12", 1.0, [3.0] * 8, plan=2)
    assert row_of([snapshot()], [after])["requests_per_s"] == 4.0
    assert row_of([snapshot()], [after])["p99_ms"] == pytest.approx(2.5 + 2.5 * 0.99)


def test_counts_that_began_anew_are_not_negative() -> None:
    before = one("champion", "11", 1.0, [3.0] * 50 + [700.0], failures={"OTHER": 9})
    after = one("champion", "11", 1.0, [30.0] * 20, failures={"OTHER": 20})
    row = row_of([before], [after], 1.0)
    assert row["requests_per_s"] == 31.0
    assert 25.0 < row["p50_ms"] < row["p99_ms"] < 50.0


def test_requests_of_clients_that_choose_are_no_part_of_the_split() -> None:
    after = snapshot(
        variants=[
            variant("champion", "11", 0.5, [3.0] * 60, forced=40),
            variant("challenger", "12", 0.5, [3.0] * 20),
        ]
    )
    before = snapshot(variants=[variant("champion", "11", 0.5), variant("challenger", "12", 0.5)])
    tables = status_tables([before], [after], 1.0)
    assert [row["measured_share"] for row in tables["variants"]] == [0.5, 0.5]
    assert {row["variant"]: row["requests_per_s"] for row in tables["variants"]} == {
        "champion": 60.0, "challenger": 20.0,
    }  # fmt: skip


def test_a_client_that_left_is_no_error() -> None:
    before = one("champion", "11", 1.0)
    after = one("champion", "11", 1.0, [3.0] * 9, failures={"CANCELED": 90, "BACKEND": 1})
    assert row_of([before], [after])["error_share"] == 0.1
    assert row_of([before], [after])["requests_per_s"] == 50.0


def test_the_planned_share_is_that_of_the_newest_plan() -> None:
    old = snapshot("old", plan=3, variants=[variant("champion", "11", 1.0, [3.0])])
    new = snapshot(
        "new", plan=4, refused_plan=0,
        variants=[variant("champion", "11", 0.2), variant("challenger", "12", 0.8)],
    )  # fmt: skip
    stuck = {**old, "refused_plan": 4, "refused_reason": "version 12 is damaged"}
    tables = status_tables([old, new], [stuck, new], 1.0)
    assert [(r["variant"], r["planned_share"]) for r in tables["variants"]] == [
        ("challenger", 0.8), ("champion", 0.2),
    ]  # fmt: skip
    header = tables["header"]
    assert (header["plan"], header["same_plan"]) == (4, False)
    assert (header["refused_plan"], header["refused_reason"]) == (4, "version 12 is damaged")


def test_versions_are_in_the_order_of_numbers() -> None:
    variants = [variant(f"version-{n}", n, None, [3.0]) for n in ("10", "9")]
    shadows = [shadow("10"), shadow("9")]
    after = snapshot(variants=variants, versions=[version("9", "live")], shadows=shadows)
    tables = status_tables([snapshot()], [after], 1.0)
    assert [row["version"] for row in tables["variants"]] == ["9", "10"]
    assert [row["version"] for row in tables["shadows"]] == ["9", "10"]


@pytest.mark.parametrize(("after", "seconds"), [([], 1.0), ([snapshot()], 0.0)])
def test_it_needs_a_replica_and_a_time(after, seconds) -> None:
    with pytest.raises(ValueError, match="status needs"):
        status_tables([], after, seconds)


@given(st.lists(st.floats(0.001, 60_000.0), min_size=1), st.floats(0.0, 1.0))
def test_a_quantile_lies_in_the_bucket_of_the_true_one(latencies_ms, share) -> None:
    found = quantile_ms(histogram(latencies_ms).counts, share)
    ordered = sorted(latencies_ms)
    true = ordered[max(0, math.ceil(share * len(ordered)) - 1)]
    lower = max((limit for limit in (0.0, *LATENCY_BUCKETS_MS) if limit < true), default=0.0)
    upper = min((limit for limit in LATENCY_BUCKETS_MS if limit >= true), default=lower)
    assert min(lower, LATENCY_BUCKETS_MS[-1]) - 1e-3 <= found <= upper + 1e-3


@given(st.lists(st.integers(0, 9), min_size=13, max_size=13))
def test_quantiles_are_in_order(counts) -> None:
    found = [quantile_ms(counts, share / 20) for share in range(21)]
    if not sum(counts):
        assert found == [None] * 21
    else:
        assert found == sorted(found)
