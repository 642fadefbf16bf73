"""The batcher's promise: each answer is the one the request would get alone."""

import asyncio
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayloop.serve.batcher import Batcher, DeadlinePassed, QueueFull, Stopping
from rayloop.serve.execution import EngineFailed

POISON = 255


class FakeEngine:
    """Answers each row by itself, refuses poisoned rows, and can be held at its door."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.seen: set[int] = set()
        self.door = threading.Event()
        self.door.set()
        self.entered = threading.Event()

    def predict(self, rows: np.ndarray) -> np.ndarray:
        self.entered.set()
        assert self.door.wait(10)
        self.batches.append(len(rows))
        self.seen.update(rows[:, 0].tolist())
        if (rows[:, 0] == POISON).any():
            raise ValueError("poisoned row")
        return answer(rows)


def answer(rows: np.ndarray) -> np.ndarray:
    values = rows.astype(np.float32)
    return np.stack([values[:, 0] * 3 + values[:, 1], values[:, 1]], axis=1)


def batcher(engine: FakeEngine, **changes: float) -> Batcher:
    limits = {"max_batch_rows": 4, "max_wait_s": 0.0, "max_queued_rows": 1000} | changes
    return Batcher(engine.predict, **limits)


def rows(*firsts: int) -> np.ndarray:
    return np.array([[first, index] for index, first in enumerate(firsts)], np.uint8)


async def entered(engine: FakeEngine) -> None:
    assert await asyncio.to_thread(engine.entered.wait, 10)


@settings(max_examples=150, deadline=None)
@given(
    requests=st.lists(
        st.lists(st.sampled_from([0, 1, 2, 7, 100, POISON]), min_size=1, max_size=11),
        min_size=1,
        max_size=12,
    ),
    max_batch_rows=st.integers(1, 8),
    max_wait_s=st.sampled_from([0.0, 0.0005]),
)
def test_each_answer_is_the_solo_answer(requests, max_batch_rows, max_wait_s) -> None:
    engine = FakeEngine()

    async def main() -> list:
        gathering = batcher(engine, max_batch_rows=max_batch_rows, max_wait_s=max_wait_s)
        results = await asyncio.gather(
            *(gathering.submit(rows(*firsts), 30) for firsts in requests), return_exceptions=True
        )
        assert gathering.queued_rows == 0
        await gathering.close()
        return results

    for firsts, result in zip(requests, asyncio.run(main()), strict=True):
        if POISON in firsts:
            assert isinstance(result, EngineFailed)
        else:
            np.testing.assert_array_equal(result, answer(rows(*firsts)))
    assert max(engine.batches) <= max_batch_rows


def test_waiting_requests_share_a_batch_and_a_bad_one_fails_alone() -> None:
    engine = FakeEngine()

    async def main() -> list:
        gathering = batcher(engine)
        engine.door.clear()
        first = asyncio.create_task(gathering.submit(rows(1), 30))
        await entered(engine)
        others = [asyncio.create_task(gathering.submit(rows(n), 30)) for n in (2, POISON, 3)]
        await asyncio.sleep(0)
        assert gathering.queued_rows == 3
        engine.door.set()
        results = await asyncio.gather(first, *others, return_exceptions=True)
        assert gathering.counts.retried_alone == 3
        await gathering.close()
        return results

    good, two, bad, three = asyncio.run(main())
    for result, first in ((good, 1), (two, 2), (three, 3)):
        np.testing.assert_array_equal(result, answer(rows(first)))
    assert isinstance(bad, EngineFailed)
    assert "poisoned" in str(bad)
    assert engine.batches == [1, 3, 1, 1, 1]


def test_expired_and_cancelled_requests_never_reach_the_engine() -> None:
    engine = FakeEngine()

    async def main() -> None:
        gathering = batcher(engine)
        engine.door.clear()
        running = asyncio.create_task(gathering.submit(rows(1), 30))
        await entered(engine)
        late = asyncio.create_task(gathering.submit(rows(50, 51, 52, 53, 54), 0.01))
        left = asyncio.create_task(gathering.submit(rows(60), 30))
        await asyncio.sleep(0)
        left.cancel()
        with pytest.raises(DeadlinePassed, match="10 ms"):
            await late
        with pytest.raises(asyncio.CancelledError):
            await left
        assert gathering.queued_rows == 0
        engine.door.set()
        await running
        await gathering.submit(rows(2), 30)
        assert (gathering.counts.expired, gathering.counts.cancelled) == (1, 1)
        await gathering.close()

    asyncio.run(main())
    assert engine.seen == {1, 2}


def test_a_deadline_holds_while_the_engine_computes() -> None:
    engine = FakeEngine()

    async def main() -> None:
        gathering = batcher(engine)
        engine.door.clear()
        with pytest.raises(DeadlinePassed):
            await gathering.submit(rows(1), 0.01)
        engine.door.set()
        np.testing.assert_array_equal(await gathering.submit(rows(2), 30), answer(rows(2)))
        await gathering.close()

    asyncio.run(main())


def test_a_request_that_is_late_on_arrival_is_refused() -> None:
    engine = FakeEngine()

    async def main() -> None:
        gathering = batcher(engine)
        with pytest.raises(DeadlinePassed):
            await gathering.submit(rows(1), 0.0)
        await gathering.close()

    asyncio.run(main())
    assert not engine.batches


def test_the_queue_is_bounded_in_rows_and_drains() -> None:
    engine = FakeEngine()

    async def main() -> None:
        gathering = batcher(engine, max_queued_rows=5)
        engine.door.clear()
        running = asyncio.create_task(gathering.submit(rows(1), 30))
        await entered(engine)
        waiting = asyncio.create_task(gathering.submit(rows(1, 2, 3), 30))
        await asyncio.sleep(0)
        with pytest.raises(QueueFull, match="3 rows wait and 3 more"):
            await gathering.submit(rows(4, 5, 6), 30)
        engine.door.set()
        await asyncio.gather(running, waiting)
        assert len(await gathering.submit(rows(4, 5, 6), 30)) == 3
        await gathering.close()

    asyncio.run(main())


def test_a_lone_request_on_an_idle_engine_does_not_wait_for_company() -> None:
    engine = FakeEngine()

    async def main() -> None:
        gathering = batcher(engine, max_wait_s=3600.0)
        for number in range(3):
            async with asyncio.timeout(60):
                await gathering.submit(rows(number), 30)
        await gathering.close()

    asyncio.run(main())
    assert engine.batches == [1, 1, 1]


def test_rows_that_came_while_the_engine_was_busy_wait_for_a_full_batch() -> None:
    engine = FakeEngine()

    async def main() -> None:
        gathering = batcher(engine, max_wait_s=3600.0)
        engine.door.clear()
        tasks = [asyncio.create_task(gathering.submit(rows(1), 30))]
        await entered(engine)
        tasks.append(asyncio.create_task(gathering.submit(rows(2), 30)))
        await asyncio.sleep(0)
        engine.door.set()
        await tasks[0]
        tasks.append(asyncio.create_task(gathering.submit(rows(3, 4, 5), 30)))
        await asyncio.gather(*tasks)
        await gathering.close()

    asyncio.run(main())
    assert engine.batches == [1, 4]


def test_closing_refuses_what_waits_and_finishes_what_runs() -> None:
    engine = FakeEngine()

    async def main() -> None:
        gathering = batcher(engine)
        engine.door.clear()
        running = asyncio.create_task(gathering.submit(rows(1), 30))
        await entered(engine)
        waiting = asyncio.create_task(gathering.submit(rows(2), 30))
        await asyncio.sleep(0)
        closing = asyncio.create_task(gathering.close())
        with pytest.raises(Stopping, match="stopping"):
            await waiting
        engine.door.set()
        await closing
        np.testing.assert_array_equal(await running, answer(rows(1)))

    asyncio.run(main())
    assert engine.seen == {1}


def test_an_engine_that_loses_rows_is_an_error_not_a_mixup() -> None:
    async def main() -> None:
        gathering = Batcher(
            lambda rows: answer(rows)[:-1], max_batch_rows=4, max_wait_s=0, max_queued_rows=8
        )
        with pytest.raises(EngineFailed, match="1 answers to 2 rows"):
            await gathering.submit(rows(1, 2), 30)
        await gathering.close()

    asyncio.run(main())
