"""The batch prediction job as a user runs it: killed, continued, and told what it cannot do."""

import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.e2e.conftest import LONG, ROOT, environment, run_job

SMALL_FILES = ["--batch.rows_per_file", "8", "--batch.batch_rows", "4"]


def rows_of(home: Path, name: str) -> dict[str, str]:
    """SHA-256 of each file of a result."""
    folder = home / "predictions" / name / "rows"
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_the_test_split_gets_the_answers_that_were_measured_and_served(turn):
    done = run_job(turn.home, "jobs/batch_predict.py", "smoke")
    assert done.returncode == 0, done.stderr[-3000:]
    line, pipeline = done.last_line, turn.done.last_line
    assert line["accuracy"] == pipeline["test_accuracy_int8"]
    assert (line["model"], line["version"]) == (pipeline["model"], pipeline["version"])
    assert line["errors"] == 0 and line["files_done_before"] == 0
    release = json.loads((turn.home / "models/classifier/1/release.json").read_text())
    assert line["digest"] == release["digest"]
    table = pq.read_table(Path(line["output"]) / "rows")
    assert table["row_id"].to_pylist() == list(range(line["rows"]))


@LONG
def test_driver_killed_in_the_middle_continues_to_the_same_files(turn):
    words = ["jobs/batch_predict.py", "smoke", "--batch.input", "dataset:digits/train"]
    whole = run_job(turn.home, *words, *SMALL_FILES, "--batch.output", "whole")
    assert whole.returncode == 0, whole.stderr[-3000:]
    command = [sys.executable, *words, *SMALL_FILES, "--batch.output", "killed"]
    first = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(turn.home),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    rows = turn.home / "predictions" / "killed" / "rows"
    deadline = time.monotonic() + 120
    while not list(rows.glob("part-*")):
        assert first.poll() is None, "the job ended before its first file"
        assert time.monotonic() < deadline, "no file"
        time.sleep(0.002)
    first.kill()
    first.wait()
    assert not (rows.parent / "manifest.json").exists()
    done = run_job(turn.home, *command[1:])
    assert done.returncode == 0, done.stderr[-3000:]
    assert 0 < done.last_line["files_done_before"] < done.last_line["files"]
    assert done.last_line["accuracy"] == whole.last_line["accuracy"]
    assert rows_of(turn.home, "killed") == rows_of(turn.home, "whole")


CASES = {
    "input that is not there": (["--batch.input", "nowhere"], "does not exist"),
    "unknown field": (["--batch.rows", "7"], "batch.rows-per-file"),
}
"""The rest of what can be wrong is told in tests/unit/test_serve_offline.py."""


@pytest.mark.parametrize("case", CASES)
def test_wrong_request_is_told_in_one_message(case, turn):
    words, expected = CASES[case]
    done = run_job(turn.home, "jobs/batch_predict.py", "smoke", *words)
    assert done.returncode == 2, done.stdout + done.stderr
    assert expected in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert not done.stdout.strip().startswith("{")
