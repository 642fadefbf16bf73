"""Truth that arrives later: one label a row, never changed, whoever races for it."""

import subprocess
import sys
import threading
from datetime import date, timedelta
from pathlib import Path

import pyarrow as pa
import pytest

from rayloop.errors import Corrupt, RequestError, StorageFull
from rayloop.serve.events.labels import SCHEMA, ConflictingLabel, LabelStore, labelled
from rayloop.storage import Storage
from tests.unit.event_cases import DAY, HandClock, name_of

NAMES = ("ant", "bee", "cat")


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    """An empty root."""
    return Storage(str(tmp_path))


def add(storage: Storage, number: int, index: int, row: int = 0, day: date = DAY) -> str:
    return LabelStore(storage, HandClock()).add(
        day=day,
        prediction_id=name_of(number),
        row=row,
        class_index=index,
        label=NAMES[index],
        source="a person",
    )


def read(storage: Storage, first: date = date.min, last: date = date.max) -> pa.Table:
    return LabelStore(storage, HandClock()).read(first, last)


def test_a_label_is_kept_beside_the_date_of_its_prediction(storage: Storage) -> None:
    assert add(storage, 1, 2) == "new"
    assert storage.names(f"labels/date={DAY}") == [f"{name_of(1)}-0.json"]
    table = read(storage)
    assert table.schema.equals(SCHEMA)
    (row,) = table.to_pylist()
    assert row.pop("time").isoformat() == "2023-11-15T12:00:00+00:00"
    assert row == {
        "prediction_id": name_of(1), "row": 0, "class_index": 2, "label": "cat",
        "source": "a person",
    }  # fmt: skip


def test_the_same_again_changes_nothing_and_another_is_refused(storage: Storage) -> None:
    add(storage, 1, 2)
    before = storage.read(f"labels/date={DAY}/{name_of(1)}-0.json")
    assert add(storage, 1, 2) == "same"
    with pytest.raises(ConflictingLabel, match=r"Row 0 .* is labelled 'cat' already .*'bee'"):
        add(storage, 1, 1)
    assert issubclass(ConflictingLabel, RequestError)
    assert storage.read(f"labels/date={DAY}/{name_of(1)}-0.json") == before
    assert add(storage, 1, 1, row=1) == add(storage, 2, 1) == "new"


def test_labels_are_read_by_date_and_deleted_by_prediction(storage: Storage) -> None:
    for days in range(3):
        add(storage, days, days, day=DAY + timedelta(days=days))
    add(storage, 0, 1, row=1)
    assert read(storage, DAY, DAY)["row"].to_pylist() == [0, 1]
    assert read(storage, DAY + timedelta(days=1))["class_index"].to_pylist() == [1, 2]
    labels = LabelStore(storage, HandClock())
    assert labels.delete([name_of(0), name_of(2), name_of(9)]) == 3
    assert read(storage)["prediction_id"].to_pylist() == [name_of(1)]
    assert add(storage, 0, 2) == "new"


def test_no_labels_give_an_empty_table(storage: Storage) -> None:
    assert read(storage).schema.equals(SCHEMA)
    assert read(storage).num_rows == 0
    assert LabelStore(storage, HandClock()).delete([name_of(1)]) == 0


def test_a_damaged_label_is_named(storage: Storage) -> None:
    storage.write(f"labels/date={DAY}/{name_of(1)}-0.json", b"{")
    with pytest.raises(Corrupt, match=f"{name_of(1)}-0.json is not valid JSON"):
        read(storage)


