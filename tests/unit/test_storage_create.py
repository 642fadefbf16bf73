"""Files that are made once, removed singly, and folders that come and go while they are listed."""

import os
import threading
from pathlib import Path

import pytest

from rayloop.errors import StorageFull
from rayloop.storage import Storage


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    """An empty root."""
    return Storage(str(tmp_path))


def test_a_file_is_created_once_and_then_kept(storage: Storage) -> None:
    assert storage.create("f/x", b"one")
    assert not storage.create("f/x", b"two")
    assert storage.read("f/x") == b"one"
    assert [path.name for path in Path(storage.path("f")).iterdir()] == ["x"]


def test_of_many_who_create_a_file_one_does_and_nobody_sees_a_part(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "exists", lambda _: False)  # all look before anybody writes
    contents = [bytes([value]) * 200_000 for value in range(4)]
    start = threading.Barrier(len(contents))
    for number in range(10):
        made: list[bytes] = []
        seen: list[bytes] = []

        def create(
            content: bytes, name: str = f"f/{number}", made: list = made, seen: list = seen
        ) -> None:
            start.wait(20)
            if storage.create(name, content):
                made.append(content)
            seen.append(storage.read(name))

        racers = [threading.Thread(target=create, args=(content,)) for content in contents]
        for racer in racers:
            racer.start()
        for racer in racers:
            racer.join()
        assert len(made) == 1
        assert seen == made * len(contents)
    assert len(list(Path(storage.path("f")).iterdir())) == 10


def test_a_full_disk_creates_nothing(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", lambda handle: os.ftruncate(handle, 2))
        with pytest.raises(StorageFull, match="f/y failed: only 2 of 3 bytes were written"):
            storage.create("f/y", b"new")
    assert list(Path(storage.path("f")).iterdir()) == []
    assert storage.create("f/y", b"new")


def test_remotely_a_file_that_is_there_is_not_created_again(tmp_path: Path) -> None:
    storage = Storage(tmp_path.as_uri())
    assert storage.create("x", b"one")
    assert not storage.create("x", b"two")
    assert storage.read("x") == b"one"


def test_remove_takes_a_single_file(storage: Storage) -> None:
    storage.write("f/x", b"")
    storage.write("f/y", b"")
    storage.remove("f/x")
    storage.remove("f/x")
    assert storage.names("f") == ["y"]


def test_a_folder_may_appear_while_its_names_are_asked_for(storage: Storage) -> None:
    outcomes: list[list[str] | Exception] = []
    done = threading.Event()

    def ask() -> None:
        try:
            while not done.is_set():
                outcomes.append(storage.names("f"))
        except OSError as error:
            outcomes.append(error)

    asker = threading.Thread(target=ask)
    asker.start()
    folder = Path(storage.path("f"))
    for _ in range(3000):
        folder.mkdir()
        folder.rmdir()
    done.set()
    asker.join()
    assert outcomes
    assert all(outcome == [] for outcome in outcomes)
