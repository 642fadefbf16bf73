"""What the stages add to an S3 home: cut-off checkpoints, copies of shards, pictures, locks."""

import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from rayloop import node_cache
from rayloop.data.versions import read_split
from rayloop.errors import ConfigError, Corrupt, DataMissing, RequestError, StorageUnreachable
from rayloop.locks import exclusive
from rayloop.storage import Storage
from rayloop.tracking import Tracker
from rayloop.tracking_client import open_client
from rayloop.train.checkpoint import checkpoint_paths, newest_good, save_checkpoint
from tests.datasets import write_dataset
from tests.s3_server import BUCKET, S3Server

ABOUT = {"config_digest": "c1", "dataset_digest": "d1"}


@pytest.fixture
def storage(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Storage:
    """A root of its own on the server, and a temp folder of its own here."""
    for name, value in s3.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return Storage(f"s3://{BUCKET}/stages/{request.node.name}")


# --- checkpoints


def save(storage: Storage, step: int, keep: int = 2) -> str:
    return save_checkpoint(storage, "r", step, {"step": step}, ABOUT, keep)


def test_a_checkpoint_cut_off_is_none_and_the_next_one_clears_it_away(storage: Storage) -> None:
    storage.write("runs/r/checkpoints/step-00000001/state.pt", b"half")
    assert newest_good(storage, "r") is None
    save(storage, 2)
    storage.write("runs/r/checkpoints/step-00000003/state.pt", b"half")
    found = newest_good(storage, "r")
    assert found is not None
    assert found.step == 2
    save(storage, 3)
    save(storage, 4)
    assert storage.names("runs/r/checkpoints") == ["step-00000003", "step-00000004"]
    found = newest_good(storage, "r")
    assert found is not None
    assert found.state == {"step": 4}


def test_a_whole_checkpoint_that_is_damaged_is_still_told(storage: Storage) -> None:
    storage.write(f"{save(storage, 2)}/state.pt", b"damaged")
    assert len(checkpoint_paths(storage, "r")) == 1
    with pytest.raises(Corrupt, match="None of the 1 checkpoints in s3://"):
        newest_good(storage, "r")


# --- shards


def test_shards_are_mapped_from_one_copy_and_fetched_anew_when_it_is_damaged(
    storage: Storage, tmp_path: Path
) -> None:
    here = Storage(str(tmp_path / "here"))
    expected = read_split(here, write_dataset(here), "train").images
    dataset = write_dataset(storage)
    assert (read_split(storage, dataset, "train").images == expected).all()
    shard = next(shard for shard in dataset.shards if shard.split == "train")
    (copy,) = node_cache.cache_folder().iterdir()
    assert copy.name == shard.sha256

    copy.write_bytes(bytes(shard.size_bytes))
    assert (read_split(storage, dataset, "train").images == expected).all()
    assert not copy.exists()
    assert (read_split(storage, dataset, "train").images == expected).all()
    storage.remove(shard.path)
    assert (read_split(storage, dataset, "train").images == expected).all()
    node_cache.drop(shard.sha256)
    with pytest.raises(DataMissing):
        read_split(storage, dataset, "train")


def test_a_shard_damaged_at_its_place_is_told(storage: Storage) -> None:
    dataset = write_dataset(storage)
    for shard in dataset.shards:
        storage.write(shard.path, b"damaged")
    with pytest.raises(Corrupt, match="does not match the digest in its manifest"):
        read_split(storage, dataset, "train")


def test_copies_are_bounded_and_the_oldest_go(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_cache, "MOST_BYTES", 2500)
    for name in "abcd":
        storage.write(name, name.encode() * 1000)
    for name in ("a", "b", "a", "c"):
        copy = node_cache.local_copy(storage, name, f"sha-{name}", 1000)
        assert copy is not None
        assert copy.read_bytes() == name.encode() * 1000
        time.sleep(0.02)
    assert {path.name for path in node_cache.cache_folder().iterdir()} == {"sha-a", "sha-c"}
    assert node_cache.local_copy(storage, "d", "sha-d", 3000) is None


def test_a_folder_of_somebody_else_is_not_used(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = node_cache.cache_folder()
    folder.mkdir()
    monkeypatch.setattr("os.getuid", lambda: folder.stat().st_uid + 1)
    monkeypatch.setattr(node_cache, "cache_folder", lambda: folder)
    assert node_cache.local_copy(storage, "a", "sha", 1) is None


# --- tracking


def test_a_picture_of_a_run_goes_to_s3_without_amazons_package(
    storage: Storage, tmp_path: Path
) -> None:
    tracker = Tracker(storage, f"sqlite:///{tmp_path}/mlflow.db")
    run = tracker.start_run("r", {})
    tracker.log_picture(run, "curves.png", b"png")
    assert storage.read(f"mlartifacts/{run}/artifacts/curves.png") == b"png"
    moved = Tracker(Storage(f"{storage.root}/moved"), f"sqlite:///{tmp_path}/mlflow.db")
    moved.log_picture(run, "more/curves.png", b"png")
    assert storage.read(f"mlartifacts/{run}/artifacts/more/curves.png") == b"png"


def test_a_remote_root_needs_a_server_which_the_environment_may_name(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="Set MLFLOW_TRACKING_URI, or --registry.tracking_uri"):
        Tracker(storage)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    Tracker(storage).start_run("r", {})
    assert Tracker(Storage(str(tmp_path / "home"))).find("r") is not None
    assert not (tmp_path / "home" / "mlflow.db").exists()


@pytest.mark.parametrize("uri", ["http://127.0.0.1:1", "http://no-such-host.invalid"])
def test_a_tracking_server_that_is_not_there_is_told(tmp_path: Path, uri: str) -> None:
    with pytest.raises(StorageUnreachable, match="does not answer .*correct MLFLOW_TRACKING_URI"):
        open_client(Storage(str(tmp_path)), uri)


def test_a_password_of_a_tracking_server_is_not_shown(tmp_path: Path) -> None:
    class Locked(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/health" else 401)
            self.send_header("content-length", "0")
            self.end_headers()

        do_POST = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Locked) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        host = f"127.0.0.1:{server.server_port}"
        with pytest.raises(Corrupt, match=f"http://{host}, does not open") as caught:
            open_client(Storage(str(tmp_path)), f"http://somebody:hidden@{host}")
        server.shutdown()
    assert "hidden" not in str(caught.value) and "somebody" not in str(caught.value)


# --- locks


def test_a_remote_root_is_locked_among_the_processes_of_this_machine(storage: Storage) -> None:
    with (
        exclusive(storage, "sweep", "busy"),
        pytest.raises(RequestError, match="busy"),
        exclusive(storage, "sweep", "busy"),
    ):
        pass
    with (
        exclusive(storage, "sweep", "busy"),
        exclusive(Storage(f"{storage.root}/other"), "sweep", "busy"),
    ):
        pass
