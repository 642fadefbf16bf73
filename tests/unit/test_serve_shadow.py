"""A version that watches: what it sees, and that nothing it does can be felt."""

import time
from collections.abc import Callable
from datetime import UTC, datetime

import numpy as np
import pyarrow.parquet as pq
import pytest

from rayloop.clock import SYSTEM_CLOCK
from rayloop.serve.events.files import day_folder
from rayloop.serve.shadow import shadow as shadow_module
from rayloop.serve.shadow.pair_log import PairLog
from rayloop.serve.shadow.process import ShadowProcess
from rayloop.serve.shadow.shadow import Copy, Pair, Shadow, ShadowLost
from rayloop.storage import Storage

MAKE = "tests.shadow_engines:make"


def copy(*pixels: int, prediction_id: str = "a" * 32) -> Copy:
    images = np.array(pixels, np.uint8).reshape(-1, 1, 1, 1)
    first = images[:, 0, 0, 0].astype(np.float32) / 255
    return Copy(prediction_id, images, np.stack([first, 1 - first], 1), "1", 3.0)


def wait_for(holds: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shadow_module, "FIRST_BACKOFF_S", 0.01)
    monkeypatch.setattr(shadow_module, "GATHER_S", 0.001)


class Kept:
    """A keeper that is a list."""

    def __init__(self) -> None:
        self.pairs: list[Pair] = []
        self.flushed = 0

    def add(self, version: str, pairs: list[Pair]) -> None:
        assert version == "2"
        self.pairs += pairs

    def flush(self) -> None:
        self.flushed += 1


def watching(manner: str, after: int = 0, keeper=None, **limits) -> Shadow:
    sizes = {"max_batch_rows": 4, "max_pending_rows": 100} | limits
    return Shadow(
        "2",
        lambda: ShadowProcess(MAKE, [manner, after], answer_timeout_s=2, start_timeout_s=20),
        SYSTEM_CLOCK,
        keeper=keeper,
        **sizes,
    )


def test_a_shadow_that_agrees_and_one_that_does_not() -> None:
    for manner, agreed, difference in (("well", 8, 0.0), ("other", 0, 1.0)):
        kept = Kept()
        shadow = watching(manner, keeper=kept)
        for pixels in ((255, 0, 250), (10,), (0, 5, 255, 1)):
            shadow.offer(copy(*pixels))
        wait_for(lambda shadow=shadow: shadow.counts.compared == 8)
        shadow.close()
        counts = shadow.counts
        assert (counts.agreed, counts.dropped, counts.failed, counts.restarts) == (agreed, 0, 0, 0)
        assert counts.largest_difference == pytest.approx(difference, abs=1e-6)
        assert [len(pair.probabilities) for pair in kept.pairs] == [3, 1, 4]
        assert kept.flushed >= 1
        assert sum(counts.latency.counts) >= 2


@pytest.mark.parametrize("manner", ["crash", "raise", "hang", "shape"])
def test_a_process_that_is_lost_is_started_again_and_its_rows_are_counted(manner: str) -> None:
    shadow = watching(manner, after=1)
    shadow.offer(copy(255))
    wait_for(lambda: shadow.counts.compared == 1)
    shadow.offer(copy(255, 0))
    wait_for(lambda: shadow.counts.failed == 2)
    shadow.offer(copy(255, 0, 1))
    wait_for(lambda: shadow.counts.compared == 4)
    assert shadow.counts.restarts == 1
    shadow.close()


@pytest.mark.parametrize("manner", ["never", "no-engine"])
def test_a_process_that_never_gets_ready_costs_copies_only(manner: str) -> None:
    shadow = watching(manner, max_pending_rows=3)
    for _ in range(1000):
        shadow.offer(copy(1, 2))
    assert shadow.counts.dropped == 2 * 999
    assert shadow.pending_rows == 2
    shadow.close()
    assert shadow.counts.compared == 0


def test_answers_that_are_no_numbers_are_counted_and_not_compared() -> None:
    shadow = watching("nan")
    shadow.offer(copy(255, 0))
    wait_for(lambda: shadow.counts.not_finite == 2)
    shadow.close()
    assert (shadow.counts.compared, shadow.counts.largest_difference) == (0, 0.0)


def test_a_queue_that_is_full_drops_and_a_closed_shadow_takes_nothing() -> None:
    shadow = watching("hang", max_pending_rows=10)
    for _ in range(40):
        shadow.offer(copy(1))
    assert shadow.counts.dropped >= 40 - 10 - 4
    shadow.close()
    dropped = shadow.counts.dropped
    shadow.offer(copy(1))
    assert shadow.counts.dropped == dropped + 1


def test_images_larger_than_a_pipe_go_through() -> None:
    process = ShadowProcess(MAKE, ["well", 0])
    images = np.zeros((3, 500, 500, 3), np.uint8)
    images[1] = 255
    assert process.predict(images)[:, 0].tolist() == [0, 1, 0]
    process.stop()
    with pytest.raises(ShadowLost):
        process.predict(images)


def test_a_process_that_takes_no_images_is_lost_too() -> None:
    process = ShadowProcess(MAKE, ["hang", 0], answer_timeout_s=0.5)
    with pytest.raises(ShadowLost, match="no answer within"):
        process.predict(np.zeros((1, 1, 1, 1), np.uint8))
    with pytest.raises(ShadowLost, match="it took no images"):
        process.predict(np.zeros((3, 500, 500, 3), np.uint8))
    process.stop()


def test_pairs_become_rows_that_say_who_said_what(tmp_path) -> None:
    storage = Storage(str(tmp_path))
    log = PairLog(storage, "0123456789abcdef", SYSTEM_CLOCK)
    one = copy(255, 100, prediction_id="b" * 32)
    log.add(
        "2",
        [
            Pair(one, one.probabilities[:, ::-1].copy(), 7.0),
            Pair(copy(0), copy(0).probabilities, 7.0),
        ],
    )
    log.flush()
    log.flush()
    folder = day_folder("shadows", datetime.fromtimestamp(SYSTEM_CLOCK.now(), UTC).date())
    (name,) = storage.names(folder)
    rows = pq.read_table(tmp_path / folder / name).to_pylist()
    assert [(row["prediction_id"][0], row["row"]) for row in rows] == [("b", 0), ("b", 1), ("a", 0)]
    assert [(row["live_class_index"], row["shadow_class_index"]) for row in rows] == [
        (0, 1), (1, 0), (1, 1)
    ]  # fmt: skip
    assert rows[0]["largest_difference"] == pytest.approx(1.0)
    assert {row["shadow_version"] for row in rows} == {"2"}
    assert {row["live_version"] for row in rows} == {"1"}


def test_pairs_that_storage_refuses_are_lost_and_nothing_else(tmp_path) -> None:
    (tmp_path / "shadows").write_text("in the way")
    log = PairLog(Storage(str(tmp_path)), "0" * 16, SYSTEM_CLOCK)
    log.add("2", [Pair(copy(0), copy(0).probabilities, 1.0)])
    log.flush()
