"""`make ui`: MLflow's own pages on the project's database, and a sentence where there is none."""

import json
import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from rayloop.ports import free_port
from rayloop.storage import Storage
from rayloop.tracking import TrackedDataset, Tracker
from tests.e2e.conftest import LONG, ROOT, environment

SET_UP_S = 400
PICTURE = b"\x89PNG\r\n\x1a\n"


def make_ui(home: str, *words: str) -> subprocess.CompletedProcess[str]:
    env = environment(Path()) | {"RAYLOOP_HOME": home}
    return subprocess.run(
        ["make", "ui", *words], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("home", "sentence"),
    [
        ("missing", f"no runs under {ROOT}/missing yet (no mlflow.db); make one with: "),
        ("s3://bucket/x", "RAYLOOP_HOME=s3://bucket/x is no local folder"),
    ],
)
def test_without_a_database_it_says_what_makes_one(home: str, sentence: str) -> None:
    done = make_ui(home)
    assert done.returncode == 2
    assert sentence in done.stdout
    assert not (ROOT / "missing").exists()


@contextmanager
def ui(home: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """It in a process group of its own, as in a terminal; stopped with all it started."""
    log = home / "ui.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            ["make", "ui", f"PORT={port}"],
            cwd=ROOT,
            env=environment(home),
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    try:
        until = time.monotonic() + SET_UP_S
        while not is_up(port):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.5)
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def fetch(port: int, path: str, body: dict[str, Any] | None = None, host: str = "") -> bytes:
    data = None if body is None else json.dumps(body).encode()
    headers = {"content-type": "application/json"} | ({"Host": host} if host else {})
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, headers)
    with urllib.request.urlopen(request, timeout=30) as answer:
        return bytes(answer.read())


def is_up(port: int) -> bool:
    try:
        return fetch(port, "/health") == b"OK"
    except OSError:
        return False


@LONG
def test_it_shows_runs_under_their_parent_with_their_pictures(tmp_path: Path) -> None:
    tracker = Tracker(Storage(str(tmp_path)))
    parent = tracker.start_run("sweep", {})
    data = TrackedDataset("digits", "abc", "d" * 64, "somewhere")
    child = tracker.start_run("t1", {"lr": 0.1}, parent="sweep", dataset=data)
    tracker.log_metrics(child, {"loss": 0.5}, 1)
    tracker.log_picture(child, "curves.png", PICTURE)
    port = free_port("127.0.0.1")
    with ui(tmp_path, port) as process:
        assert f"http://127.0.0.1:{port}/" in (tmp_path / "ui.log").read_text()
        assert b"<title>MLflow</title>" in fetch(port, "/")
        query = {"experiment_ids": ["1"], "filter": "tags.`mlflow.parentRunId` = '" + parent + "'"}
        (run,) = json.loads(fetch(port, "/api/2.0/mlflow/runs/search", query))["runs"]
        assert run["info"]["run_name"] == "t1"
        assert run["inputs"]["dataset_inputs"][0]["dataset"]["name"] == "digits"
        assert fetch(port, f"/get-artifact?path=curves.png&run_uuid={child}") == PICTURE
        with pytest.raises(urllib.error.HTTPError, match="403"):
            fetch(port, "/api/2.0/mlflow/experiments/get?experiment_id=1", host="example.org")
        taken = make_ui(str(tmp_path), f"PORT={port}")
        assert taken.returncode == 2
        assert f"PORT={port} is no free port" in taken.stdout
        os.killpg(process.pid, signal.SIGINT)
        process.wait(30)
        assert not is_up(port)
    assert "Traceback" not in (tmp_path / "ui.log").read_text()
