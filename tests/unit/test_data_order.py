"""The order of rows: each once an epoch, the same for any number of workers and from any step."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayloop.data.batches import ResidentFeed
from rayloop.data.order import SampleOrder
from rayloop.data.versions import Split

ORDERS = st.builds(
    SampleOrder,
    st.integers(1, 60),
    st.integers(1, 40).map(lambda size: 4 * size),
    st.integers(0, 2**32 - 1),
)


def split_of(num_rows: int) -> Split:
    """Rows whose pixels and labels tell their row id."""
    ids = np.arange(num_rows)
    images = np.repeat(ids.astype(np.uint8), 4).reshape(-1, 2, 2, 1)
    return Split(images, ids % 7, ids)


@given(ORDERS, st.integers(1, 4))
def test_every_row_comes_exactly_once_an_epoch(order: SampleOrder, num_epochs: int) -> None:
    num_steps = -(-num_epochs * order.num_rows // order.global_batch_size)
    rows, epochs = (
        np.concatenate(parts) for parts in zip(*map(order.rows, range(num_steps)), strict=True)
    )
    for epoch in range(num_epochs):
        assert sorted(rows[epochs == epoch]) == list(range(order.num_rows))


@given(ORDERS, st.integers(0, 50), st.sampled_from([1, 2, 4]))
def test_the_workers_stripes_make_the_global_batch(
    order: SampleOrder, step: int, world_size: int
) -> None:
    rows, _ = order.rows(step)
    parts = [rows[order.stripe(step, rank, world_size)] for rank in range(world_size)]
    assert np.array_equal(np.concatenate(parts), rows)
    assert len({len(part) for part in parts}) == 1


@given(ORDERS, st.integers(0, 6))
def test_a_fresh_order_agrees_with_one_that_came_from_the_start(
    order: SampleOrder, step: int
) -> None:
    for earlier in range(step):
        order.rows(earlier)
    fresh = SampleOrder(order.num_rows, order.global_batch_size, order.seed)
    for mine, theirs in zip(order.rows(step), fresh.rows(step), strict=True):
        assert np.array_equal(mine, theirs)


@given(ORDERS, st.integers(0, 30))
def test_the_epoch_of_a_step_is_that_of_its_first_row(order: SampleOrder, step: int) -> None:
    assert order.epoch_of(step) == order.rows(step)[1][0]


def test_seeds_and_epochs_give_different_orders() -> None:
    def first_epochs(seed: int) -> list[list[int]]:
        order = SampleOrder(100, 100, seed)
        return [order.rows(step)[0].tolist() for step in range(2)]

    (one, two), (other, _) = first_epochs(1), first_epochs(2)
    assert one != two
    assert one != other
    assert one != list(range(100))


@pytest.mark.parametrize(
    ("epochs", "steps"), [(1, 10), (0.25, 2), (2.5, 25), (0.001, 1), (10, 100)]
)
def test_number_of_steps(epochs: float, steps: int) -> None:
    assert SampleOrder(100, 10, 0).num_steps(epochs) == steps


@given(
    units=st.integers(1, 12), unit=st.integers(1, 9), extra=st.integers(0, 8), share=st.floats(0, 1)
)
def test_stripes_cover_a_step_in_whole_units(
    units: int, unit: int, extra: int, share: float
) -> None:
    size = units * unit + extra % unit
    world_size = 1 + round(share * (units - 1))
    order = SampleOrder(1000, size, 0, unit)
    stripes = [order.stripe(0, rank, world_size) for rank in range(world_size)]
    assert [row for stripe in stripes for row in range(stripe.start, stripe.stop)] == list(
        range(size)
    )
    assert all(stripe.start % unit == 0 for stripe in stripes)
    lengths = [stripe.stop - stripe.start for stripe in stripes]
    assert max(lengths) - min(lengths) < 2 * unit
    assert order.largest_stripe(world_size) == max(lengths)


def test_more_workers_than_units_are_refused() -> None:
    with pytest.raises(ValueError, match="global_batch_size=10 in units of 4 rows is too little"):
        SampleOrder(100, 10, 0, unit=4).stripe(0, 0, 3)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_resident_feed_gives_the_orders_rows_to_each_rank(world_size: int) -> None:
    order, split = SampleOrder(13, 8, 3), split_of(13)
    feeds = [ResidentFeed(split, order, rank, world_size) for rank in range(world_size)]
    for step, parts in enumerate(zip(*(feed.batches(0, 5) for feed in feeds), strict=True)):
        rows, _ = order.rows(step)
        assert [part.step for part in parts] == [step] * world_size
        pixels = np.concatenate([part.images for part in parts])
        labels = np.concatenate([part.labels for part in parts])
        assert pixels[:, 0, 0, 0].tolist() == rows.tolist()
        assert labels.tolist() == (rows % 7).tolist()


def test_a_feed_started_at_a_step_gives_the_tail_of_the_whole() -> None:
    feed = ResidentFeed(split_of(13), SampleOrder(13, 8, 3), 1, 2)
    whole, tail = list(feed.batches(0, 9)), list(feed.batches(4, 9))
    assert [batch.step for batch in tail] == [4, 5, 6, 7, 8]
    for kept, again in zip(whole[4:], tail, strict=True):
        assert np.array_equal(kept.images, again.images)
        assert np.array_equal(kept.labels, again.labels)


@given(st.integers(4, 400), st.floats(0.01, 1.0), st.floats(0.01, 1.0), st.integers(0, 99))
def test_a_share_of_the_rows_is_the_same_for_every_seed_and_part_of_a_larger_one(
    num_rows: int, one: float, other: float, seed: int
) -> None:
    small, large = sorted((one, other))

    def rows_of(share: float, seed: int) -> set[int]:
        order = SampleOrder(num_rows, 4, seed, share=share)
        assert order.num_rows == max(1, round(share * num_rows))
        steps = -(-order.num_rows // 4)
        rows, epochs = (np.concatenate(p) for p in zip(*map(order.rows, range(steps)), strict=True))
        first = rows[epochs == 0]
        assert len(set(first)) == len(first) == order.num_rows
        return set(first)

    assert rows_of(small, seed) == rows_of(small, seed + 1)
    assert rows_of(small, seed) <= rows_of(large, 0)
    assert max(rows_of(large, seed)) < num_rows


def test_a_share_has_nothing_to_do_with_how_rows_are_stored() -> None:
    order = SampleOrder(1000, 500, seed=0, share=0.5)
    rows, _ = order.rows(0)
    assert 350 < rows.mean() < 650 and (rows > 500).mean() == pytest.approx(0.5, abs=0.1)
