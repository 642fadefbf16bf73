"""Two runs of different sizes: limits decide which one is registered, or that none is."""

import shutil
from pathlib import Path

import pytest

from tests.e2e.conftest import Turn, run_job


@pytest.fixture(scope="module")
def home(turn: Turn, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pipeline's home with a second, smaller run."""
    home = tmp_path_factory.mktemp("select") / "home"
    shutil.copytree(turn.home, home)
    words = ["--model.widths", "8", "16", "--run-id", "small", "--train.epochs", "16"]
    done = run_job(home, "jobs/train.py", "smoke", *words)
    assert done.returncode == 0, done.stderr[-4000:]
    return home


def test_a_limit_on_bytes_registers_the_smaller_run(home: Path) -> None:
    words = ["smoke", "--max-bytes", "15000", "--max-latency-ms", "50", "--runs", "turn", "small"]
    gate = ["--quantize.min-agreement", "0.9", "--quantize.max-accuracy-drop", "0.05"]
    done = run_job(home, "jobs/select.py", *words, *gate, "--registry.min-margin-over-linear", "-1")
    assert done.returncode == 0, done.stderr[-4000:]
    line = done.last_line
    assert line["chosen"]["run_id"] == "small"
    assert line["chosen"]["size_bytes"] <= 15000 and line["chosen"]["latency_ms_b1"] <= 50
    assert {point["run_id"] for point in line["front"]} >= {"small"}
    assert line["candidates"] == 4
    assert int(line["version"]) > 1 and (line["alias"], line["gate"]) == ("champion", "pass")
    assert line["test_accuracy"] > 0.5
    assert Path(line["picture"]).read_bytes().startswith(b"\x89PNG")
    assert "turn/int8" in done.stderr and "chosen" in done.stderr

    done = run_job(home, "jobs/select.py", *words, *gate, "--min-accuracy", "1")
    assert done.returncode == 1
    assert "None of the 2 candidates meets --max-latency-ms 50 and --min-accuracy 1" in done.stderr
    assert "2 of 2 runs were compared before" in done.stderr
    assert "Traceback" not in done.stderr and not done.stdout
