"""Storage: readers see the old bytes or the new ones, never a part; names are the visible ones."""

import errno
import os
import pickle
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from rayloop.errors import ConfigError, Corrupt, DataMissing, StorageFull, StorageRefused
from rayloop.locks import exclusive
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


def test_a_local_file_has_a_path(storage: Storage) -> None:
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


def test_a_folder_is_replaced_where_names_cannot_be_exchanged(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rayloop.storage._exchange", lambda *_: False)
    test_a_folder_is_published_and_replaced_as_a_whole(storage, tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux exchanges names in one step")
def test_a_folder_that_is_replaced_is_never_missing(storage: Storage, tmp_path: Path) -> None:
    for number in range(2):
        staged(tmp_path / str(number), str(number))
    storage.publish(tmp_path / "0", "runs/r")
    done, missing = threading.Event(), list[str]()

    def read() -> None:
        while not done.is_set():
            if not os.path.exists(storage.path("runs/r/sub/data")):
                missing.append("missing")

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(1, 60):
        storage.publish(tmp_path / str(number % 2), "runs/r")
    done.set()
    reader.join()
    assert missing == []
    assert storage.read("runs/r/sub/data") == b"1"


def test_a_staged_folder_appears_when_the_block_ends_well(storage: Storage) -> None:
    with storage.staging("runs/r") as folder:
        (folder / "x").write_text("1")
        assert folder.parent == Path(storage.path("runs"))
        assert storage.names("runs") == []
    assert storage.read("runs/r/x") == b"1"

    def stage_and_fail() -> None:
        with storage.staging("runs/r") as folder:
            (folder / "x").write_text("2")
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        stage_and_fail()
    assert storage.read("runs/r/x") == b"1"
    assert [path.name for path in Path(storage.path("runs")).iterdir()] == ["r"]


def record_disk_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What is synced and renamed from now on, in order, hidden names without their random end."""
    calls: list[tuple[str, str]] = []
    sync, rename = os.fsync, os.rename

    def plain(path: str | os.PathLike[str]) -> str:
        parts = (p.rsplit(".", 1)[0] if p.startswith(".") else p for p in Path(path).parts[-2:])
        return "/".join(parts)

    def synced(handle: int) -> None:
        calls.append(("sync", plain(os.readlink(f"/proc/self/fd/{handle}"))))
        sync(handle)

    def renamed(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
        calls.append(("rename", plain(target)))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", renamed)
    monkeypatch.setattr(os, "replace", renamed)
    return calls


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_all_is_on_the_disk_before_it_is_visible_and_the_name_after(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, top = staged(tmp_path / "files", "1"), tmp_path.name
    calls = record_disk_calls(monkeypatch)
    storage.publish(files, "runs/r")
    assert calls[0] == ("sync", f"{tmp_path.parent.name}/{top}")  # the new folder `runs` in it
    assert sorted(calls[1:5]) == [
        ("sync", ".r/manifest.json"), ("sync", ".r/sub"), ("sync", "runs/.r"), ("sync", "sub/data")
    ]  # fmt: skip
    assert calls[5:] == [("rename", "runs/r"), ("sync", f"{top}/runs")]
    calls.clear()
    storage.write("runs/x", b"1")
    assert calls == [("sync", "runs/.x"), ("rename", "runs/x"), ("sync", f"{top}/runs")]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("how", ["write", "publish", "staging"])
def test_a_full_disk_is_told_and_leaves_all_as_it_was(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, code: int
) -> None:
    storage.publish(staged(tmp_path / "one", "1"), "f/x")
    storage.write("f/y", b"old")
    files = staged(tmp_path / "two", "2")

    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    def put() -> None:
        if how == "write":
            storage.write("f/y", b"new")
        elif how == "publish":
            storage.publish(files, "f/x")
        else:
            with storage.staging("f/x"):
                fail()

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(StorageFull) as caught:
        put()
    text = str(caught.value)
    name = "y" if how == "write" else "x"
    need = "The" if how == "staging" else "It needs 3 bytes; the"
    assert f"Writing {storage.path('f', name)} failed: {os.strerror(code)}. {need} file" in text
    assert "bytes free" in text
    assert ("a quota or its inodes" in text) == (how != "staging")
    assert "RAYLOOP_HOME" in text
    assert (storage.read("f/y"), storage.read("f/x/sub/data")) == (b"old", b"1")
    assert sorted(path.name for path in (tmp_path / "f").iterdir()) == ["x", "y"]


def test_a_disk_that_loses_the_end_in_silence_is_noticed(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.write("f/y", b"old")
    monkeypatch.setattr("os.fsync", lambda handle: os.ftruncate(handle, 2))
    with pytest.raises(StorageFull, match="f/y failed: only 2 of 3 bytes were written"):
        storage.write("f/y", b"new")
    assert storage.read("f/y") == b"old"


def test_other_errors_of_the_disk_stay_as_they_are(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="broken"):
        storage.write("f/y", b"new")


ON_A_SMALL_DISK = """
import sys
from pathlib import Path
from rayloop.errors import StorageFull
from rayloop.storage import Storage
disk, files = Path(sys.argv[1]), Path(sys.argv[2])
storage = Storage(str(disk / "home"))
storage.write("f/y", b"1")
for put in (lambda: storage.write("f/y", bytes(3_000_000)), lambda: storage.publish(files, "f/x")):
    try:
        put()
    except StorageFull as error:
        print(error)
assert storage.read("f/y") == b"1"
assert [path.name for path in (disk / "home" / "f").iterdir()] == ["y"]
"""


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare to mount a small disk")
def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    disk, files = tmp_path / "disk", tmp_path / "files"
    disk.mkdir()
    files.mkdir()
    (files / "big").write_bytes(bytes(3_000_000))
    mount = [
        "unshare",
        "-rm",
        "sh",
        "-c",
        'mount -t tmpfs -o size=1m tmpfs "$0" && exec "$@"',
        disk,
    ]
    if subprocess.run([*mount, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("this system does not let a user mount a small disk")
    command = [*mount, sys.executable, "-c", ON_A_SMALL_DISK, disk, files]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for line, name in zip(done.stdout.splitlines(), ("y", "x"), strict=True):
        assert f"Writing {disk}/home/f/{name} failed: No space left on device. It needs 3,000,000 "\
               f"bytes; the filesystem at {disk} has 1,0" in line  # fmt: skip


def test_remotely_the_marker_comes_last_and_errors_stay_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "root" / "f" / "x" / "sub").mkdir(parents=True)
    storage = Storage((tmp_path / "root").as_uri())
    assert storage.local_path("f") is None
    opened: list[str] = []

    class Remote:
        """A filesystem that counts what is opened."""

        def __init__(self, inner: object) -> None:
            self._inner = inner

        def open_output_stream(self, path: str, compression: None) -> object:
            """Open, and remember it."""
            opened.append(path.rsplit("/", 1)[-1])
            return self._inner.open_output_stream(path, compression)  # type: ignore[attr-defined]

        def __getattr__(self, name: str) -> object:
            return getattr(self._inner, name)

    monkeypatch.setattr(storage, "_fs", Remote(storage._fs))
    with storage.staging("f/x") as folder:
        staged(folder / "deep", "1").rename(folder / "sub")
        (folder / "sub" / "manifest.json").rename(folder / "manifest.json")
        (folder / "z").write_text("2")
        (folder / "sub" / "sub" / "data").rename(folder / "sub" / "data")
    assert opened == ["data", "z", "manifest.json"]
    assert (storage.read("f/x/sub/data"), storage.read("f/x/z")) == (b"1", b"2")

    class Full:
        """A filesystem without room."""

        def get_file_info(self, _: object) -> list[object]:
            """There is nothing."""
            return []

        def open_output_stream(self, path: str, compression: None) -> object:
            """Fail as a server that is full does."""
            raise OSError(errno.ENOSPC, "server says no")

    monkeypatch.setattr(storage, "_fs", Full())
    with pytest.raises(OSError, match="server says no"):
        storage.write("f/x/z", b"3")
    with pytest.raises(OSError, match="server says no"):
        storage.publish(staged(tmp_path / "three", "3"), "f/x")


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


@pytest.mark.parametrize("root", ["s3:/bucket/x", "S3:/bucket"])
def test_an_address_that_lacks_a_slash_is_no_folder(
    monkeypatch: pytest.MonkeyPatch, root: str
) -> None:
    monkeypatch.setenv("RAYLOOP_HOME", root)
    with pytest.raises(ConfigError, match="it lacks a slash"):
        home()


@pytest.mark.parametrize("root", ["s3a://bucket/x", "S3://bucket", "http://KEY:hush@host/x"])
def test_an_address_of_a_kind_that_is_not_known_is_told(root: str) -> None:
    with pytest.raises(ConfigError, match="cannot be read or written") as caught:
        Storage(root)
    assert "s3://BUCKET/PREFIX" in str(caught.value) and "hush" not in str(caught.value)


@pytest.mark.parametrize("is_below_a_file", [True, False])
def test_a_root_that_cannot_be_made_is_told(tmp_path: Path, is_below_a_file: bool) -> None:
    (tmp_path / "file").write_text("")
    root = Storage(str(tmp_path / "file" / "x") if is_below_a_file else "/proc/none/x")
    for write in (
        lambda: root.write("a/b", b""),
        lambda: root.create("a/b", b""),
        lambda: exclusive(root, "lock").__enter__(),
    ):
        with pytest.raises(StorageRefused, match="RAYLOOP_HOME") as caught:
            write()
        assert root.root in str(caught.value)


def test_a_folder_that_may_not_be_written_is_told_and_other_errors_are_not_changed(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(PermissionError), storage.staging("x"):
        raise PermissionError(13, "of something else")
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(StorageRefused, match="Permission denied"):
        storage.write("a", b"")
