"""The tune job as a user runs it: killed and continued, and asked for what it cannot do."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from rayloop.presets import smoke
from rayloop.storage import Storage
from rayloop.tracking import Tracker
from rayloop.tune.declare import parse_space
from rayloop.tune.suggestion import generator
from rayloop.tune.trial import Trial, load_trials
from tests.e2e.conftest import ROOT, environment, run_job

JOB = ("jobs/tune.py", "smoke", "--run-id", "sweep-killed", "--tune.search", "random")
SIZE = ("--tune.trials", "6", "--tune.stopping", "none", "--train.epochs", "3")
KEYS = {"run_id", "best_config", "best_score", "num_trials", "budget_epochs", "seconds"}


def test_a_sweep_that_is_killed_goes_on_and_trains_no_finished_trial_again(turn):
    storage = Storage(str(turn.home))
    job = subprocess.Popen(
        [sys.executable, *JOB, *SIZE], cwd=ROOT, env=environment(turn.home),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        wait_for_half(storage, job)
    finally:
        job.kill()  # SIGKILL
        job.wait()
    before = {t.number: t for t in load_trials(storage, "sweep-killed") if t.is_over}
    files = {number: result_of(turn.home, t) for number, t in before.items()}
    made_at = {number: file.stat().st_mtime_ns for number, file in files.items()}

    done = run_job(turn.home, *JOB, *SIZE)
    assert done.returncode == 0, done.stderr[-3000:]
    assert set(done.last_line) >= KEYS
    assert done.last_line["num_trials"] == 6
    trials = load_trials(storage, "sweep-killed")
    assert [t.status for t in trials] == ["finished"] * 6
    # The set is what the seed alone says; an undisturbed sweep has the same.
    space = parse_space(smoke().tune.space, smoke())
    expected = [space.sample(generator(0, number)) for number in range(6)]
    assert [t.assignment for t in trials] == [pytest.approx(each) for each in expected]
    for number, trial in before.items():
        assert trials[number] == trial
        assert files[number].stat().st_mtime_ns == made_at[number]

    tracker = Tracker(storage)
    runs = {run.run_id: run for run in tracker.runs(parent="sweep-killed")}
    assert len(runs) == 6
    for trial in trials:
        points = tracker._client.get_metric_history(
            runs[trial.run_id].mlflow_run_id, "val_accuracy"
        )
        assert [p.step for p in points] == [int(record["step"]) for record in trial.records]
    best = max(trials, key=lambda t: t.figures["val_accuracy"])
    assert done.last_line["best_score"] == best.figures["val_accuracy"]


def result_of(home: Path, trial: Trial) -> Path:
    return home / "runs" / trial.run_id / "result.json"


def wait_for_half(storage: Storage, job: "subprocess.Popen[bytes]") -> None:
    """Return once three trials are over and another is under way."""
    until = time.monotonic() + 400
    while True:
        trials = load_trials(storage, "sweep-killed")
        over = sum(trial.is_over for trial in trials)
        if over >= 3 and len(trials) > over:
            return
        assert job.poll() is None, f"the job ended with {job.returncode}"
        assert time.monotonic() < until, f"only {over} trials are over"
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--tune.space", "train.lerning_rate=log(0.1, 1)"), "Did you mean train.learning_rate?"),
        (("--tune.objectives", "val_acuracy"), "Did you mean val_accuracy?"),
    ],
)
def test_a_typo_is_one_message_at_once(home, words, told):
    done = run_job(home, "jobs/tune.py", "smoke", *words)
    assert done.returncode == 2
    assert told in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (home / "runs").exists()


def test_a_sweep_of_another_space_is_refused(turn):
    storage = Storage(str(turn.home))
    storage.write_json("runs/other/sweep.json", {"tune": {"trials": 1, "seed": 9}})
    done = run_job(turn.home, "jobs/tune.py", "smoke", "--run-id", "other")
    assert done.returncode == 2
    [message] = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "Sweep 'other' exists with other settings" in message
    assert "Traceback" not in done.stderr
