"""Jobs as a user runs them: a subprocess from the repository's root, in a home of its own."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

LONG = pytest.mark.skipif(
    not os.environ.get("RAYLOOP_LONG"),
    reason="CI has no minutes for it; RAYLOOP_LONG=1 runs it",
)
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str

    @property
    def last_line(self) -> dict[str, Any]:
        return json.loads(self.stdout.strip().splitlines()[-1])


def environment(home: Path) -> dict[str, str]:
    dropped = ("RAY_AUTH_MODE", "RAY_ADDRESS", "PYTHONPATH")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return {**kept, "RAYLOOP_HOME": str(home)}


def run(words: Sequence[object], env: Mapping[str, str], timeout_s: float = 540) -> Done:
    """Run a command from the repository's root to its end."""
    done = subprocess.run(
        list(map(str, words)), cwd=ROOT, env=env, capture_output=True, text=True,
        timeout=timeout_s, check=False,
    )  # fmt: skip
    return Done(done.returncode, done.stdout, done.stderr)


def run_job(home: Path, *words: str) -> Done:
    return run([sys.executable, *words], environment(home))


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with the data of the smoke preset and nothing else; copied, never used."""
    home = tmp_path_factory.mktemp("prepared")
    done = run_job(home, "jobs/prepare_data.py", "smoke")
    assert done.returncode == 0, done.stderr[-2000:]
    return home


@pytest.fixture(scope="module")
def data_home(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home of the file's own that has data."""
    return Path(shutil.copytree(prepared, tmp_path_factory.mktemp("home") / "home"))


@dataclass(frozen=True)
class Turn:
    """A pipeline run of the smoke preset: its home, its report and what it printed."""

    home: Path
    report: Path
    done: Done


@pytest.fixture(scope="session")
def turn(tmp_path_factory: pytest.TempPathFactory) -> Turn:
    home = tmp_path_factory.mktemp("home")
    report = home / "report.html"
    words = ["--serve.http_port", "0", "--pipeline.report", str(report), "--run-id", "turn"]
    done = run_job(home, "jobs/pipeline.py", "smoke", *words)
    assert done.returncode == 0, done.stderr[-4000:]
    return Turn(home, report, done)
