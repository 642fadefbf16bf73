"""Gathered rows: when a file is due, what it is called, and what storage that fails costs."""

import errno
import logging
from dataclasses import replace
from datetime import date
from pathlib import Path

import numpy as np
import pytest

from rayloop.config import EventsConfig
from rayloop.errors import StorageFull
from rayloop.serve.events.writer import FIRST_RETRY_S, LAST_RETRY_S, EventWriter
from rayloop.storage import Storage
from tests.unit.event_cases import NOON, WRITER, HandClock, event, files, name_of, stored

MIDNIGHT = NOON + 12 * 3600


class FickleStorage(Storage):
    """A folder whose disk is full when it is told so, before the write or in silence after it."""

    full = False
    lies = False

    def write(self, path: str, content: bytes) -> None:
        if self.full:
            raise StorageFull("There is no room.")
        super().write(path, content)
        if self.lies:
            raise OSError(errno.EIO, "the answer was lost")


@pytest.fixture
def storage(tmp_path: Path) -> FickleStorage:
    """An empty root."""
    return FickleStorage(str(tmp_path))


@pytest.fixture
def clock() -> HandClock:
    """Noon."""
    return HandClock()


def writer_of(storage: Storage, clock: HandClock, **settings: float) -> EventWriter:
    return EventWriter(storage, EventsConfig(**settings), WRITER, clock)


def test_a_file_is_due_when_its_oldest_row_is_old(storage: FickleStorage, clock: HandClock) -> None:
    writer = writer_of(storage, clock, flush_s=5.0)
    writer.write_if_due()
    writer.take([event(7, 2)])
    clock.seconds += 4.0
    writer.take([event(3)])
    clock.seconds += 0.9
    writer.write_if_due()
    assert files(storage) == []
    assert (writer.written, writer.gathered_rows) == (0, 3)
    clock.seconds += 0.1
    writer.write_if_due()
    assert files(storage) == [f"date=2023-11-15/120000-{WRITER}-{3:016x}-{7:016x}.parquet"]
    assert stored(storage) == [(name_of(7), 0), (name_of(7), 1), (name_of(3), 0)]
    assert (writer.written, writer.gathered_rows, writer.gathered_bytes) == (3, 0, 0)


@pytest.mark.parametrize(
    "settings", [{"max_pending_rows": 20}, {"max_pending_bytes": 2000}], ids=str
)
def test_a_file_is_due_before_its_time_when_much_has_gathered(
    storage: FickleStorage, clock: HandClock, settings: dict[str, int]
) -> None:
    writer = writer_of(storage, clock, payload_share=1.0, **settings)
    written = []
    for number in range(10):
        writer.take([event(number)])
        writer.write_if_due()
        written.append(writer.written)
    assert written[0] == 0
    assert written[-1] == 10
    assert len(files(storage)) == len(set(written) - {0}) < 10


def test_each_date_has_files_of_its_own_and_yesterdays_do_not_wait(
    storage: FickleStorage, clock: HandClock
) -> None:
    writer = writer_of(storage, clock)
    before, after = event(1, time=MIDNIGHT - 0.001), event(2, time=MIDNIGHT)
    writer.take([before, after])
    writer.write_if_due()
    assert files(storage) == [
        f"date=2023-11-15/235959-{WRITER}-{1:016x}-{1:016x}.parquet",
        f"date=2023-11-16/000000-{WRITER}-{2:016x}-{2:016x}.parquet",
    ]
    writer.take([event(4, time=MIDNIGHT + 1)])
    writer.take([event(3, time=MIDNIGHT - 1)])  # it was answered first and came last
    writer.write_if_due()
    assert [name[5:22] for name in files(storage)] == [
        "2023-11-15/235959", "2023-11-15/235959", "2023-11-16/000000", "2023-11-16/000001"
    ]  # fmt: skip
    assert writer.written == 4