def test_of_threads_that_race_one_wins_and_the_others_are_told(storage: Storage) -> None:
    start = threading.Barrier(6)
    for number in range(20):
        outcomes: list[tuple[int, str]] = []

        def race(index: int, number: int = number, outcomes: list = outcomes) -> None:
            start.wait(20)
            try:
                outcomes.append((index, add(storage, number, index)))
            except ConflictingLabel:
                outcomes.append((index, "refused"))

        threads = [threading.Thread(target=race, args=(n % 3,)) for n in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        (winner,) = [index for index, outcome in outcomes if outcome == "new"]
        assert sorted(outcome for _, outcome in outcomes) == ["new", *["refused"] * 4, "same"]
        assert read(storage).to_pylist()[number]["class_index"] == winner


RACER = """
import sys
from datetime import date
from rayloop.clock import SYSTEM_CLOCK
from rayloop.serve.events.labels import ConflictingLabel, LabelStore
from rayloop.storage import Storage
root, index = sys.argv[1], int(sys.argv[2])
labels = LabelStore(Storage(root), SYSTEM_CLOCK)
print("ready", flush=True)
sys.stdin.readline()
won = []
for number in range(150):
    try:
        won.append(labels.add(day=date(2023, 11, 15), prediction_id=f"{number:032x}", row=0,
                              class_index=index, label=str(index)) == "new")
    except ConflictingLabel:
        won.append(False)
print("".join(map(str, map(int, won))))
"""


def test_of_processes_that_race_one_wins_each_row(storage: Storage) -> None:
    pipe = subprocess.PIPE
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, storage.root, str(index)],
            stdin=pipe,
            stdout=pipe,
            text=True,
            env={"PYTHONPATH": ":".join(sys.path)},
        )
        for index in range(2)
    ]
    for racer in racers:
        assert racer.stdout is not None
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("go\n")
        racer.stdin.flush()
    results = [racer.communicate(timeout=60)[0].strip() for racer in racers]
    assert [int(one) + int(two) for one, two in zip(*results, strict=True)] == [1] * 150
    winners = [int(two) for two in results[1]]
    assert read(storage)["class_index"].to_pylist() == winners
    assert not [p for p in Path(storage.path("labels")).rglob("*") if p.name.startswith(".")]


def test_a_label_that_is_deleted_while_another_arrives_makes_room(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(storage, 1, 0)
    create = storage.create

    def create_and_delete(path: str, content: bytes) -> bool:
        made = create(path, content)
        if not made:
            storage.remove(path)
        return made

    monkeypatch.setattr(storage, "create", create_and_delete)
    assert add(storage, 1, 2) == "new"
    assert read(storage)["class_index"].to_pylist() == [2]


def test_a_full_disk_leaves_no_label(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(StorageFull):
            add(storage, 1, 0)
    assert read(storage).num_rows == 0
    assert add(storage, 1, 1) == "new"


# --- the join


def test_truth_is_put_beside_the_rows_it_belongs_to(storage: Storage) -> None:
    add(storage, 1, 2, row=1)
    add(storage, 3, 0)
    add(storage, 77, 0)
    events = pa.table(
        {
            "prediction_id": [name_of(n) for n in (1, 1, 2, 3)],
            "row": pa.array([0, 1, 0, 0], pa.int32()),
            "embedding": [[1.0], None, [2.0], [3.0]],
        }
    )
    joined = labelled(events, read(storage))
    assert joined.column_names == [
        "prediction_id", "row", "embedding", "true_index", "true_label", "label_source",
        "labelled_at",
    ]  # fmt: skip
    assert joined["true_index"].to_pylist() == [None, 2, None, 0]
    assert joined["true_label"].to_pylist() == [None, "cat", None, "ant"]
    assert joined.select(events.column_names) == events


def test_joining_nothing_gives_the_same_columns(storage: Storage) -> None:
    empty = read(storage)
    events = pa.table({"prediction_id": [name_of(1)], "row": pa.array([0], pa.int32())})
    assert labelled(events, empty)["true_label"].to_pylist() == [None]
    add(storage, 1, 2)
    chunks = pa.concat_tables([read(storage), read(storage).slice(0, 0)])
    assert labelled(events.slice(0, 0), chunks).num_rows == 0
    assert labelled(events, chunks)["true_label"].to_pylist() == ["cat"]
