"""Several nodes on this machine, one of which goes away: the run goes on and no bit changes."""

import subprocess
import sys

import pytest

from tests.e2e.conftest import LONG, ROOT, Done, environment, run_job


def train_on_nodes(home, run_id: str, *words: str) -> Done:
    """Run tests/e2e/nodes.py and give how it ended."""
    done = subprocess.run(
        [sys.executable, "tests/e2e/nodes.py", str(home), run_id, *words],
        cwd=ROOT,
        env=environment(home),
        capture_output=True,
        text=True,
        timeout=540,
        check=False,
    )
    return Done(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("nodes")
    done = run_job(home, "jobs/prepare_data.py", "smoke")
    assert done.returncode == 0, done.stderr[-2000:]
    return home


@pytest.fixture(scope="module")
def killed(home) -> Done:
    """A node is killed and the run shrinks; a node joins, and the run may grow."""
    return train_on_nodes(home, "killed", "kill", "resident")


def test_an_elastic_run_goes_on_with_the_node_that_is_left(killed):
    """Whether it also grows before its end depends on how fast the machine trains."""
    assert killed.returncode == 0, killed.stderr[-3000:]
    result = killed.last_line
    assert result["interruptions"] >= 1
    assert result["num_workers"] == result["interruptions"]  # one, or two again
    assert result["lost_steps"] < result["steps"] / 10
    assert result["board_is_here"]


@LONG
def test_a_node_that_is_drained_costs_no_more_than_the_steps_since_the_notice(home, killed):
    drained = train_on_nodes(home, "drained", "drain", "stream")
    assert drained.returncode == 0, drained.stderr[-3000:]
    result = drained.last_line
    assert result["lost_steps"] < result["steps"] / 10
    assert result["feed"] == "stream"
    assert result["checkpoint_digest"] == killed.last_line["checkpoint_digest"]
