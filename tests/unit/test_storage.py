"""Storage: readers see the old bytes or the new ones, never a part; names are the visible ones."""

import pickle
import threading
from pathlib import Path

import pytest

from rayloop.errors import Corrupt, DataMissing
from rayloop.storage import Storage, home


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    """An empty root."""
    return Storage(str(tmp_path))


def test_what_is_put_is_got(storage: Storage) -> None:
    storage.write("a/b/c.bin", b"one")
    storage.write("a/b/c.bin", b"two")
    assert storage.read("a/b/c.bin") == b"two"
    assert storage.exists("a/b/c.bin")
    assert storage.exists("a")
    assert not storage.exists("a/x")
    assert storage.path("a", "b") == f"{storage.root}/a/b"
    assert storage.local_path("a/b") == Path(storage.root) / "a" / "b"


def test_json_is_put_with_sorted_keys_and_without_nan(storage: Storage) -> None:
    storage.write_json("x.json", {"b": 1, "a": [1.5, None]})
    assert storage.read_json("x.json") == {"a": [1.5, None], "b": 1}
    assert storage.read("x.json").index(b'"a"') < storage.read("x.json").index(b'"b"')
    with pytest.raises(ValueError, match="JSON compliant"):
        storage.write_json("x.json", {"loss": float("nan")})
    assert storage.read_json("x.json")["b"] == 1


def test_missing_and_damaged_files_are_told_apart(storage: Storage) -> None:
    with pytest.raises(DataMissing, match=r"There is no file .*/nothing.json"):
        storage.read_json("nothing.json")
    for content in (b"{", b"\xff\xfe", b""):
        storage.write("bad.json", content)
        with pytest.raises(Corrupt, match=r"bad.json is not valid JSON"):
            storage.read_json("bad.json")
    storage.write("list.json", b"[1]")
    with pytest.raises(Corrupt, match="holds list, not a JSON object"):
        storage.read_json("list.json")


def test_names_are_sorted_and_without_hidden_ones(storage: Storage) -> None:
    for name in ("f/b", "f/a", "f/.staged", "f/sub/deep"):
        storage.write(name, b"")
    assert storage.names("f") == ["a", "b", "sub"]
    assert storage.names("nothing") == []


def test_a_write_that_fails_leaves_the_old_file_and_no_rest(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.write("f/x", b"old")

    def fail(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="no space left"):
        storage.write("f/x", b"new")
    assert storage.read("f/x") == b"old"
    assert [path.name for path in Path(storage.path("f")).iterdir()] == ["x"]


def test_concurrent_readers_never_see_half_a_write(storage: Storage) -> None:
    contents = [bytes([value]) * 200_000 for value in range(40)]
    storage.write("f/x", contents[0])
    done, seen = threading.Event(), set[bytes]()

    def read() -> None:
        while not done.is_set():
            seen.add(storage.read("f/x"))

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for content in contents:
        storage.write("f/x", content)
    done.set()
    for reader in readers:
        reader.join()
    assert seen
    assert seen <= set(contents)


def staged(folder: Path, text: str) -> Path:
    """A local folder with two files."""
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "data").write_text(text)
    (folder / "manifest.json").write_text("{}")
    return folder


def test_a_folder_is_published_and_replaced_as_a_whole(storage: Storage, tmp_path: Path) -> None:
    storage.publish(staged(tmp_path / "one", "1"), "runs/r")
    (tmp_path / "runs" / "r" / "left-over").write_text("of the first")
    storage.publish(staged(tmp_path / "two", "2"), "runs/r")
    assert storage.names("runs/r") == ["manifest.json", "sub"]
    assert storage.read("runs/r/sub/data") == b"2"
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["r"]


def test_remove_takes_a_folder_with_all_it_holds(storage: Storage) -> None:
    storage.write("f/sub/x", b"")
    storage.remove("f")
    storage.remove("f")
    assert not storage.exists("f")


def test_a_storage_travels_between_processes(storage: Storage) -> None:
    storage.write("x", b"1")
    there = pickle.loads(pickle.dumps(storage))
    assert there.root == storage.root
    assert there.read("x") == b"1"


def test_home_is_absolute_or_an_uri(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAYLOOP_HOME", raising=False)
    assert home() == str(tmp_path.resolve() / ".rayloop")
    monkeypatch.setenv("RAYLOOP_HOME", "here")
    assert home() == str(tmp_path.resolve() / "here")
    monkeypatch.setenv("RAYLOOP_HOME", "s3://bucket/prefix")
    assert home() == "s3://bucket/prefix"
