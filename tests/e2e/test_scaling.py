"""The scaling job as a user runs it: killed half-way, continued, refused where it must be."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rayloop.presets import smoke
from rayloop.storage import Storage
from tests.datasets import write_dataset
from tests.e2e.conftest import LONG, ROOT, environment, run_job

WORDS = (
    "jobs/scaling.py", "smoke", "--run-id", "much", "--train.epochs", "2", "--scaling.seeds", "2",
    "--scaling.data-shares", "0.25", "0.5", "1", "--scaling.width-factors",
    "--scaling.batch-factors", "0.5", "1", "2",
)  # fmt: skip
RUNS = 10  # five points, the base on both axes, two seeds each


def results(home: Path) -> dict[str, tuple[int, bytes]]:
    """The finished runs' records: when they were written, and what they say."""
    return {
        path.parent.name: (path.stat().st_mtime_ns, path.read_bytes())
        for path in home.glob("runs/much-*/result.json")
    }


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with rows, and a scaling job in it that was killed with some runs done."""
    home = tmp_path_factory.mktemp("home")
    sizes = {"train": 640, "val": 150, "test": 50}
    write_dataset(Storage(str(home)), smoke().data.dataset_name, sizes)
    job = subprocess.Popen(
        [sys.executable, *WORDS], cwd=ROOT, env=environment(home), start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    until = time.monotonic() + 300
    try:
        while len(results(home)) < RUNS // 3:
            assert job.poll() is None, f"the job ended with {job.returncode}"
            assert time.monotonic() < until, "no run was finished"
            time.sleep(0.02)
    finally:
        os.kill(job.pid, signal.SIGKILL)
        job.wait()
    return home


@LONG
def test_a_killed_job_goes_on_and_trains_nothing_twice(home):
    before = results(home)
    assert 0 < len(before) < RUNS
    done = run_job(home, *WORDS)
    assert done.returncode == 0, done.stderr[-4000:]
    after = results(home)
    assert len(after) == RUNS
    assert {name: after[name] for name in before} == before
    assert "runs are done already" in done.stderr
    last = done.last_line
    assert {
        "run_id", "points", "data_doubling", "parameters_doubling", "batch_doubling",
        "trained_epochs", "seconds", "picture",
    } <= set(last)  # fmt: skip
    assert [point["name"] for point in last["points"]] == [
        "data-0.25", "data-0.5", "base", "batch-0.5", "batch-2"
    ]  # fmt: skip
    assert last["parameters_doubling"] is None
    for axis in ("data", "batch"):
        told = last[f"{axis}_doubling"]
        assert 0 <= told["low"] <= told["predicted"] <= told["high"] <= 1
        assert told["model"]
    assert last["data_doubling"]["x_then"] == 2 * last["data_doubling"]["x_now"]
    epochs = (0.25 + 0.5 + 1 + 1 + 1) * 2 * 2
    assert last["trained_epochs"] == pytest.approx(epochs, rel=0.1)
    kept = json.loads((home / "runs/much/scaling.json").read_text())
    assert set(kept["doublings"]) == {"data", "batch"}
    assert Path(last["picture"]).read_bytes().startswith(b"\x89PNG")
    assert not (home / "runs/latest.json").exists()
