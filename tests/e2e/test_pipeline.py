"""The whole pipeline on the smoke preset, and what it left, used as a user would."""

import io
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from tests.e2e.conftest import LONG, ROOT, environment, run_job

KEYS = {
    "dataset_digest",
    "test_accuracy_fp32",
    "test_accuracy_int8",
    "size_ratio",
    "speedup_b1",
    "model",
    "version",
    "served_accuracy",
    "served_requests",
    "failed_requests",
    "p50_ms",
    "p99_ms",
}


def test_pipeline_serves_what_it_measured_offline(turn):
    summary = turn.done.last_line
    assert set(summary) >= KEYS
    assert summary["failed_requests"] == 0
    assert summary["different_answers"] == 0
    assert summary["served_accuracy"] == summary["offline_accuracy_same_rows"]
    assert summary["test_accuracy_fp32"] > 0.9
    assert turn.report.stat().st_size > 50_000


def test_pipeline_leaves_the_files_the_contract_names(turn):
    run = turn.home / "runs" / "turn"
    for name in ("config.json", "result.json", "ledger.json", "curves.png"):
        assert (run / name).is_file(), name
    assert list((run / "checkpoints").iterdir())
    release = json.loads((turn.home / "models/classifier/1/release.json").read_text())
    assert release["dataset"]["digest"] == turn.done.last_line["dataset_digest"]
    assert (turn.home / "mlflow.db").is_file()


def test_a_finished_run_is_not_trained_again(turn):
    done = run_job(turn.home, "jobs/train.py", "smoke", "--run-id", "turn")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "finished already" in done.stderr
    assert done.last_line["checkpoint_digest"] == turn.done.last_line["checkpoint_digest"]


def test_run_id_of_other_settings_is_refused_with_the_difference(turn):
    words = ["--run-id", "turn", "--train.learning_rate", "0.5"]
    done = run_job(turn.home, "jobs/train.py", "smoke", *words)
    assert done.returncode == 2
    assert "train.learning_rate was 0.01, now 0.5" in done.stderr
    assert "Traceback" not in done.stderr


@LONG
def test_driver_killed_in_training_continues_to_the_same_weights(turn):
    """SIGKILL after the first checkpoint, then the same command: the digest of the unbroken run.

    As tests/e2e/test_s3_home.py shows it with a home on S3.
    """
    command = [sys.executable, "jobs/train.py", "smoke", "--run-id", "killed"]
    first = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(turn.home),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    checkpoints = turn.home / "runs" / "killed" / "checkpoints"
    deadline = time.monotonic() + 300
    while not list(checkpoints.glob("step-*")):
        assert first.poll() is None, "the job ended before its first checkpoint"
        assert time.monotonic() < deadline, "no checkpoint"
        time.sleep(0.05)
    first.kill()
    first.wait()
    assert not (turn.home / "runs" / "killed" / "result.json").exists()
    done = run_job(turn.home, *command[1:])
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.last_line["resumed_at_step"] > 0
    assert done.last_line["checkpoint_digest"] == turn.done.last_line["checkpoint_digest"]


def png_of(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("engine", ["onnx", "torch"])
def test_serve_job_answers_a_png_and_stops_on_sigterm(turn, engine):
    words = ["smoke", "--serve.http_port", "0", "--serve.engine", engine]
    process = subprocess.Popen(
        [sys.executable, "jobs/serve.py", *words],
        cwd=ROOT,
        env=environment(turn.home),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        url = None
        for line in process.stdout:
            found = re.match(r"(http://\S+) serves", line)
            if found:
                url = found.group(1)
                break
        assert url, process.communicate()[1][-2000:]
        digits = load_digits()
        pixels = np.rint(digits.images[0] * (255 / 16)).astype(np.uint8)
        request = urllib.request.Request(f"{url}/predict", data=png_of(pixels), method="POST")
        with urllib.request.urlopen(request, timeout=30) as answer:
            body = json.loads(answer.read())
        assert body["label"] == str(digits.target[0])
        assert len(body["probabilities"]) == 10
        broken = urllib.request.Request(f"{url}/predict", data=png_of(pixels)[:40], method="POST")
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(broken, timeout=30)
        assert refused.value.code == 400
        assert "error" in json.loads(refused.value.read())
        refused.value.close()
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=120)
    assert process.returncode == 0


def test_report_refers_to_nothing_outside_itself(turn):
    page = turn.report.read_text()
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", page)


def test_port_in_use_is_said(turn):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for job in ("jobs/serve.py", "jobs/pipeline.py"):
            done = run_job(turn.home, job, "smoke", "--serve.http_port", str(port))
            assert done.returncode == 2, done.stderr[-2000:]
            assert f"serve.http_port={port}" in done.stderr
            assert "Traceback" not in done.stderr
            assert "prepare data" not in done.stderr


def test_damaged_shard_is_refused(turn, tmp_path: Path):
    """A copy of the home with one byte changed in a shard."""
    home = tmp_path / "home"
    shutil.copytree(turn.home / "datasets", home / "datasets")
    shard = next(home.glob("datasets/digits/*/train/*.arrow"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(bytes(content))
    done = run_job(home, "jobs/train.py", "smoke")
    assert done.returncode == 2, done.stderr[-2000:]
    assert "does not match the digest" in done.stderr
    assert "Traceback" not in done.stderr
