"""The progress board and its follower, without Ray: calls are plain calls."""

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from rayloop.errors import Diverged, StorageFull
from rayloop.train import progress
from rayloop.train.journal import Journal
from rayloop.train.progress import Follower, ProgressBoard
from rayloop.train.watchdog import Hang, describe


class HandClock:
    """A clock that stands still until it is moved."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds

    def now(self) -> float:
        """Seconds since the epoch."""
        return self.seconds

    def monotonic(self) -> float:
        """The same."""
        return self.seconds


class Handle:
    """Looks like an actor's handle; `remote` calls at once."""

    def __init__(self, board: ProgressBoard) -> None:
        self._board = board
        self.called: list[str] = []

    def __getattr__(self, name: str) -> Any:
        def remote(*arguments: Any) -> Any:
            self.called.append(name)
            return getattr(self._board, name)(*arguments)

        return SimpleNamespace(remote=remote)


@pytest.fixture(autouse=True)
def _plain_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "get", lambda answer, timeout: answer)
    monkeypatch.setattr(progress, "POLL_INTERVAL_S", 0.001)


def hang(rank: int, step: int = 3) -> Hang:
    """A report."""
    return Hang(rank=rank, step=step, phase="step", waited_s=60.0, stack="")


def record(step: int) -> dict[str, float]:
    """An epoch's record."""
    names = ("epoch", "train_loss", "train_accuracy", "val_accuracy")
    return {"step": step, **dict.fromkeys(names, 0.5)}


# --- the board


def test_a_board_keeps_the_journal_by_its_own_clock() -> None:
    clock = HandClock(100.0)
    board = ProgressBoard(clock=clock)
    clock.seconds = 103
    board.begin_attempt(0)
    clock.seconds = 109
    board.note(5, {"step": 5.0})
    assert board.read(0) == (5, [])
    clock.seconds = 110
    board.begin_attempt(4)
    assert board.read(0) == (4, [])
    clock.seconds = 113
    board.note(6, {"step": 2.0})
    clock.seconds = 114
    assert board.journal()["sessions"][0]["ended_at"] is None
    saved = board.close()
    assert saved == board.journal()
    assert {cause: s for cause, s in saved["seconds"].items() if s} == {
        "start": 4.0, "step": 6.0, "lost_work": 1.0, "restart": 2.0, "finish": 1.0
    }  # fmt: skip
    assert (saved["total_s"], saved["interruptions"], saved["lost_steps"]) == (14.0, 1, 1)


def test_a_board_goes_on_with_the_journal_of_a_killed_session() -> None:
    clock = HandClock(10.0)
    first = ProgressBoard(clock=clock, began_at=8.0)
    first.begin_attempt(0)
    clock.seconds = 20
    first.note(10, {"step": 10.0})
    clock.seconds = 1000
    second = ProgressBoard(first.journal(), clock=clock)
    second.begin_attempt(8)
    clock.seconds = 1004
    second.note(12, {"step": 4.0})
    journal = Journal.from_dict(second.close())
    assert (journal.total_s, journal.interruptions, journal.lost_steps) == (16.0, 1, 2)
    assert journal.causes()["start"] == 2.0


def test_a_board_gives_the_newest_hang_of_each_rank_since_the_last_start() -> None:
    board = ProgressBoard()
    board.begin_attempt(0)
    for report in (hang(1), hang(0), hang(1, step=7)):
        board.hang(report)
    assert board.hangs() == [hang(0), hang(1, step=7)]
    assert board.suspects(2) == [0]
    board.begin_attempt(0)
    assert board.hangs() == []
    assert len(board.news(0).hangs) == 3


def test_a_board_keeps_the_first_final_error() -> None:
    board = ProgressBoard()
    assert board.final_error() is None
    board.set_final_error(Diverged("first"))
    board.set_final_error(Diverged("second"))
    assert str(board.final_error()) == "first"


