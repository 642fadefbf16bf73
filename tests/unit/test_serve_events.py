"""The event log's promise: it slows nobody, counts what it drops, and loses nothing at its end."""

import logging
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import pytest

from rayloop.clock import SYSTEM_CLOCK
from rayloop.config import EventsConfig
from rayloop.errors import StorageFull, WorkError
from rayloop.serve.events import log as event_log
from rayloop.serve.events.event import PredictionEvent
from rayloop.serve.events.log import EventLog
from rayloop.serve.events.store import EventStore
from rayloop.storage import Storage
from tests.unit.event_cases import (
    DAY,
    NOON,
    WRITER,
    HandClock,
    event,
    failed,
    files,
    name_of,
    stored,
    until,
)

NEVER = 3600.0


class SlowStorage(Storage):
    """A folder that can be closed for a while, or have no room."""

    def __init__(self, root: str) -> None:
        super().__init__(root)
        self.door = threading.Event()
        self.door.set()
        self.error: Exception | None = None

    def write(self, path: str, content: bytes) -> None:
        assert self.door.wait(20)
        if self.error is not None:
            raise self.error
        super().write(path, content)


@pytest.fixture
def storage(tmp_path: Path) -> SlowStorage:
    """An empty root."""
    return SlowStorage(str(tmp_path))


@contextmanager
def opened(
    storage: Storage, clock: HandClock | None = None, **settings: float
) -> Iterator[EventLog]:
    """A log that is closed at the end."""
    log = EventLog(storage, EventsConfig(**settings), WRITER, clock or SYSTEM_CLOCK)
    try:
        yield log
    finally:
        log.close()


def everything(log: EventLog) -> int:
    return log.written + log.dropped + log.pending


@pytest.mark.parametrize("flush_s", [0.05, NEVER])
def test_after_a_clean_close_every_event_is_there_exactly_once(
    storage: SlowStorage, flush_s: float
) -> None:
    made = [[event(w * 1000 + n, 1 + n % 3) for n in range(300)] for w in range(4)]
    with opened(storage, flush_s=flush_s) as log:

        def put_all(events: list[PredictionEvent]) -> None:
            for one in events:
                log.put(one)
                if one.prediction_id.endswith("40"):
                    time.sleep(0.001)

        threads = [threading.Thread(target=put_all, args=(part,)) for part in made]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    wanted = [(e.prediction_id, row) for part in made for e in part for row in range(len(e.images))]
    assert sorted(stored(storage)) == sorted(wanted)
    assert (log.written, log.dropped, log.pending, log.requests) == (len(wanted), 0, 0, 1200)
    assert not [name for name in files(storage) if "/." in name]


def test_closing_while_others_put_loses_nothing_that_was_taken(storage: SlowStorage) -> None:
    log = EventLog(storage, EventsConfig(flush_s=0.05), WRITER, SYSTEM_CLOCK)
    made = [event(number) for number in range(2000)]
    begun = threading.Event()

    def put_all() -> None:
        for number, one in enumerate(made):
            log.put(one)
            if number == 100:
                begun.set()

    thread = threading.Thread(target=put_all)
    thread.start()
    assert begun.wait(20)
    log.close()
    thread.join()
    assert log.pending == 0
    assert log.requests == log.written + log.dropped == 2000
    rows = stored(storage)
    assert len(rows) == log.written >= 100
    assert rows == [(name_of(number), 0) for number in range(log.written)]


def test_more_rows_than_may_wait_are_dropped_and_counted(storage: SlowStorage) -> None:
    with opened(storage, flush_s=NEVER, max_pending_rows=10) as log:
        storage.door.clear()
        for number in range(30):
            log.put(event(number, 3))
        assert (log.dropped, log.pending, log.requests) == (90 - 9, 9, 30)
        storage.door.set()
        log.flush()
        log.put(event(99, 3))
    assert (log.written, log.dropped, log.pending) == (12, 81, 0)
    assert {name for name, _ in stored(storage)} == {name_of(n) for n in (0, 1, 2, 99)}


def test_more_bytes_than_may_wait_are_dropped_until_images_are_reduced(
    storage: SlowStorage,
) -> None:
    large = np.zeros((1, 100, 100, 1), np.uint8)
    with opened(storage, flush_s=NEVER, max_pending_bytes=25_000) as log:
        with log._turn:  # the thread may not reduce anything
            for number in range(5):
                log.put(event(number, images=large))
            assert (log.pending, log.dropped) == (2, 3)
        for number in range(5, 10):
            until(lambda: log._reduced_bytes == log._accepted_bytes)
            log.put(event(number, images=large))
        assert log.dropped == 3
    assert log.written == 7


def test_put_does_not_wait_for_a_disk_that_hangs(storage: SlowStorage) -> None:
    with opened(storage, flush_s=0.05, max_pending_rows=100) as log:
        storage.door.clear()
        for number in range(300):
            log.put(event(number))
            assert everything(log) == number + 1
        assert log.dropped == 200
        storage.door.set()
    assert (log.written, log.pending) == (100, 0)


