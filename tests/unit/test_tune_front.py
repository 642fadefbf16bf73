"""A Pareto front in any number of figures, whatever the order, with duplicates."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayloop.tune.front import Best, pareto_front

DIRECTIONS = st.lists(st.sampled_from(("highest", "lowest")), min_size=1, max_size=4)


def dominates(one: tuple[int, ...], other: tuple[int, ...], best: list[Best]) -> bool:
    """Written the other way round than the function under test: figure by figure."""
    gains = [a - b if way == "highest" else b - a for a, b, way in zip(one, other, best)]  # noqa: B905
    return min(gains) >= 0 and max(gains) > 0


@st.composite
def clouds(draw: st.DrawFn) -> tuple[list[tuple[int, ...]], list[Best]]:
    """Points of one to four figures on a coarse grid, so that ties and duplicates are common."""
    best = draw(DIRECTIONS)
    point = st.tuples(*[st.integers(0, 4)] * len(best))
    return draw(st.lists(point, max_size=14)), best


@given(clouds())
def test_a_point_is_on_the_front_or_dominated_by_one_that_is(cloud) -> None:
    points, best = cloud
    front = pareto_front(points, best)
    held = [points[at] for at in front]
    assert front == sorted(set(front))
    for at, point in enumerate(points):
        beaten = [other for other in points if dominates(other, point, best)]
        assert (at in front) == (not beaten)
        assert at in front or any(dominates(other, point, best) for other in held)


@given(clouds(), st.randoms())
def test_the_order_of_the_points_changes_nothing(cloud, chance) -> None:
    points, best = cloud
    shuffled = list(enumerate(points))
    chance.shuffle(shuffled)
    front = pareto_front([point for _, point in shuffled], best)
    assert sorted(shuffled[at][0] for at in front) == pareto_front(points, best)


@given(clouds())
def test_duplicates_stay_or_go_together(cloud) -> None:
    points, best = cloud
    front = pareto_front([*points, *points], best)
    once = pareto_front(points, best)
    assert front == [*once, *(at + len(points) for at in once)]


@given(clouds())
def test_a_direction_turned_round_is_a_sign(cloud) -> None:
    points, best = cloud
    turned: list[Best] = ["lowest" if way == "highest" else "highest" for way in best]
    negative = [tuple(-figure for figure in point) for point in points]
    assert pareto_front(negative, turned) == pareto_front(points, best)


def test_the_front_of_two_figures_as_one_draws_it() -> None:
    points = [(0.95, 9.0), (0.95, 3.0), (0.9, 1.0), (0.89, 2.0)]
    assert pareto_front(points, ("highest", "lowest")) == [1, 2]
    assert pareto_front([(0.9, 1.0), (0.9, 1.0)], ("highest", "lowest")) == [0, 1]
    assert pareto_front([], ("highest",)) == []
    assert pareto_front([(1.0, math.inf), (0.5, 2.0)], ("highest", "lowest")) == [0, 1]


def test_what_is_no_point_is_refused() -> None:
    with pytest.raises(ValueError, match="no NaN"):
        pareto_front([(math.nan,)], ("lowest",))
    with pytest.raises(ValueError, match="2 figures each"):
        pareto_front([(1.0,)], ("lowest", "lowest"))
