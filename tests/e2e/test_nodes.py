"""Several nodes on this machine, one of which goes away: the run goes on and no bit changes."""

import sys

import pytest

from tests.e2e.conftest import LONG, Done, environment, run


def train_on_nodes(home, run_id: str, *words: str) -> Done:
    """Run tests/e2e/nodes.py and give how it ended."""
    command = [sys.executable, "tests/e2e/nodes.py", home, run_id, *words]
    return run(command, environment(home))


@pytest.fixture(scope="module")
def killed(data_home) -> Done:
    """A node is killed and the run shrinks; a node joins, and the run may grow."""
    return train_on_nodes(data_home, "killed", "kill", "resident")


@LONG
def test_an_elastic_run_goes_on_with_the_node_that_is_left(killed):
    """As tests/e2e/test_hosts.py shows it on hosts of their own, where it also grows again."""
    assert killed.returncode == 0, killed.stderr[-3000:]
    result = killed.last_line
    assert result["interruptions"] >= 1
    assert result["num_workers"] == result["interruptions"]  # one, or two again
    assert result["lost_steps"] < result["steps"] / 10
    assert result["board_is_here"]


@LONG
def test_a_node_that_is_drained_costs_no_more_than_the_steps_since_the_notice(data_home, killed):
    drained = train_on_nodes(data_home, "drained", "drain", "stream")
    assert drained.returncode == 0, drained.stderr[-3000:]
    result = drained.last_line
    assert result["lost_steps"] < result["steps"] / 10
    assert result["feed"] == "stream"
    assert result["checkpoint_digest"] == killed.last_line["checkpoint_digest"]
