"""`rayloop runs`: what it lists, compares and refuses."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from rayloop.cli.main import main
from rayloop.cli.runs import is_small_good
from rayloop.errors import Corrupt
from rayloop.storage import Storage
from rayloop.tracking import TrackedDataset, Tracker
from rayloop.tracking_client import open_client

DATASET = TrackedDataset("digits", "abc", "d" * 64, "/data/digits/abc")
LONG_NAME = "tiny_resnet-fashion-mnist-6920bb22-77cd"


class HandClock:
    """Stands still until it is told the time."""

    def __init__(self) -> None:
        self.seconds = 1_790_000_000.0

    def now(self) -> float:
        return self.seconds

    def monotonic(self) -> float:
        return self.seconds


def settings(name: str, rate: float) -> dict[str, Any]:
    train = {"learning_rate": rate, "epochs": 2}
    return {"run_id": name, "train": train, "tune": {"objectives": ["val_loss"]}}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A long-named run, then a sweep of three trials of which one failed."""
    root, clock = tmp_path_factory.mktemp("template"), HandClock()
    tracker = Tracker(Storage(str(root)), clock=clock)

    def train(name: str, rate: float, loss: float, parent: str = "", status: str = "") -> None:
        clock.seconds += 1
        run = tracker.start_run(name, settings(name, rate), {}, parent, DATASET)
        for step in (10, 20):
            clock.seconds += 30
            record = {"step": step, "epoch": step / 10, "val_loss": loss, "val_accuracy": 1 - loss}
            tracker.log_metrics(run, record, step)
        if not status:
            tracker.log_metrics(run, {"test_accuracy": 0.9 - loss}, 20)
        tracker.finish(run, status or "FINISHED")

    train(LONG_NAME, 0.1, 0.25)
    clock.seconds += 1
    sweep = tracker.start_run(
        "sweep", settings("sweep", 0.1), {"rayloop.kind": "sweep"}, "", DATASET
    )
    train("sweep-0", 0.123456789, 0.5, "sweep")
    train("sweep-1", 0.2, 0.125, "sweep")
    train("sweep-2", 0.3, 0.75, "sweep", "FAILED")
    tracker.tag(sweep, {"rayloop.best": "sweep-1", "rayloop.error": ""})
    tracker.finish(sweep)
    return root


