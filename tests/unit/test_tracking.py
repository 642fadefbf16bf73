"""Runs in the tracking database: under their parent, the same after a restart, no step twice."""

import json
import shutil
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from rayloop import __version__, tracking
from rayloop.code_version import CodeVersion
from rayloop.errors import DataMissing
from rayloop.storage import Storage
from rayloop.tracking import TrackedDataset, Tracker

DATASET = TrackedDataset("digits", "abc", "d" * 64, "/data/digits/abc")
PICTURE = b"\x89PNG..."


class HandClock:
    """Stands still until it is told the time."""

    def __init__(self) -> None:
        self.seconds = 1_000_000.0

    def now(self) -> float:
        return self.seconds

    def monotonic(self) -> float:
        return self.seconds


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root whose database is set up; setting one up takes seconds."""
    root = tmp_path_factory.mktemp("template")
    Tracker(Storage(str(root))).find("any")
    shutil.copy(root / "mlflow.db", root / "empty.db")
    return root


@pytest.fixture
def storage(template: Path, tmp_path: Path) -> Storage:
    shutil.copy(template / "empty.db", tmp_path / "mlflow.db")
    return Storage(str(tmp_path))


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


@pytest.fixture
def tracker(storage: Storage, clock: HandClock) -> Tracker:
    return Tracker(storage, clock=clock)


def curve(tracker: Tracker, run_id: str, name: str) -> list[tuple[int, float]]:
    history = tracker._client.get_metric_history(run_id, name)
    return sorted((metric.step, metric.value) for metric in history)


def use_code(monkeypatch: pytest.MonkeyPatch, commit: str, has_changes: bool = False) -> None:
    code = CodeVersion(version="1.2", commit=commit, has_changes=has_changes)
    monkeypatch.setattr(tracking, "code_version", lambda: code)


def test_a_trial_stands_under_its_parent_with_settings_data_and_code(
    tracker: Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_code(monkeypatch, "c0ffee", has_changes=True)
    parent = tracker.start_run("sweep", {"trials": 2})
    child = tracker.start_run("t1", {"train": {"lr": 0.1}}, {"kind": "trial"}, "sweep", DATASET)
    run = tracker._client.get_run(child)
    told = {
        "rayloop.run_id": "t1",
        "rayloop.parent": "sweep",
        "mlflow.parentRunId": parent,
        "mlflow.source.git.commit": "c0ffee",
        "mlflow.source.git.dirty": "true",
        "rayloop.version": "1.2",
        "dataset": "digits:abc",
        "dataset_digest": "d" * 64,
        "kind": "trial",
    }
    assert told.items() <= run.data.tags.items()
    assert run.data.params == {"train.lr": "0.1"}
    (data,) = run.inputs.dataset_inputs
    assert (data.dataset.name, data.dataset.digest) == ("digits", "d" * 12)
    assert json.loads(data.dataset.source) == {"uri": "/data/digits/abc"}
    assert (run.info.run_name, run.info.status) == ("t1", "RUNNING")


def test_this_checkouts_own_version_is_recorded(tracker: Tracker) -> None:
    run = tracker._client.get_run(tracker.start_run("r", {}))
    assert run.data.tags["rayloop.version"] == __version__


def test_a_parent_that_was_not_started_is_named(tracker: Tracker) -> None:
    with pytest.raises(DataMissing, match="no run 'sweep' in the tracking database"):
        tracker.start_run("t1", {}, parent="sweep")
    assert tracker.find("t1") is None
    with pytest.raises(DataMissing, match='no run "o\'clock"'):
        tracker.start_run("t1", {}, parent="o'clock")


def test_a_resumed_run_is_the_same_and_keeps_what_was_recorded(
    storage: Storage, tracker: Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker.start_run("sweep", {})
    use_code(monkeypatch, "one", has_changes=True)
    first = tracker.start_run("t1", {"lr": 0.1}, {"try": "1"}, "sweep", DATASET)
    tracker.finish(first, "KILLED")
    use_code(monkeypatch, "two")
    restarted = Tracker(storage)
    again = restarted.start_run("t1", {"lr": 0.5, "new": 1}, {"try": "2"}, "sweep", DATASET)
    assert again == first == restarted.find("t1")
    use_code(monkeypatch, "three")
    Tracker(storage).start_run("t1", {})
    run = restarted._client.get_run(first)
    assert run.data.params == {"lr": "0.1", "new": "1"}
    assert run.info.status == "RUNNING"
    assert len(run.inputs.dataset_inputs) == 1
    tags = run.data.tags
    assert (tags["try"], tags["rayloop.parent"]) == ("2", "sweep")
    assert tags["mlflow.source.git.commit"] == "three"
    assert tags["mlflow.source.git.dirty"] == "false"
    assert tags["rayloop.earlier_code"] == "one-dirty two"


def test_the_same_code_leaves_no_earlier_one(
    storage: Storage, tracker: Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_code(monkeypatch, "one")
    tracker.start_run("r", {})
    run = Tracker(storage).start_run("r", {})
    use_code(monkeypatch, "")
    Tracker(storage).start_run("r", {})
    tags = tracker._client.get_run(run).data.tags
    assert "rayloop.earlier_code" not in tags
    assert tags["mlflow.source.git.commit"] == "one"


def test_tags_are_set_later_and_empty_ones_left_out(tracker: Tracker) -> None:
    run = tracker.start_run("r", {})
    tracker.tag(run, {"rayloop.best": "t1", "rayloop.error": ""})
    tags = tracker.read("r").tags
    assert tags["rayloop.best"] == "t1"
    assert "rayloop.error" not in tags


def test_more_settings_than_mlflow_takes_at_once(tracker: Tracker) -> None:
    settings = {f"p{i}": i for i in range(205)}
    run = tracker._client.get_run(tracker.start_run("r", settings))
    assert run.data.params == {name: str(value) for name, value in settings.items()}


def test_no_step_twice_also_after_a_restart(storage: Storage, tracker: Tracker) -> None:
    run = tracker.start_run("r", {})
    for step in (1, 2, 3, 3, 1):
        tracker.log_metrics(run, {"loss": step + 0.5}, step)
    restarted = Tracker(storage)
    restarted.start_run("r", {})
    for step in (2, 3, 4):
        restarted.log_metrics(run, {"loss": step + 0.7}, step)
    assert curve(tracker, run, "loss") == [(1, 1.5), (2, 2.5), (3, 3.5), (4, 4.7)]


def test_the_rule_is_for_each_metric_alone(tracker: Tracker) -> None:
    run = tracker.start_run("r", {})
    tracker.log_metrics(run, {"loss": 0.5, "mfu": None, "bad": float("nan"), "ok": True}, 10)
    tracker.log_metrics(run, {"loss": 0.1, "test_accuracy": 0.9, "mfu": 0.3}, 10)
    tracker.log_metrics(run, {"bad": 1.0}, 9)
    row = tracker.read("r")
    assert row.metrics == {"loss": 0.5, "test_accuracy": 0.9, "mfu": 0.3, "bad": 1.0, "ok": 1.0}
    assert row.steps == {"loss": 10, "test_accuracy": 10, "mfu": 10, "bad": 9, "ok": 10}


def test_only_a_run_this_tracker_did_not_start_is_read_and_once(
    storage: Storage, tracker: Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def watch(one: Tracker) -> None:
        ask = one._client.get_run
        monkeypatch.setattr(one._client, "get_run", lambda name: asked.append(name) or ask(name))

    watch(tracker)
    run = tracker.start_run("r", {})
    tracker.log_metrics(run, {"loss": 1}, 1)
    assert asked == []
    other = Tracker(storage)
    watch(other)
    for step in (1, 2, 3):
        other.log_metrics(run, {"loss": step}, step)
    assert asked == [run]
    assert [step for step, _ in curve(tracker, run, "loss")] == [1, 2, 3]


def test_what_could_not_be_written_may_be_written_later(
    tracker: Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tracker.start_run("r", {})

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("the disk is full")

    with monkeypatch.context() as broken:
        broken.setattr(tracker._client, "log_batch", fail)
        with pytest.raises(OSError, match="full"):
            tracker.log_metrics(run, {"loss": 1}, 1)
    tracker.log_metrics(run, {"loss": 2}, 1)
    assert curve(tracker, run, "loss") == [(1, 2.0)]


def test_threads_that_share_a_tracker_write_each_step_once(tracker: Tracker) -> None:
    runs = [tracker.start_run(f"r{i}", {}) for i in range(2)]

    def write(number: int) -> None:
        for step in range(1, 6):
            tracker.log_metrics(runs[number % 2], {"loss": step + number / 10}, step)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [[step for step, _ in curve(tracker, run, "loss")] for run in runs] == [
        [1, 2, 3, 4, 5]
    ] * 2


def test_a_picture_lies_where_mlflow_looks_for_it(template: Path, storage: Storage) -> None:
    """Under the home, whole or not at all; for a run whose place is elsewhere, through MLflow."""
    here = Tracker(Storage(str(template)))
    run = here.start_run("pictured", {})
    here.log_picture(run, "curves.png", b"old")
    here.log_picture(run, "curves.png", PICTURE)
    assert (template / "mlartifacts" / run / "artifacts" / "curves.png").read_bytes() == PICTURE
    assert [file.path for file in here._client.list_artifacts(run)] == ["curves.png"]

    moved = Tracker(storage)  # its database still names the template's folder
    run = moved.start_run("moved", {})
    moved.log_picture(run, "more/curves.png", PICTURE)
    assert [file.path for file in moved._client.list_artifacts(run, "more")] == ["more/curves.png"]


def test_runs_are_listed_newest_first_or_by_a_metric(tracker: Tracker, clock: HandClock) -> None:
    for number, (name, parent) in enumerate(
        [("old", ""), ("sweep", ""), ("t1", "sweep"), ("t2", "sweep"), ("t3", "sweep")]
    ):
        clock.seconds = 1000.0 + number
        run = tracker.start_run(name, {"number": number}, parent=parent)
        if name != "t2":
            accuracy = {"t1": 0.7, "t3": 0.8}.get(name, 0.9)
            tracker.log_metrics(run, {"val_accuracy": accuracy, "step": 5}, 5)
        if name != "t3":
            clock.seconds += 60
            tracker.finish(run, "FAILED" if name == "t2" else "FINISHED")
    clock.seconds = 2000.0

    def names(**how: Any) -> list[str]:
        return [row.run_id for row in tracker.runs(**how)]

    assert names() == ["sweep", "old"]
    assert names(parent=None) == ["t3", "t2", "t1", "sweep", "old"]
    assert names(parent=None, limit=2) == ["t3", "t2"]
    assert names(parent="sweep", sort="val_accuracy") == ["t3", "t1", "t2"]
    assert names(parent="sweep", sort="val_accuracy", ascending=True) == ["t1", "t3", "t2"]
    assert names(parent="old") == names(parent="o'clock") == []
    last, failed, _ = tracker.runs("sweep")
    assert (last.parent, last.status, last.started, last.seconds) == ("sweep", "RUNNING", 1004, 996)
    assert (failed.status, failed.seconds, failed.metrics) == ("FAILED", 60, {})
    assert last.params == {"number": "4"}
    assert (last.metrics, last.steps) == (
        {"val_accuracy": 0.8, "step": 5.0},
        {"val_accuracy": 5, "step": 5},
    )


def test_names_that_are_no_names_name_no_run(tracker: Tracker) -> None:
    tracker.start_run("r", {})
    for name in ("", "x", "r'", "' OR '1'='1", "%"):
        assert tracker.find(name) is None
        assert tracker.read(name) is None


def test_twenty_processes_on_a_cold_database_are_all_recorded(
    template: Path, tmp_path: Path
) -> None:
    script = Path(__file__).with_name("cold_database.py")
    words = [sys.executable, str(script), str(template), str(tmp_path), "20"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = Tracker(Storage(str(tmp_path))).runs()
    names = Counter(row.run_id for row in rows)
    assert names == {**{f"run-{number}": 1 for number in range(20)}, "shared": 1}
    own = [row for row in rows if row.run_id != "shared"]
    assert all(row.metrics["loss"] == int(row.params["number"]) for row in own)
    assert {row.status for row in own} == {"FINISHED"}


@pytest.mark.parametrize(
    ("error", "status"), [(ValueError("no"), "FAILED"), (SystemExit(143), "KILLED")]
)
def test_a_run_that_does_not_end_well_is_told(
    tracker: Tracker, error: BaseException, status: str
) -> None:
    run_id = tracker.start_run("r", {})
    with pytest.raises(type(error)), tracker.told_if_it_fails(run_id):
        raise error
    found = tracker.read("r")
    assert found is not None and found.status == status
    with tracker.told_if_it_fails(tracker.start_run("r", {})):
        pass
    found = tracker.read("r")
    assert found is not None and found.status == "RUNNING"
