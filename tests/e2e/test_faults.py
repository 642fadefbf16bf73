"""Training that is disturbed from outside ends with the bits of a run that was left alone."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.recovery import workers_of
from rayloop.storage import Storage
from rayloop.train.checkpoint import checkpoint_paths
from tests.e2e.conftest import LONG, ROOT, Done, environment, run_job

SMOKE = (
    "jobs/train.py", "smoke", "--train.checkpoint_every_epochs", "1", "--train.floor_epochs", "0"
)  # fmt: skip


def disturbed(home: Path, run_id: str, signal_number: int, *words: str) -> Done:
    """Train, and send a signal to one worker once some steps are on the disk."""
    job = subprocess.Popen(
        [sys.executable, *SMOKE, "--run-id", run_id, *words],
        cwd=ROOT,
        env=environment(home),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_for_checkpoints(Storage(str(home)), run_id, job)
        workers = workers_of(job.pid)
        assert len(workers) == 2, f"the job has the workers {workers}"
        os.kill(workers[1], signal_number)
        out, err = job.communicate(timeout=400)
    finally:
        job.terminate()
    return Done(job.returncode, out, err)


def wait_for_checkpoints(storage: Storage, run_id: str, job: subprocess.Popen[str]) -> None:
    """Return once the run has two checkpoints."""
    until = time.monotonic() + 400
    while len(checkpoint_paths(storage, run_id)) < 2:
        assert job.poll() is None, f"the job ended with {job.returncode}"
        assert time.monotonic() < until, "no checkpoint came"
        time.sleep(0.02)


@LONG
@pytest.mark.parametrize("feed", ["resident", "stream"])
def test_a_worker_that_dies_is_replaced_and_no_bit_changes(turn, feed):
    run_id = f"worker-killed-{feed}"
    done = disturbed(turn.home, run_id, signal.SIGKILL, "--data.feed", feed)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "workers started again, going on at step" in done.stderr
    result = done.last_line
    assert result["feed"] == feed
    assert result["checkpoint_digest"] == turn.done.last_line["checkpoint_digest"]
    assert result["interruptions"] == 1
    assert 0 <= result["lost_steps"] <= 2 * 20  # an epoch has 20 steps; one may be in writing
    assert sum(result["ledger_s"].values()) == pytest.approx(
        json.loads((turn.home / f"runs/{run_id}/ledger.json").read_text())["total_s"], rel=0.01
    )


def test_a_worker_that_hangs_is_named_and_replaced_and_no_bit_changes(turn):
    words = ("--train.step_timeout_s", "20", "--data.feed", "stream")
    done = disturbed(turn.home, "worker-stopped", signal.SIGSTOP, *words)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "has been stuck in" in done.stderr
    assert done.last_line["feed"] == "stream"
    assert done.last_line["checkpoint_digest"] == turn.done.last_line["checkpoint_digest"]
    stacks = list((turn.home / "runs/worker-stopped/hangs").glob("rank-*-step-*.txt"))
    assert stacks
    assert "File " in stacks[0].read_text()


def test_a_loss_that_is_no_number_stops_at_once_and_names_the_rows(turn):
    words = ("--train.optimizer", "sgd", "--train.learning_rate", "1000", "--train.clip_norm", "0")
    done = run_job(turn.home, *SMOKE, "--run-id", "diverged", *words, "--train.warmup_share", "0")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "on the batch of training rows" in done.stderr
    assert "workers started again" not in done.stderr
