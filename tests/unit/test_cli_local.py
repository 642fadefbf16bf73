"""`rayloop up` and `down`: a note that is damaged or old harms nobody."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rayloop.cli import local
from rayloop.cli.main import main


@pytest.fixture
def folder(home: Path) -> Path:
    (home / "local").mkdir()
    return home / "local"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"gcs_port": 1}'])
def test_a_damaged_note_is_told_and_removed(
    folder: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "ray.json").write_text(text)
    assert local.note() is None
    with pytest.raises(SystemExit) as caught:
        main(["down"])
    assert caught.value.code == 1
    assert "ray.json is damaged" in capsys.readouterr().err
    main(["down"])  # and then it is as if nothing had been started


def test_down_ends_what_up_started_and_nobody_who_has_its_port_now(folder: Path) -> None:
    """Ports are used again; the scratch folder of another Ray is another one."""
    scratch = folder / "scratch"
    scratch.mkdir()
    note = {"gcs_port": 45678, "dashboard_port": 1, "dashboard_url": "http://127.0.0.1:1",
            "scratch": str(scratch)}  # fmt: skip
    (folder / "ray.json").write_text(json.dumps(note))
    words = [sys.executable, "-c", "import time; print(flush=True); time.sleep(600)"]
    processes = {
        name: subprocess.Popen(
            [*words, word], env={**os.environ, "RAYLOOP_SCRATCH": told}, stdout=subprocess.PIPE
        )
        for name, word, told in (
            ("ours", "--gcs-address=10.0.0.1:45678", str(scratch)),
            ("client server", "--address=10.0.0.1:45678", str(scratch)),
            ("another's", "--gcs-address=10.0.0.1:45678", "/tmp/another"),
            ("another port", "--gcs-address=10.0.0.1:45679", str(scratch)),
        )
    }
    try:
        for process in processes.values():
            assert process.stdout
            process.stdout.readline()  # it runs
        assert local.note() == note
        main(["down"])
        for name in ("ours", "client server"):
            assert processes[name].wait(5) is not None
        assert processes["another's"].poll() is None
        assert processes["another port"].poll() is None
    finally:
        for process in processes.values():
            process.kill()
            process.communicate()
    assert not scratch.exists() and not (folder / "ray.json").exists()


def test_an_old_note_whose_ray_is_gone_is_no_ray(folder: Path) -> None:
    note = {"gcs_port": 45678, "dashboard_url": "http://127.0.0.1:1", "scratch": "/tmp/none"}
    (folder / "ray.json").write_text(json.dumps(note))
    assert local.note() is None
    main(["down"])
    assert not (folder / "ray.json").exists()


class Ray:
    """Stands in for `subprocess.run` of `ray start`: it starts a process, and then this happens."""

    def __init__(self, then: BaseException | None) -> None:
        self.then = then
        self.env: dict[str, str] = {}
        self.started: subprocess.Popen[bytes] | None = None

    def __call__(self, words: list[str], env: dict[str, str], **_: object) -> object:
        self.env = env
        port = next(word for word in words if word.startswith("--port=")).partition("=")[2]
        sleeper = [sys.executable, "-c", "import time; print(flush=True); time.sleep(600)"]
        self.started = subprocess.Popen(
            [*sleeper, f"--gcs_server_port={port}"], env=env, stdout=subprocess.PIPE
        )
        assert self.started.stdout
        self.started.stdout.readline()
        if self.then is not None:
            raise self.then
        return subprocess.CompletedProcess(words, 0, "", "")


@pytest.mark.parametrize("then", [KeyboardInterrupt(), SystemExit(143)])
def test_an_up_that_is_interrupted_leaves_no_half_of_a_ray(
    home: Path, monkeypatch: pytest.MonkeyPatch, then: BaseException
) -> None:
    ray = Ray(then)
    monkeypatch.setattr("rayloop.cli.local.subprocess.run", ray)
    with pytest.raises(type(then)):
        local.run_up(argparse.Namespace(), [])
    assert ray.started is not None and ray.started.wait(20) is not None
    assert local.note() is None
    assert not Path(ray.env["RAYLOOP_SCRATCH"]).exists()


def test_ray_gets_its_own_token_whatever_the_shell_knows_of_others(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/of/another/cluster")
    monkeypatch.setenv("RAY_LOG_TO_STDERR", "0")
    ray = Ray(None)
    monkeypatch.setattr("rayloop.cli.local.subprocess.run", ray)
    local.run_up(argparse.Namespace(), [])
    try:
        assert ray.env["RAY_AUTH_MODE"] == "token"
        assert ray.env["RAY_AUTH_TOKEN_PATH"] == str(home / "local" / "auth_token")
        assert ray.env["RAY_LOG_TO_STDERR"] == "0"  # what is not of another Ray stays
    finally:
        local.run_down(argparse.Namespace(), [])