def test_records_come_once_in_order_and_a_repeated_step_replaces() -> None:
    board = ProgressBoard()
    for step, epoch in ((20, 2.0), (10, 1.0), (20, 3.0)):
        board.add_record({"step": step, "epoch": epoch})
    board.set_step(25)
    assert board.read(10) == (25, [{"step": 20, "epoch": 3.0}])
    assert [r["step"] for r in board.news(0).records] == [10, 20]


# --- the follower


def followed(board: ProgressBoard, caplog: pytest.LogCaptureFixture, **options: Any) -> list[str]:
    """What a follower logs that comes when all has happened."""
    with (
        caplog.at_level("INFO", "rayloop.train"),
        Follower(Handle(board), 100, 0, **{"on_record": lambda _: None, **options}),
    ):
        pass
    return [entry.getMessage() for entry in caplog.records]


def test_restarts_and_hangs_are_told_once_and_the_first_start_is_not(
    caplog: pytest.LogCaptureFixture,
) -> None:
    board = ProgressBoard()
    board.begin_attempt(0)
    assert followed(board, caplog) == []
    board = ProgressBoard()
    for step in (30, 40, 50):
        board.begin_attempt(step)
    board.hang(hang(1))
    assert followed(board, caplog) == [
        "workers started again, going on at step 40",
        "workers started again, going on at step 50",
        describe(hang(1)),
    ]


def test_records_are_handed_on_once(caplog: pytest.LogCaptureFixture) -> None:
    board, seen = ProgressBoard(), []
    board.add_record(record(10))
    board.add_record(record(20))
    lines = followed(board, caplog, on_record=seen.append)
    assert seen == [record(10), record(20)]
    assert [line.split("  ")[0] for line in lines] == ["epoch 0.5 step 0/100"] * 2


def test_leaving_ends_the_session_and_hands_over_its_journal(
    caplog: pytest.LogCaptureFixture,
) -> None:
    journals: list[dict[str, Any]] = []
    board = ProgressBoard(clock=HandClock(7.0))
    followed(board, caplog, on_journal=journals.append)
    assert journals == [board.journal()]
    assert journals[0]["sessions"][0]["ended_at"] == 7.0


def test_the_journal_comes_at_its_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    board, clock = ProgressBoard(), HandClock()
    handle, came = Handle(board), threading.Semaphore(0)
    with Follower(handle, 100, 0, lambda _: None, lambda _: came.release(), clock):
        for _ in range(3):
            clock.seconds += progress.JOURNAL_INTERVAL_S
            assert came.acquire(timeout=60)
    assert handle.called.count("journal") == 3
    assert handle.called.count("close") == 1


def test_a_journal_that_cannot_be_kept_is_told_and_nothing_stops(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def refuse(_: dict[str, Any]) -> None:
        raise StorageFull("the disk is full")

    assert followed(ProgressBoard(), caplog, on_journal=refuse) == [
        "the run's accounts could not be kept: the disk is full"
    ]


def test_a_board_that_does_not_answer_is_told(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Any, timeout: float) -> None:
        raise ray.exceptions.GetTimeoutError("late")

    monkeypatch.setattr(ray, "get", refuse)
    journals: list[dict[str, Any]] = []
    lines = followed(ProgressBoard(), caplog, on_journal=journals.append)
    assert set(lines) == {"no progress to show: GetTimeoutError"}
    assert journals == []


def test_the_session_ends_where_a_record_cannot_be_tracked() -> None:
    """The follower's thread ends with the error; the accounts are whole all the same."""

    def refuse(_: dict[str, float]) -> None:
        raise RuntimeError("no tracker")

    board, journals = ProgressBoard(), []
    board.add_record(record(10))
    errors: list[Any] = []
    before, threading.excepthook = threading.excepthook, errors.append
    try:
        with Follower(Handle(board), 100, 0, refuse, journals.append):
            pass
    finally:
        threading.excepthook = before
    assert [str(error.exc_value) for error in errors] == ["no tracker"]
    assert [journal["sessions"][0]["ended_at"] is not None for journal in journals] == [True]
