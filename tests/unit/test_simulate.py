"""The simulator's formulas: their limits, their monotony, and chance against the closed form."""

import math
import random
import statistics

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from rayloop.errors import ConfigError
from rayloop.simulate.events import play_s
from rayloop.simulate.failures import best_interval_s, daly_s, goodput, mtbf_s, young_s
from rayloop.simulate.measured import LAPTOP
from rayloop.simulate.network import Link, all_reduce_s, exposed_s, halving_s, ring_s, slowest_of
from rayloop.simulate.prediction import Plan, predict
from rayloop.simulate.schedule import Division, divide

LINK = Link(latency_s=1e-5, bytes_per_s=1e9)
seconds = st.floats(0.001, 1000)
counts = st.integers(1, 10_000)


def plan(workers: int, **values: object) -> Plan:
    given = {"rows": 64.0, "between": LINK, "run_rows": 1e9, **values}
    return Plan(workers=workers, **given)  # type: ignore[arg-type]


@given(st.floats(1, 1e10), counts)
def test_an_all_reduce_costs_nothing_alone_and_never_less_than_its_bytes(
    num_bytes: float, count: int
) -> None:
    took = all_reduce_s(num_bytes, count, LINK)
    if count == 1:
        assert took == 0
    else:
        assert took >= 2 * (count - 1) / count * num_bytes / LINK.bytes_per_s
        assert took == min(ring_s(num_bytes, count, LINK), halving_s(num_bytes, count, LINK))


def test_two_ends_of_an_all_reduce_by_hand() -> None:
    assert ring_s(1e9, 2, LINK) == pytest.approx(2 * 1e-5 + 1.0)
    assert halving_s(8e9, 8, LINK) == pytest.approx(6 * 1e-5 + 14.0)
    assert halving_s(1e9, 3, LINK) == pytest.approx(4 * 1e-5 + 3.0)
    assert all_reduce_s(8, 1000, LINK) == pytest.approx(20 * 1e-5, rel=0.01)  # 512, and the rest


@given(seconds, st.floats(0, 1000), st.floats(1, 1e10))
def test_what_a_step_feels_of_an_exchange_is_part_of_it(
    exchange_s: float, hides_s: float, num_bytes: float
) -> None:
    felt = exposed_s(exchange_s, hides_s, num_bytes)
    assert max(0.0, exchange_s - hides_s) <= felt <= exchange_s * (1 + 1e-12)
    assert exposed_s(exchange_s, 0.0, num_bytes) == exchange_s


@pytest.mark.parametrize(
    ("count", "exact"), [(2, 0.5642), (4, 1.0294), (10, 1.5388), (100, 2.5076)]
)
def test_the_slowest_of_many_is_as_far_off_as_tables_say(count: int, exact: float) -> None:
    assert slowest_of(count) == pytest.approx(exact, rel=0.05 if count < 10 else 0.01)
    assert slowest_of(1) == 0


@given(seconds, st.floats(0, 100), st.floats(0, 1000), st.floats(1, 1e8), st.floats(1.01, 100))
def test_goodput_is_a_share_and_falls_with_the_failure_rate(
    interval_s: float, cost_s: float, restart_s: float, between_s: float, more: float
) -> None:
    often = goodput(interval_s, cost_s, restart_s, between_s)
    seldom = goodput(interval_s, cost_s, restart_s, between_s * more)
    assert 0 <= often <= seldom <= goodput(interval_s, cost_s, restart_s, math.inf) <= 1


@given(st.floats(1e-4, 1000), st.floats(0, 1000), st.floats(10, 1e7), st.floats(0.01, 100))
def test_the_best_interval_is_the_best(
    cost_s: float, restart_s: float, between_s: float, factor: float
) -> None:
    best_s = best_interval_s(cost_s, between_s)
    best = goodput(best_s, cost_s, restart_s, between_s)
    assert 0 < best_s <= between_s
    assert goodput(best_s * factor, cost_s, restart_s, between_s) <= best * (1 + 1e-9)


@given(st.floats(0.001, 10), st.floats(1e4, 1e7))
def test_young_and_daly_are_near_the_best_where_checkpoints_are_cheap(
    cost_s: float, between_s: float
) -> None:
    assume(cost_s < between_s / 1000)
    best_s = best_interval_s(cost_s, between_s)
    assert daly_s(cost_s, between_s) == pytest.approx(best_s, rel=0.001)
    assert young_s(cost_s, between_s) == pytest.approx(best_s, rel=0.05)


def test_the_edges_of_failures() -> None:
    assert mtbf_s(10, 0.0) == math.inf and mtbf_s(10, 1.0) == 8640.0
    assert best_interval_s(1.0, math.inf) == math.inf
    assert best_interval_s(0.0, 100.0) < 1e-5
    assert goodput(1e6, 1.0, 1.0, 1.0) == 0.0
    assert daly_s(300.0, 100.0) == 100.0


