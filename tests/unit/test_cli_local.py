"""`rayloop up` and `down`: a note that is damaged or old harms nobody."""

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
