"""Early stopping: who goes on at a rung, and who is below the median."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayloop.config import TuneConfig
from rayloop.tune.stopping import rungs, should_stop, stopping_rule
from rayloop.tune.trial import Trial
from tests.unit.tune_cases import record

ASHA = TuneConfig(stopping="asha", grace_epochs=1, reduction_factor=3)
MEDIAN = TuneConfig(stopping="median", grace_epochs=2)


def trial(number: int, *values: float) -> Trial:
    """A trial that reported these at epochs 1, 2, ..."""
    records = tuple(record(epoch, value) for epoch, value in enumerate(values, start=1))
    return Trial(number=number, run_id=f"s-{number}", assignment={}, records=records)


def stopped(config: TuneConfig, *curves: tuple[float, ...]) -> bool:
    """Whether the last one is, after the others have reported theirs."""
    trials = [trial(number, *curve) for number, curve in enumerate(curves)]
    return should_stop(config, trials[-1], trials, 9)


def test_rungs_lie_apart_by_the_factor_down_from_the_end() -> None:
    assert rungs(ASHA, 27) == [1, 3, 9]
    assert rungs(ASHA, 12) == [1, 4]
    assert rungs(replace(ASHA, grace_epochs=0.5, reduction_factor=2), 4) == [0.5, 1, 2]
    assert rungs(ASHA, 2) == []


def test_the_first_at_a_rung_goes_on() -> None:
    assert not stopped(ASHA, (0.1,))


def test_of_few_only_the_best_goes_on() -> None:
    assert not stopped(ASHA, (0.5,), (0.6,))
    assert stopped(ASHA, (0.5,), (0.4,))
    assert not stopped(ASHA, (0.5,), (0.5,))  # equals are not worse


def test_one_in_three_goes_on() -> None:
    earlier = tuple((value / 10,) for value in range(8))
    assert not stopped(ASHA, *earlier, (0.55,))  # third of nine
    assert stopped(ASHA, *earlier, (0.45,))


def test_between_rungs_nobody_is_stopped() -> None:
    assert not stopped(ASHA, (0.5, 0.9), (0.6, 0.1))
    assert stopped(ASHA, (0.5, 0.9, 0.9), (0.6, 0.1, 0.1))


def test_a_rung_counts_where_it_was_passed_first() -> None:
    config = replace(ASHA, grace_epochs=0.5)
    assert rungs(config, 4.5) == [0.5, 1]
    others = [trial(0, 0.6, 0.1), trial(1, 0.7, 0.1)]
    # The first report, at epoch 1, passes both rungs; the later one counts, and it alone.
    assert should_stop(config, trial(2, 0.5), others, 4.5)
    assert not should_stop(config, trial(2, 0.8), others, 4.5)
    assert not should_stop(config, trial(2, 0.8, 0.0), others, 4.5)


def test_a_loss_is_better_when_it_is_less() -> None:
    config = replace(ASHA, objectives=("val_loss",))
    assert not stopped(config, (0.5,), (0.6,))  # the record's loss is one minus its accuracy
    assert stopped(config, (0.5,), (0.4,))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40))
def test_about_one_in_three_passes_and_the_best_so_far_always(values: list[float]) -> None:
    trials: list[Trial] = []
    passed = 0
    for number, value in enumerate(values):
        mine = trial(number, value)
        trials.append(mine)
        stop = should_stop(ASHA, mine, trials, 9)
        best = all(value >= other for other in values[:number])
        assert not (best and stop)
        passed += not stop
    assert passed >= 1


@given(st.permutations(list(range(1, 10))))
def test_the_order_of_the_others_does_not_matter(order: list[int]) -> None:
    others = [trial(number, number / 10) for number in order]
    mine = trial(20, 0.75)
    assert not should_stop(ASHA, mine, [*others, mine], 9)
    assert should_stop(ASHA, trial(20, 0.65), [mine, *others, trial(21, 0.9)], 9)


def test_below_the_median_of_the_means_is_stopped() -> None:
    others = tuple((0.2, value) for value in (0.4, 0.5, 0.6, 0.7))  # means 0.3 to 0.45
    assert stopped(MEDIAN, *others, (0.1, 0.36))
    assert not stopped(MEDIAN, *others, (0.1, 0.38))
    assert not stopped(MEDIAN, *others, (0.38, 0.1))  # its best so far counts


def test_the_median_waits_for_the_grace_and_for_enough_others() -> None:
    others = tuple((0.5, 0.5) for _ in range(4))
    assert not stopped(MEDIAN, *others, (0.1,))
    assert not stopped(MEDIAN, *others[:3], (0.1, 0.1))
    assert stopped(MEDIAN, *others, (0.1, 0.1))


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({}, "asha"),
        ({"search": "pbt"}, "none"),
        ({"objectives": ("val_accuracy", "size_bytes")}, "none"),
        ({"stopping": "median"}, "median"),
        ({"stopping": "none"}, "none"),
    ],
)
def test_the_rule_follows_from_the_settings(changes: dict[str, object], rule: str) -> None:
    config = TuneConfig(**changes)  # type: ignore[arg-type]
    assert stopping_rule(config) == rule
    if rule == "none":
        assert not stopped(config, (0.9,), (0.1,))
