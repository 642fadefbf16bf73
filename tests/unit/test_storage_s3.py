"""Storage on an S3 server: the same promises as on a folder, and a sentence where it says no."""

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pyarrow import fs as pafs

from rayloop import remote
from rayloop import s3 as s3_module
from rayloop.errors import ConfigError, DataMissing, StorageRefused, StorageUnreachable
from rayloop.storage import Storage
from tests.s3_server import BUCKET, S3Server
from tests.unit import test_storage as local


@pytest.fixture(autouse=True)
def _keys(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3.environment().items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def storage(request: pytest.FixtureRequest) -> Storage:
    """An empty root, without a single object."""
    digest = hashlib.sha256(request.node.name.encode()).hexdigest()
    return Storage(f"s3://{BUCKET}/{digest[:12]}/home")


@pytest.mark.parametrize(
    "behaviour",
    [
        local.test_what_is_put_is_got,
        local.test_json_is_put_with_sorted_keys_and_without_nan,
        local.test_missing_and_damaged_files_are_told_apart,
        local.test_names_are_sorted_and_without_hidden_ones,
        local.test_concurrent_readers_never_see_half_a_write,
        local.test_remove_takes_a_folder_with_all_it_holds,
        local.test_a_storage_travels_between_processes,
    ],
    ids=lambda behaviour: behaviour.__name__.removeprefix("test_"),
)
def test_as_on_a_folder(storage: Storage, behaviour: Callable[[Storage], None]) -> None:
    assert not storage.is_local
    assert storage.local_path("x") is None
    behaviour(storage)


def test_large_and_oddly_named_files_are_whole(storage: Storage) -> None:
    content = os.urandom(12 << 20)
    for name in ("date=2026-11-21/a b+c~é.parquet", "x.gz"):
        storage.write(name, content)
        assert storage.read(name) == content
        assert storage.create(f"{name}-new", b"1")
        assert storage.read(f"{name}-new") == b"1"


def test_a_file_that_changes_between_two_requests_is_read_whole(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.write("x", b"short")
    files = storage._fs

    class Late:
        """Another writer puts once the size is known."""

        def open_input_file(self, path: str) -> pafs.FileSystem:
            stream = files.open_input_file(path)
            if late:
                late.pop()()
            return stream

    other = Storage(storage.root)
    monkeypatch.setattr(other, "_fs", Late())
    for content in (b"much longer", b"x", b""):
        late = [lambda content=content: storage.write("x", content)]
        assert other.read("x") == content
    storage.write("x", b"short")
    late = [lambda: storage.remove("x")]
    with pytest.raises(DataMissing):
        other.read("x")


def test_a_folder_that_is_replaced_keeps_nothing_old(storage: Storage, tmp_path: Path) -> None:
    local.staged(tmp_path / "files", "1")
    storage.publish(tmp_path / "files", "runs/r")
    storage.write("runs/r/old", b"")
    (tmp_path / "files" / "manifest.json").write_text("2")
    storage.publish(tmp_path / "files", "runs/r")
    assert storage.read("runs/r/manifest.json") == b"2"
    assert storage.names("runs/r") == ["manifest.json", "sub"]
    assert storage.names("runs") == ["r"]


WRITER = """
import json, sys, time
from pathlib import Path
from rayloop import remote
from rayloop.storage import Storage
root, staged, stop_after = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
write, done = remote.write, []
def counted(*words):
    if len(done) == stop_after:
        print("stopped", flush=True)
        time.sleep(600)
    write(*words)
    done.append(words[1])
remote.write = counted
Storage(root).publish(staged, "f/x")
print("whole", flush=True)
"""


def marked(folder: Path, text: str) -> Path:
    """A folder of three files and a manifest with their digests."""
    folder.mkdir()
    files = {f"part-{number}": f"{text}-{number}".encode() * 50_000 for number in range(3)}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    (folder / "manifest.json").write_text(json.dumps(digests))
    return folder


def look(storage: Storage) -> str:
    """What a reader of `f/x` finds: `missing`, `torn`, `mixed`, or the text of its parts."""
    try:
        manifest = storage.read_json("f/x/manifest.json")
    except DataMissing:
        return "missing"
    try:
        parts = {name: storage.read(f"f/x/{name}") for name in manifest}
    except DataMissing:
        return "torn"
    found = {name: hashlib.sha256(content).hexdigest() for name, content in parts.items()}
    return parts["part-0"][:1].decode() if found == manifest else "mixed"


@pytest.mark.parametrize("before", ["", "1"])
@pytest.mark.parametrize("stop_after", range(5))
def test_an_upload_that_is_killed_leaves_nothing_that_counts(
    storage: Storage, tmp_path: Path, stop_after: int, before: str
) -> None:
    if before:
        storage.publish(marked(tmp_path / "1", "1"), "f/x")
        storage.write("f/x/part-9", b"of an older one")
    staged = marked(tmp_path / "2", "2")
    words = [sys.executable, "-c", WRITER, storage.root, str(staged), str(stop_after)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout
        said = writer.stdout.readline().strip()
        writer.send_signal(signal.SIGKILL)
    assert (said, look(storage)) == (("whole", "2") if stop_after == 4 else ("stopped", "missing"))
    storage.publish(staged, "f/x")
    assert look(storage) == "2"
    assert storage.names("f/x") == ["manifest.json", "part-0", "part-1", "part-2"]


def test_a_reader_of_a_folder_that_is_replaced_never_takes_a_mix_for_whole(
    storage: Storage, tmp_path: Path
) -> None:
    folders = [marked(tmp_path / text, text) for text in "12"]
    done, seen = threading.Event(), list[str]()

    def read() -> None:
        while not done.is_set():
            seen.append(look(storage))

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for number in range(12):
        storage.publish(folders[number % 2], "f/x")
        time.sleep(0.05)
    done.set()
    for reader in readers:
        reader.join()
    assert {"1", "2"} & set(seen)
    assert set(seen) <= {"1", "2", "missing", "torn", "mixed"}  # each of them told apart


def test_a_folder_loses_its_marker_first(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.publish(marked(tmp_path / "1", "1"), "f/x")

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    class Cut:
        """A file system whose user stops it before the folder is deleted."""

        delete_dir = fail

        def __getattr__(self, name: str) -> object:
            return getattr(storage._fs, name)

    with pytest.raises(KeyboardInterrupt):
        remote.remove(Cut(), f"{storage._base}/f/x")
    assert look(storage) == "missing"
    assert storage.exists("f/x/part-0")
    storage.remove("f/x")
    assert not storage.exists("f/x")


MAKER = """
import sys
from rayloop.storage import Storage
storage = Storage(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
made = [n for n in range(40) if storage.create(f"claims/{n}", sys.argv[2].encode())]
print(*made)
"""


def test_of_several_processes_that_create_a_file_one_does(storage: Storage) -> None:
    pipe, names = subprocess.PIPE, "abc"
    makers = [
        subprocess.Popen(
            [sys.executable, "-c", MAKER, storage.root, name], stdin=pipe, stdout=pipe, text=True
        )
        for name in names
    ]
    for maker in makers:
        assert maker.stdout
        assert maker.stdout.readline() == "ready\n"
    for maker in makers:
        assert maker.stdin
        maker.stdin.write("\n")
        maker.stdin.flush()
    made = [maker.communicate()[0].split() for maker in makers]
    assert sorted(int(number) for part in made for number in part) == list(range(40))
    for name, part in zip(names, made, strict=True):
        assert all(storage.read(f"claims/{number}").decode() == name for number in part)


def test_without_keys_in_the_environment_create_is_a_look_and_a_put(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_module, "put_if_absent", lambda *_: None)
    assert storage.create("x", b"1")
    assert not storage.create("x", b"2")
    assert storage.read("x") == b"1"


def test_a_signature_has_the_token_too_and_no_secret_is_shown() -> None:
    settings = s3_module.S3Settings("", "us-east-1", "AKID", "secret", "token", "")
    headers = s3_module.signed_headers("h", "/b/k", b"x", settings, 0.0)
    assert headers["x-amz-date"] == "19700101T000000Z"
    assert (
        "if-none-match;x-amz-content-sha256;x-amz-date;x-amz-security-token"
        in (headers["authorization"])
    )
    assert "secret" not in repr(settings)
    assert "token" not in repr(settings)


@pytest.fixture
def silent() -> Iterator[str]:
    """A server that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


def refused(root: str) -> str:
    """What opening a root says."""
    with pytest.raises((StorageRefused, StorageUnreachable)) as caught:
        Storage(root)
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.mark.parametrize(
    ("variables", "root", "sentences"),
    [
        ({}, "s3://no-such-bucket", ["no bucket 'no-such-bucket' at http", "Create it there"]),
        ({}, "s3://no-such-bucket/x", ["no bucket 'no-such-bucket' at http", "Create it there"]),
        (
            {"AWS_ACCESS_KEY_ID": "AKNOBODY"},
            f"s3://{BUCKET}/x",
            ["does not know the key of AWS_ACCESS_KEY_ID=AKNOBODY", "Set AWS_ACCESS_KEY_ID"],
        ),
        (
            {"AWS_SECRET_ACCESS_KEY": "wrong"},
            f"s3://{BUCKET}/x",
            ["refuses the signature", "AWS_SECRET_ACCESS_KEY is not its secret"],
        ),
        (
            {"AWS_ENDPOINT_URL": "http://127.0.0.1:1"},
            f"s3://{BUCKET}/x",
            ["at http://127.0.0.1:1 does not answer", "correct AWS_ENDPOINT_URL"],
        ),
        (
            {"AWS_ENDPOINT_URL": "http://no-such-host.invalid"},
            f"s3://{BUCKET}/x",
            ["does not answer", "no-such-host.invalid", "correct AWS_ENDPOINT_URL"],
        ),
    ],
)
def test_a_root_that_does_not_open_says_why_and_what_to_do(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], root: str, sentences: list[str]
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    said = refused(root)
    assert all(sentence in said for sentence in sentences), said
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in said.replace("AWS_SECRET_ACCESS_KEY", "")


def test_a_server_that_is_silent_does_not_hold_anybody_up(
    monkeypatch: pytest.MonkeyPatch, silent: str
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", silent)
    assert f"at {silent} does not answer" in refused(f"s3://{BUCKET}/x")


def test_a_bucket_without_permission_says_what_to_allow(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    Storage(f"s3://{BUCKET}/rights").write("x", b"1")
    for name, value in s3.environment("stranger").items():
        monkeypatch.setenv(name, value)
    said = refused(f"s3://{BUCKET}/rights")
    assert f"denies ListObjectsV2 on s3://{BUCKET}/rights to AWS_ACCESS_KEY_ID=" in said
    assert "Allow its user s3:ListBucket, s3:GetObject, s3:PutObject and s3:DeleteObject" in said


def test_who_may_only_read_reads_and_is_told_at_every_write(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    Storage(f"s3://{BUCKET}/rights").write("x", b"1")
    for name, value in s3.environment("reader").items():
        monkeypatch.setenv(name, value)
    storage = Storage(f"s3://{BUCKET}/rights")
    assert storage.read("x") == b"1"
    writes: list[Callable[[], object]] = [
        lambda: storage.write("y", b"2"),
        lambda: storage.create("y", b"2"),
        lambda: storage.write("y", bytes(12 << 20)),
        lambda: storage.remove("x"),
        lambda: storage.publish(local.staged(tmp_path / "files", "1"), "f"),
    ]
    for write in writes:
        with pytest.raises(StorageRefused, match=r"denies \w+ on s3://"):
            write()
    assert storage.names("") == ["x"]


@pytest.mark.parametrize(
    "root", ["s3://", "s3:///x", "s3://key:secret@bucket", "s3://bucket/x?region=y"]
)
def test_an_address_that_is_none_is_refused(root: str) -> None:
    with pytest.raises(ConfigError, match=r"is written s3://BUCKET/PREFIX"):
        Storage(root)


def test_an_endpoint_that_is_no_url_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "127.0.0.1:9000")
    with pytest.raises(ConfigError, match="AWS_ENDPOINT_URL=127.0.0.1:9000 is not the URL"):
        Storage(f"s3://{BUCKET}")