@settings(max_examples=12)
@given(
    st.floats(20, 200), st.floats(0, 20), st.floats(0, 60), st.floats(100, 2000), st.integers(0, 99)
)
@example(25.102545773961136, 16.715302078397393, 25.966024074303203, 1548.3321566700897, 1)
def test_runs_by_chance_take_as_long_as_the_closed_form_says(
    interval_s: float, cost_s: float, restart_s: float, between_s: float, seed: int
) -> None:
    chance = random.Random(seed)
    work_s = 30 * interval_s
    times = [play_s(work_s, interval_s, cost_s, restart_s, between_s, chance) for _ in range(300)]
    expected_s = work_s / goodput(interval_s, cost_s, restart_s, between_s)
    error_s = statistics.stdev(times) / math.sqrt(len(times))
    assert abs(statistics.fmean(times) - expected_s) <= 4.5 * error_s + 1e-6 * expected_s


def test_a_run_without_failures_takes_its_work_and_its_checkpoints() -> None:
    assert play_s(100.0, 30.0, 1.0, 9.0, math.inf, random.Random(0)) == 104.0
    third_s = 25.102545773961136  # thirty of them, one by one, leave 1e-13 s
    whole_s = play_s(30 * third_s, third_s, 1.0, 9.0, math.inf, random.Random(0))
    assert whole_s == pytest.approx(30 * third_s + 30)


@given(st.integers(1, 64), st.integers(1, 512), st.integers(1, 8))
def test_a_bubble_needs_stages_and_shrinks_with_micro_batches_and_chunks(
    stages: int, micro_batches: int, chunks: int
) -> None:
    division = Division(data=1, pipeline=stages, micro_batches=micro_batches, chunks=chunks)
    assert (division.bubble_share == 0) == (stages == 1)
    assert division.bubble_share < 1
    more = Division(data=1, pipeline=stages, micro_batches=2 * micro_batches, chunks=chunks)
    assert more.bubble == division.bubble / 2
    plain = Division(data=1, pipeline=stages, micro_batches=micro_batches)
    slots = micro_batches + stages - 1
    assert plain.bubble_share == pytest.approx((stages - 1) / slots)


def test_workers_that_make_no_whole_replicas_are_refused() -> None:
    assert divide(12, 3, 2).data == 2
    with pytest.raises(ConfigError, match=r"10 workers do not make.*use a multiple of 4"):
        divide(10, 4)


@given(counts, st.integers(1, 64), st.floats(0, 1), st.floats(0, 0.1))
def test_no_plan_is_faster_than_workers_that_are_alone(
    workers: int, on_node: int, hidden: float, failures: float
) -> None:
    values = {name: getattr(LAPTOP, name) for name in LAPTOP.__slots__}
    calibration = type(LAPTOP)(**values | {"hidden_share": hidden})
    alone = predict(plan(1), calibration)
    many = predict(
        plan(workers, workers_per_node=on_node, failures_per_worker_day=failures), calibration
    )
    assert many.rows_per_s <= workers * alone.rows_per_s * (1 + 1e-9)
    assert 0 < many.efficiency <= 1 + 1e-9
    assert 0 <= many.goodput <= many.kept <= 1
    assert 0 <= many.exchange_share < 1 and 0 <= many.wait_share < 1
    assert many.checkpoint_every_s >= many.step_s * (1 - 1e-9)


def test_one_worker_has_nobody_to_talk_to_or_to_wait_for() -> None:
    alone = predict(plan(1), LAPTOP)
    assert (alone.exchange_share, alone.bubble_share, alone.wait_share) == (0, 0, 0)
    assert alone.efficiency == 1 and alone.extrapolated == ()
    assert alone.kept == pytest.approx(1.0, abs=1e-6)
    assert alone.mtbf_s == math.inf and alone.failures == 0


def test_ten_thousand_workers_are_bounded_and_said_to_be_beyond_what_was_measured() -> None:
    told = predict(plan(10_000, failures_per_worker_day=0.001), LAPTOP)
    assert told.mtbf_s == pytest.approx(8640)
    assert told.steps == math.ceil(1e9 / 640_000)
    assert told.cost == pytest.approx(10_000 * told.run_s / 3600)
    assert "10000 workers, measured with 4" in told.extrapolated
    assert any("nothing measured it" in reason for reason in told.extrapolated)
    more = predict(plan(10_000, failures_per_worker_day=10.0), LAPTOP)
    assert more.goodput < told.goodput and more.run_s > told.run_s


def test_a_fleet_that_always_fails_never_ends() -> None:
    told = predict(plan(10_000, failures_per_worker_day=86_400.0), LAPTOP)
    assert told.goodput == 0 and told.run_s == math.inf and told.cost == math.inf


def test_stages_divide_the_work_and_add_a_bubble() -> None:
    told = predict(plan(8, workers_per_node=8, stages=4, micro_batches=8), LAPTOP)
    flat = predict(plan(8, workers_per_node=8), LAPTOP)
    assert told.global_batch_size == 2 * 64 and flat.global_batch_size == 8 * 64
    assert told.bubble_share > 0 == flat.bubble_share
    assert any("pipeline" in reason for reason in told.extrapolated)
    one = predict(plan(4, workers_per_node=4, stages=4), LAPTOP)
    assert one.exchange_share == 0


def test_rows_beyond_what_was_measured_are_told() -> None:
    told = predict(plan(1, rows=1e6), LAPTOP)
    assert any(reason.startswith("1e+06 rows") for reason in told.extrapolated)
    with pytest.raises(ConfigError, match="needs rows"):
        predict(plan(1, rows=0), LAPTOP)