def test_a_full_disk_is_told_once_and_all_rows_are_there_in_the_end(
    storage: FickleStorage, clock: HandClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "rayloop")
    logging.getLogger("rayloop").propagate = True
    writer = writer_of(storage, clock)
    storage.full = True
    pauses, tried_at = [], clock.seconds
    for number in range(400):
        writer.take([event(number)])
        failures = writer.failed_writes
        writer.write_if_due()
        if writer.failed_writes > failures:
            pauses.append(clock.seconds - tried_at)
            tried_at = clock.seconds
        clock.seconds += 1.0
    assert pauses[:6] == [5.0, FIRST_RETRY_S, 2.0, 4.0, 8.0, 16.0]
    assert max(pauses) == LAST_RETRY_S
    assert (writer.written, writer.lost, writer.gathered_rows) == (0, 0, 400)

    def told() -> list[str]:
        return [record.levelname for record in caplog.records if record.module == "writer"]

    assert told() == ["WARNING"]
    assert "There is no room." in caplog.text
    storage.full = False
    clock.seconds += LAST_RETRY_S
    writer.write_if_due()
    assert sorted(stored(storage)) == [(name_of(number), 0) for number in range(400)]
    assert writer.written == 400
    assert told() == ["WARNING", "INFO"]
    storage.full = True
    writer.take([event(500)])
    assert isinstance(writer.write(), StorageFull)
    assert told() == ["WARNING", "INFO", "WARNING"]


def test_a_write_that_happened_and_was_reported_as_failed_is_not_doubled(
    storage: FickleStorage, clock: HandClock
) -> None:
    writer = writer_of(storage, clock)
    writer.take([event(1, 2)])
    storage.lies = True
    assert isinstance(writer.write(), OSError)
    writer.take([event(2)])
    assert isinstance(writer.write(), OSError)
    storage.lies = False
    assert writer.write() is None
    assert sorted(stored(storage)) == [(name_of(1), 0), (name_of(1), 1), (name_of(2), 0)]
    assert (writer.written, writer.failed_writes, writer.gathered_bytes) == (3, 2, 0)


def test_what_is_held_is_known_until_it_is_in_a_file(
    storage: FickleStorage, clock: HandClock
) -> None:
    writer = writer_of(storage, clock)
    writer.take([event(1), event(2)])
    assert [writer.holds(name_of(n)) for n in (1, 2, 3)] == [True, True, False]
    storage.full = True
    writer.write()
    writer.take([event(3)])
    assert [writer.holds(name_of(n)) for n in (1, 2, 3)] == [True, True, True]
    storage.full = False
    writer.write()
    assert not any(writer.holds(name_of(n)) for n in (1, 2, 3))


@pytest.mark.parametrize(
    "wrong",
    [
        {"decisions": ()},
        {"time": float("nan")},
        {"time": 1e20},
        {"images": np.zeros((1, 3), np.uint8)},
        {"unit": 5},
    ],
    ids=str,
)
def test_an_event_that_makes_no_sense_costs_no_other(
    storage: FickleStorage,
    clock: HandClock,
    wrong: dict[str, object],
    caplog: pytest.LogCaptureFixture,
) -> None:
    logging.getLogger("rayloop").propagate = True
    writer = writer_of(storage, clock)
    writer.take([event(1), event(2, **wrong), event(3)])
    writer.take([event(4, **wrong)])
    assert writer.write() is None
    assert [name for name, _ in stored(storage)] == [name_of(1), name_of(3)]
    assert (writer.written, writer.lost) == (2, 2)
    assert caplog.text.count("is lost") == 1
    assert name_of(2) in caplog.text


@pytest.mark.parametrize("how", ["raises", "another length"])
def test_an_embedder_that_fails_costs_embeddings_only(
    storage: FickleStorage, clock: HandClock, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    logging.getLogger("rayloop").propagate = True

    def fail(version: str, images: np.ndarray) -> np.ndarray:
        if how == "raises":
            raise ValueError("another shape")
        return np.zeros((7, 3), np.float32)

    writer = EventWriter(storage, EventsConfig(embedding_share=1.0), WRITER, clock, fail)
    writer.warm()
    assert caplog.text == ""
    writer.take([event(1)])
    writer.take([event(2)])
    assert writer.write() is None
    assert len(stored(storage)) == 2
    assert caplog.text.count("version 4 go without embeddings") == 1


def test_what_is_given_up_is_counted(storage: FickleStorage, clock: HandClock) -> None:
    writer = writer_of(storage, clock)
    storage.full = True
    writer.take([event(1, 3)])
    writer.write()
    writer.take([event(2)])
    assert writer.give_up() == 4
    assert (writer.lost, writer.gathered_rows, writer.gathered_bytes) == (4, 0, 0)
    storage.full = False
    assert writer.write() is None
    assert files(storage) == []


def test_a_leap_of_the_wall_clock_moves_no_event_to_another_date(
    storage: FickleStorage, clock: HandClock
) -> None:
    writer = writer_of(storage, clock)
    writer.take([replace(event(1), time=NOON)])
    clock.seconds = MIDNIGHT + 5 * 86_400
    writer.write_if_due()
    assert files(storage)[0].startswith(f"date={date(2023, 11, 15)}/120000")
