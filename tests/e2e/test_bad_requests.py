"""What a user gets wrong: one message with the remedy, exit code 2, no traceback."""

import pytest

from tests.e2e.conftest import run_job

CASES = {
    "unknown preset": (["jobs/train.py", "laptap"], "Did you mean 'laptop'"),
    "unknown field": (["jobs/train.py", "smoke", "--train.lerning-rate", "1"], "learning-rate"),
    "value out of range": (["jobs/train.py", "smoke", "--train.epochs", "-1"], "train.epochs=-1"),
    "not a number": (["jobs/train.py", "smoke", "--train.epochs", "many"], "many"),
    "batch and workers": (["jobs/train.py", "smoke", "--train.num_workers", "3"], "63 or 66"),
    "no dataset": (["jobs/train.py", "smoke"], "python jobs/prepare_data.py"),
    "no run": (["jobs/register.py", "smoke"], "python jobs/train.py"),
    "no dataset to select on": (["jobs/select.py", "smoke"], "python jobs/prepare_data.py"),
    "limit out of range": (
        ["jobs/select.py", "smoke", "--min-accuracy", "2"],
        "select.min_accuracy=2",
    ),
    "unknown sweep": (["jobs/select.py", "smoke", "--sweep", "s"], "There is no sweep 's'"),
    "no model": (["jobs/serve.py", "smoke", "--serve.http_port", "0"], "jobs/register.py"),
    "no folder": (
        [
            "jobs/prepare_data.py",
            "smoke",
            "--data.source",
            "image-folder",
            "--data.path",
            "nowhere",
        ],
        "data.path=nowhere does not exist",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_wrong_request_is_told_in_one_message(case, home):
    words, expected = CASES[case]
    done = run_job(home, *words)
    assert done.returncode == 2, done.stdout + done.stderr
    assert expected in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert not done.stdout.strip().startswith("{")


def test_too_many_workers_is_said_at_once(turn):
    words = ["jobs/train.py", "smoke", "--train.num_workers", "32"]
    done = run_job(turn.home, *words)
    assert done.returncode == 2, done.stderr[-2000:]
    assert "train.num_workers=32" in done.stderr
    assert "--cluster.num_cpus" in done.stderr
