"""Several nodes on this machine, one of which goes away: the run goes on and no bit changes."""

import subprocess
import sys

import pytest

from tests.e2e.conftest import ROOT, Done, environment, run_job


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
    """A node is killed, the run shrinks, a node joins, the run grows."""
    return train_on_nodes(home, "killed", "kill")


def test_an_elastic_run_shrinks_and_grows_with_its_nodes(killed):
    assert killed.returncode == 0, killed.stderr[-3000:]
    result = killed.last_line
    assert result["interruptions"] == 2
    assert result["num_workers"] == 2
    assert result["joined_at"] >= result["killed_at"] + 100


def test_a_node_that_is_drained_costs_no_more_than_the_steps_since_the_notice(home, killed):
    drained = train_on_nodes(home, "drained", "drain", "stream")
    assert drained.returncode == 0, drained.stderr[-3000:]
    result = drained.last_line
    assert result["interruptions"] <= 1
    assert result["lost_steps"] < result["steps"] / 10
    assert result["feed"] == "stream"
    assert result["checkpoint_digest"] == killed.last_line["checkpoint_digest"]
