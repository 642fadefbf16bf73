"""Stored events: found by id through names alone, read while they change, removed for good."""

import threading
from datetime import date, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayloop.config import EventsConfig
from rayloop.errors import Corrupt, RequestError
from rayloop.serve.events import files as event_files
from rayloop.serve.events.event import PredictionEvent
from rayloop.serve.events.labels import LabelStore
from rayloop.serve.events.store import EventStore
from rayloop.serve.events.table import ROWS_PER_GROUP, SCHEMA, to_parquet
from rayloop.serve.events.writer import EventWriter
from rayloop.storage import Storage
from tests.unit.event_cases import DAY, NOON, WRITER, HandClock, event, files, name_of, stored

OTHER = "ffeeddccbbaa0099"
DAY_S = 86_400


class SpyStorage(Storage):
    """A folder that remembers which files were asked for."""

    def __init__(self, root: str) -> None:
        super().__init__(root)
        self.opened: list[str] = []

    def local_path(self, *parts: str) -> Path | None:
        self.opened.append(parts[-1].rpartition("/")[2])
        return super().local_path(*parts)


@pytest.fixture
def storage(tmp_path: Path) -> SpyStorage:
    """An empty root."""
    return SpyStorage(str(tmp_path))


def write(storage: Storage, *events: PredictionEvent, writer: str = WRITER) -> None:
    """One file."""
    gatherer = EventWriter(storage, EventsConfig(), writer, HandClock())
    gatherer.take(list(events))
    assert gatherer.write() is None


def test_a_prediction_is_found_by_the_names_of_files(storage: SpyStorage) -> None:
    write(storage, *[event(n) for n in range(10, 20)])
    write(storage, event(30, 3), event(20))
    write(storage, event(25, prediction_id=name_of(25, OTHER)), writer=OTHER)
    write(storage, event(40, time=NOON - DAY_S))
    store = EventStore(storage)
    found = store.find(name_of(30))
    assert [row["row"] for row in found] == [0, 1, 2]
    assert {row["prediction_id"] for row in found} == {name_of(30)}
    assert found[0]["time"].date() == DAY
    assert storage.opened == [f"120000-{WRITER}-{20:016x}-{30:016x}.parquet"]
    assert store.find(name_of(40))[0]["time"].date() == DAY - timedelta(days=1)
    storage.opened.clear()
    for unknown in (name_of(25), name_of(9), name_of(41), name_of(10, OTHER), "", "x"):
        assert store.find(unknown) == []
    assert len(storage.opened) == 1  # 25 lies between 20 and 30


def test_a_prediction_is_found_in_any_row_group(storage: SpyStorage) -> None:
    write(storage, *[event(n) for n in range(ROWS_PER_GROUP - 1)], event(9000, 2), event(9001))
    store = EventStore(storage)
    assert [row["row"] for row in store.find(name_of(9000))] == [0, 1]
    assert len(store.find(name_of(9001))) == len(store.find(name_of(0))) == 1


def test_dates_and_columns_are_read_as_asked(storage: SpyStorage) -> None:
    for days in range(4):
        write(storage, event(days, time=NOON + days * DAY_S))
    store = EventStore(storage)

    def read(first: int, last: int) -> list[str]:
        table = store.read(DAY + timedelta(days=first), DAY + timedelta(days=last))
        assert table.schema.equals(SCHEMA)
        return table["prediction_id"].to_pylist()

    assert read(1, 2) == [name_of(1), name_of(2)]
    assert read(-5, 0) == [name_of(0)]
    assert read(7, 9) == read(2, 1) == []
    table = store.read(DAY, DAY, ["confidence", "unit", "confidence"])
    assert table.column_names == ["confidence", "unit"]
    with pytest.raises(RequestError, match=r"no column colour, size; there are prediction_id, row"):
        store.read(DAY, DAY, ["row", "size", "colour"])


def test_a_place_without_events_gives_an_empty_table(storage: SpyStorage) -> None:
    table = EventStore(storage).read(date.min, date.max)
    assert (table.num_rows, table.schema) == (0, SCHEMA)
    assert EventStore(storage).delete(prediction_ids=[name_of(1)], units=["u"]) == 0
    assert EventStore(storage).prune(DAY) == 0