def test_events_put_after_the_end_are_dropped_and_counted(storage: SlowStorage) -> None:
    with opened(storage) as log:
        log.put(event(1))
    log.put(event(2, 4))
    log.close()
    assert (log.written, log.dropped, log.pending, log.requests) == (1, 4, 0, 2)
    assert not log._thread.is_alive()


def test_events_are_in_a_file_after_the_time_set_and_not_before(storage: SlowStorage) -> None:
    clock = HandClock()
    with opened(storage, clock, flush_s=100.0) as log:
        log.put(event(1))
        until(lambda: log._writer.gathered_rows == 1)  # seen at 0 s
        clock.seconds += 98.0
        log.put(event(2))
        until(lambda: log._writer.gathered_rows == 2)
        assert log.written == 0
        clock.seconds += 2.0
        until(lambda: log.written == 2)
    assert len(files(storage)) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="reads the priority of a thread")
def test_the_thread_gives_way_to_those_that_answer(storage: SlowStorage) -> None:
    before = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    with opened(storage) as log:
        thread = log._thread.native_id
        assert thread is not None
        until(lambda: os.getpriority(os.PRIO_PROCESS, thread) >= event_log.NICENESS)
        assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == before


def test_flush_returns_when_all_is_readable(storage: SlowStorage) -> None:
    with opened(storage, flush_s=NEVER) as log:
        for number in range(700):
            log.put(failed(number))
        assert log.holds(name_of(0))
        assert log.holds(name_of(699))
        assert not log.holds(name_of(700))
        log.flush()
        assert len(stored(storage)) == 700
        assert not log.holds(name_of(0))
        assert log.pending == 0


def test_a_full_disk_is_told_to_who_flushes_and_recovers(storage: SlowStorage) -> None:
    with opened(storage, flush_s=NEVER) as log:
        log.put(event(1))
        storage.error = StorageFull("There is no room.")
        with pytest.raises(StorageFull, match="no room"):
            log.flush()
        storage.error = OSError(5, "broken")
        with pytest.raises(WorkError, match=r"cannot be written to .*broken.*tried again"):
            log.flush()
        assert (log.pending, log.dropped, log.failed_writes) == (1, 0, 2)
        assert log.holds(name_of(1))
        storage.error = None
        log.flush()
        assert (log.written, log.pending) == (1, 0)


def test_rows_that_the_disk_refuses_to_the_end_are_counted_and_told(
    storage: SlowStorage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(event_log, "CLOSE_PAUSE_S", 0.0)
    logging.getLogger("rayloop").propagate = True
    with opened(storage, flush_s=NEVER) as log:
        log.put(event(1, 5))
        storage.error = StorageFull("There is no room.")
    assert (log.written, log.dropped, log.pending) == (0, 5, 0)
    assert "5 rows of events are lost" in caplog.text


def test_readers_never_see_half_a_file_nor_part_of_a_request(storage: SlowStorage) -> None:
    store, done = EventStore(storage), threading.Event()
    seen: list[int] = []
    problems: list[str] = []

    def read() -> None:
        while not done.is_set():
            table = store.read(DAY, DAY, ["prediction_id", "row", "image"])
            parts = Counter(table["prediction_id"].to_pylist())
            problems.extend(name for name, rows in parts.items() if rows != 3)
            seen.append(table.num_rows)

    reader = threading.Thread(target=read)
    reader.start()
    with opened(storage, flush_s=0.05, payload_share=0.5) as log:
        for number in range(60):
            log.put(event(number, 3))
            if number % 10 == 9:
                log.flush()
                length = len(seen)
                until(lambda length=length: len(seen) > length)
    done.set()
    reader.join()
    assert problems == []
    assert seen == sorted(seen)
    assert len(set(seen)) > 2


def test_old_days_are_removed_at_the_start_and_when_a_day_has_passed(storage: SlowStorage) -> None:
    for days in (1, 3, 4, 30):
        for root in ("events", "labels", "shadows"):
            storage.write(f"{root}/date={DAY - timedelta(days=days)}/x", b"")
    clock = HandClock(NOON)

    def left(root: str) -> list[str]:
        return [str(DAY - date.fromisoformat(name[5:])).split()[0] for name in storage.names(root)]

    with opened(storage, clock, retention_days=3):
        until(lambda: left("events") == left("labels") == left("shadows") == ["3", "1"])
        clock.seconds += 86_400
        until(lambda: left("shadows") == ["1"])
    with opened(storage, HandClock(NOON + 400 * 86_400), retention_days=0) as log:
        log.put(event(1))
        log.flush()
    assert "1" in left("events")


def test_the_thread_lives_on_when_old_days_cannot_be_removed(
    storage: SlowStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise PermissionError(13, "not yours")

    monkeypatch.setattr(event_log, "prune", fail)
    with opened(storage, flush_s=0.05) as log:
        log.put(event(1))
        until(lambda: log.written == 1)