@pytest.fixture
def root(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copy(template / "mlflow.db", tmp_path / "mlflow.db")
    monkeypatch.setenv("RAYLOOP_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def says(capsys: pytest.CaptureFixture[str]):
    def say(*words: str) -> Any:
        main(["runs", *words, "--json"])
        return json.loads(capsys.readouterr().out)

    return say


@pytest.fixture
def prints(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """What is printed on a terminal of 80 columns."""

    def show(*words: str) -> str:
        monkeypatch.setenv("COLUMNS", "80")
        main(["runs", *words])
        printed = capsys.readouterr().out
        assert max(len(line) for line in printed.splitlines()) <= 80
        return printed

    return show


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]):
    def fail(*words: str) -> str:
        with pytest.raises(SystemExit) as caught:
            main(["runs", *words])
        assert caught.value.code == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        return printed.err

    return fail


def names(rows: list[dict[str, Any]]) -> list[str]:
    return [row["run_id"] for row in rows]


def test_runs_are_listed_newest_first_and_trials_counted_with_their_sweep(root, says) -> None:
    sweep, single = says()
    assert (sweep["run_id"], sweep["trials"], sweep["val_accuracy"]) == ("sweep", 3, None)
    assert single == {
        "run_id": LONG_NAME,
        "parent": "",
        "status": "finished",
        "started": "2026-09-21T14:13:21Z",
        "val_accuracy": 0.75,
        "test_accuracy": 0.65,
        "epochs": 2.0,
        "steps": 20,
        "seconds": 60.0,
        "trials": 0,
    }
    assert names(says("--all")) == ["sweep-2", "sweep-1", "sweep-0", "sweep", LONG_NAME]
    assert names(says("--all", "--limit", "2")) == ["sweep-2", "sweep-1"]


def test_best_first_is_the_least_loss_and_the_most_accuracy(root, says) -> None:
    by_loss = ["sweep-1", LONG_NAME, "sweep-0", "sweep-2", "sweep"]
    assert names(says("--all", "--sort", "val_loss")) == by_loss
    by_test = says("--all", "--sort", "test_accuracy")
    assert [row["test_accuracy"] for row in by_test] == [0.775, 0.65, 0.4, None, None]
    assert [is_small_good(name) for name in ("latency_ms_b1", "ledger_step_s", "goodput")] == [
        True,
        True,
        False,
    ]


def test_trials_are_sorted_by_what_the_sweep_wants_with_what_differs(root, says) -> None:
    rows = says("--sweep", "sweep")
    assert names(rows) == ["sweep-1", "sweep-0", "sweep-2"]
    assert [row["settings"] for row in rows] == [
        {"train.learning_rate": "0.2"},
        {"train.learning_rate": "0.123456789"},
        {"train.learning_rate": "0.3"},
    ]
    assert {row["sorted_by"] for row in rows} == {"val_loss"}
    assert rows[2]["status"] == "failed"
    assert names(says("--sweep", "sweep", "--sort", "val_accuracy", "--limit", "1")) == ["sweep-1"]


def test_a_run_is_shown_with_all_that_is_known(root, says) -> None:
    run = says("show", "sweep-1")
    assert (run["parent"], run["dataset"], run["dataset_digest"]) == (
        "sweep",
        "digits:abc",
        "d" * 64,
    )
    assert run["params"]["train.learning_rate"] == "0.2"
    assert run["metrics"]["val_loss"] == 0.125
    assert run["metric_steps"]["val_loss"] == 20
    assert run["version"]
    sweep = says("show", "sweep")
    assert (sweep["trials"], sweep["best"], sweep["error"]) == (3, "sweep-1", "")


def test_only_what_differs_is_compared_and_all_metrics(root, says) -> None:
    told = says("compare", "sweep-1", "sweep-0", "sweep-1", "sweep")
    assert told["runs"] == ["sweep-1", "sweep-0", "sweep"]
    assert told["settings"] == {"train.learning_rate": ["0.2", "0.123456789", "0.1"]}
    assert told["metrics"]["val_loss"] == [0.125, 0.5, None]
    assert list(told["metrics"])[:3] == ["val_accuracy", "test_accuracy", "val_loss"]


def test_another_dataset_is_a_difference(root, says) -> None:
    other = TrackedDataset("digits", "xyz", "e" * 64, "/data/digits/xyz")
    Tracker(Storage(str(root))).start_run("other", settings("other", 0.2), dataset=other)
    assert says("compare", "sweep-1", "other")["settings"] == {"data": ["digits:abc", "digits:xyz"]}


def test_people_read_it_at_eighty_columns(root, prints) -> None:
    listed = prints()
    assert "sweep (3 trials)" in listed
    assert "0.7500 0.6500" in listed
    assert "1m00s" in listed
    trials = prints("--sweep", "sweep").splitlines()
    assert trials[1].split() == ["sweep-1", "finished", "0.1250", "2", "1m00s", "learning_rate=0.2"]
    assert trials[2].rstrip().endswith("learning_rate=0.123457")
    shown = prints("show", "sweep")
    assert "3: rayloop runs --sweep sweep" in shown
    assert "digits:abc" in shown
    compared = prints("compare", "sweep-0", LONG_NAME)
    assert "0.123457" in compared
    assert "train.epochs" not in compared


def test_a_pipe_gets_whole_names(root, capsys, monkeypatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    main(["runs"])
    assert LONG_NAME in capsys.readouterr().out


def test_runs_that_are_alike_are_said_to_be(root, prints) -> None:
    tracker = Tracker(Storage(str(root)))
    tracker.start_run("again", settings("again", 0.2), dataset=DATASET)
    assert "the settings, the data and the code are the same" in prints(
        "compare", "sweep-1", "again"
    )


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["show", "sweep-O"], "no run 'sweep-O'; the nearest is 'sweep-"),
        (["show", "tiny_resnet"], f"the nearest is '{LONG_NAME}'"),
        (["show", "' OR 1"], "no run \"' OR 1\"; the nearest is"),
        (["compare", "sweep-0", "swep"], "no run 'swep'; the nearest is 'sweep'"),
        (["compare", "sweep-0"], "two runs or more, as in: rayloop runs compare sweep-0 RUN"),
        (["compare", "sweep-0", "sweep-0"], "two runs or more"),
        (["--sweep", "sweeep"], "no run 'sweeep'; the nearest is 'sweep'"),
        (["--sweep", "sweep-0"], "'sweep-0' has no trials"),
        (["--sort", "val_acc"], "--sort val_acc: none of these runs has a metric of that name; the "
         "nearest is 'val_accuracy'"),
        (["--sort", "a`b"], "--sort a`b: none of these runs has"),
        (["--sweep", "sweep", "--sort", "goodput"], "--sort goodput: none of these runs has"),
        (["--limit", "0"], "--limit 0 must be 1 to 50000"),
        (["--limit", "50001"], "--limit 50001 must be 1 to 50000"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_in_one_sentence(root, fails, words, sentence) -> None:
    assert sentence in fails(*words)


def test_without_a_database_nothing_is_made_and_the_way_to_one_is_told(
    home, capsys, fails, says
) -> None:
    main(["runs"])
    told = "no runs yet; make one with: python jobs/pipeline.py smoke"
    assert capsys.readouterr().out.strip() == told
    assert says() == []
    assert "There is no run 'x': no runs yet; make one" in fails("show", "x")
    assert "There is no run 'x'" in fails("--sweep", "x")
    assert list(home.iterdir()) == []


def test_a_database_that_does_not_open_is_no_traceback(home, fails) -> None:
    (home / "mlflow.db").write_text("this is not a database")
    assert f"{home}/mlflow.db, does not open: it is damaged" in fails()
    with pytest.raises(Corrupt, match="not a database"):
        open_client(Storage(str(home)), "")