def test_other_files_are_passed_over_and_older_ones_lack_columns(storage: SpyStorage) -> None:
    write(storage, event(1))
    (name,) = files(storage)
    content = pq.read_table(storage.path("events", name))
    old = content.drop_columns(["contrast", "plan"])
    storage.write(f"events/{name[:-5]}x.parquet", b"junk")
    storage.write("events/date=2023-99-99/x", b"junk")
    storage.write("events/notes.txt", b"junk")
    storage.write(f"events/{name}".replace("120000", "110000"), to_parquet(old).to_pybytes())
    table = EventStore(storage).read(DAY, DAY, ["row", "contrast"])
    assert table["contrast"].null_count == 1
    assert table.num_rows == 2


def test_a_damaged_file_is_named(storage: SpyStorage) -> None:
    write(storage, event(1))
    (name,) = files(storage)
    path = Path(storage.path("events", name))
    for content in (b"junk", b"", path.read_bytes()[:-9]):
        path.write_bytes(content)
        for ask in (lambda: EventStore(storage).read(DAY, DAY),
                    lambda: EventStore(storage).find(name_of(1))):  # fmt: skip
            with pytest.raises(Corrupt, match=rf"{name} is not a whole Parquet file"):
                ask()


def test_files_that_vanish_after_the_listing_are_as_if_never_there(
    storage: SpyStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(storage, event(1), event(2))
    write(storage, event(3))
    listed = list(event_files.files_of_day(storage, DAY))
    Path(storage.path(listed[0].path)).unlink()
    monkeypatch.setattr(event_files, "files_of_day", lambda *_: iter(listed))
    store = EventStore(storage)
    assert store.find(name_of(1)) == []
    assert store.read(DAY, DAY, ["prediction_id"]).num_rows == 1
    assert store.delete(prediction_ids=[name_of(1), name_of(3)]) == 1


def test_remote_storage_is_read_too(tmp_path: Path) -> None:
    storage = Storage(tmp_path.as_uri())
    (tmp_path / "events" / f"date={DAY}").mkdir(parents=True)  # an object store needs no folders
    write(storage, event(1, 2))
    store = EventStore(storage)
    assert len(store.find(name_of(1))) == 2
    assert store.read(DAY, DAY)["row"].to_pylist() == [0, 1]
    assert store.delete(prediction_ids=[name_of(1)]) == 2
    assert store.read(DAY, DAY).num_rows == 0


# --- deletion


def label(storage: Storage, number: int, row: int = 0) -> None:
    LabelStore(storage, HandClock()).add(
        day=DAY, prediction_id=name_of(number), row=row, class_index=1, label="bee"
    )


def labels_of(storage: Storage) -> list[str]:
    return LabelStore(storage, HandClock()).read(date.min, date.max)["prediction_id"].to_pylist()


def shadow(storage: Storage, *numbers: int) -> None:
    table = pa.table({"prediction_id": [name_of(n) for n in numbers], "row": [0] * len(numbers)})
    path = f"shadows/date={DAY}/120000-{WRITER}-version-3.parquet"
    storage.write(path, to_parquet(table).to_pybytes())


def test_what_is_deleted_is_gone_everywhere_and_the_rest_is_as_it_was(storage: SpyStorage) -> None:
    write(storage, event(1, 2), event(2), event(3))
    write(storage, event(4))
    write(storage, event(5, time=NOON + DAY_S))
    for number in (1, 2, 4):
        label(storage, number)
    label(storage, 1, 1)
    shadow(storage, 1, 2, 4)
    before = EventStore(storage).find(name_of(3))
    store = EventStore(storage)
    assert store.delete(prediction_ids=[name_of(1), name_of(4), name_of(99)]) == 3
    assert stored(storage) == [(name_of(2), 0), (name_of(3), 0), (name_of(5), 0)]
    assert str(store.find(name_of(3))) == str(before)
    assert store.find(name_of(1)) == []
    assert labels_of(storage) == [name_of(2)]
    (rest,) = Path(storage.path("shadows")).rglob("*.parquet")
    assert pq.read_table(rest)["prediction_id"].to_pylist() == [name_of(2)]
    kept = files(storage)
    assert len(kept) == 2  # the file whose rows all went is gone
    assert store.delete(prediction_ids=[name_of(1)]) == 0
    assert store.delete(prediction_ids=[name_of(2)], units=[]) == 1
    assert list(Path(storage.path("shadows")).rglob("*.parquet")) == []
    assert store.delete() == 0


def test_all_of_a_units_predictions_are_deleted(storage: SpyStorage) -> None:
    write(storage, event(1, 2, unit="ann"), event(2, unit="bob"), event(3, unit=""))
    write(storage, event(4, unit="ann", prediction_id=name_of(4, OTHER)), writer=OTHER)
    label(storage, 1)
    label(storage, 2)
    shadow(storage, 1, 2, 3)
    assert EventStore(storage).delete(units=["ann", "nobody"], prediction_ids=[name_of(3)]) == 4
    assert stored(storage) == [(name_of(2), 0)]
    assert labels_of(storage) == [name_of(2)]
    with pytest.raises(RequestError, match="empty unit names nobody"):
        EventStore(storage).delete(units=["bob", ""])
    assert stored(storage) == [(name_of(2), 0)]


@settings(max_examples=25)
@given(
    numbers=st.lists(st.integers(0, 40), min_size=1, max_size=25, unique=True),
    sizes=st.lists(st.integers(1, 6), min_size=25, max_size=25),
    gone=st.sets(st.integers(0, 41)),
)
def test_exactly_what_was_named_is_deleted(
    tmp_path_factory: pytest.TempPathFactory, numbers: list[int], sizes: list[int], gone: set[int]
) -> None:
    storage = Storage(str(tmp_path_factory.mktemp("events")))
    left, at = [event(number) for number in numbers], 0
    for size in sizes:
        if at < len(left):
            write(storage, *left[at : at + size])
            at += size
    wanted = {name_of(n) for n in numbers if n not in gone}
    removed = EventStore(storage).delete(prediction_ids=[name_of(n) for n in gone])
    assert {name for name, _ in stored(storage)} == wanted
    assert removed == len(numbers) - len(wanted)


def test_a_reader_sees_each_file_before_or_after_a_deletion(storage: SpyStorage) -> None:
    for number in range(0, 60, 2):
        write(storage, event(number), event(number + 1))
    store, done = EventStore(storage), threading.Event()
    seen: list[int] = []

    def read() -> None:
        while not done.is_set():
            seen.append(EventStore(Storage(storage.root)).read(DAY, DAY, ["row"]).num_rows)

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(60):
        assert store.delete(prediction_ids=[name_of(number)]) == 1
    done.set()
    reader.join()
    assert seen == sorted(seen, reverse=True)
    assert files(storage) == []


# --- dates


def test_pruning_removes_whole_dates_of_all_kinds(storage: SpyStorage) -> None:
    for days in range(3):
        write(storage, event(days, time=NOON - days * DAY_S))
    label(storage, 0)
    storage.write(f"labels/date={DAY - timedelta(days=1)}/x.json", b"{}")
    storage.write(f"shadows/date={DAY - timedelta(days=9)}/x.parquet", b"")
    storage.write("events/other/x", b"")
    store = EventStore(storage)
    assert store.prune(DAY) == 4
    assert storage.names("events") == [f"date={DAY}", "other"]
    assert storage.names("labels") == [f"date={DAY}"]
    assert storage.names("shadows") == []
    assert store.prune(DAY) == 0


def test_two_replicas_may_prune_at_the_same_time(
    storage: SpyStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(storage, event(1))
    monkeypatch.setattr(event_files, "days", lambda *_: [DAY, DAY])
    assert EventStore(storage).prune(DAY + timedelta(days=1)) >= 1

    def late(path: str) -> None:
        raise FileNotFoundError(path)

    monkeypatch.setattr(storage, "remove", late)
    assert EventStore(storage).prune(DAY + timedelta(days=1)) == 0


def test_names_say_when_who_and_which() -> None:
    path = event_files.event_path(NOON + 3601, WRITER, "0" * 16, "f" * 16)
    assert path == f"events/date=2023-11-15/130001-{WRITER}-{'0' * 16}-{'f' * 16}.parquet"
    assert event_files.day_of(NOON - 43_200) == DAY
    assert event_files.day_of(NOON - 43_200.001) == DAY - timedelta(days=1)
