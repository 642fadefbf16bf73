"""The journal of a run: seconds by cause that add up, whatever happened to it."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayloop.errors import Corrupt
from rayloop.train.curves import LEDGER_COLORS, draw_ledger, ledger_lines
from rayloop.train.journal import CAUSES, Journal

START = 1_700_000_000.0


def journal_of(*events: Callable[[Journal], None]) -> Journal:
    """A journal after some events."""
    journal = Journal()
    for event in events:
        event(journal)
    return journal


def opened(at: float) -> Callable[[Journal], None]:
    return lambda journal: journal.open_session(START + at)


def began(at: float, step: int = 0) -> Callable[[Journal], None]:
    return lambda journal: journal.begin_attempt(START + at, step)


def noted(at: float, step_done: int, /, **seconds: float) -> Callable[[Journal], None]:
    return lambda journal: journal.note(START + at, step_done, seconds)


def closed(at: float) -> Callable[[Journal], None]:
    return lambda journal: journal.close_session(START + at)


def spent(journal: Journal) -> dict[str, float]:
    """Causes that took any time, without the rounding of times since the epoch."""
    return {cause: round(s, 4) for cause, s in journal.causes().items() if round(s, 4) != 0}


# --- examples


def test_a_quiet_run_is_divided_by_what_its_ledger_booked() -> None:
    journal = journal_of(
        opened(0),
        began(4),
        noted(8, 1, step=1.5, data_wait=0.5),
        noted(20, 11, step=10.0, compile=1.0, data_wait=1.0, evaluate=0.5, checkpoint=0.25),
        closed(22),
    )
    assert spent(journal) == {
        "start": 6.0, "step": 10.0, "compile": 1.0, "data_wait": 1.0, "evaluate": 0.5,
        "checkpoint": 0.25, "other": 1.25, "finish": 2.0,
    }  # fmt: skip
    assert journal.total_s == 22
    assert journal.goodput == pytest.approx(10 / 22)
    assert (journal.interruptions, journal.lost_steps) == (0, 0)


def test_a_worker_that_dies_costs_a_restart_and_the_steps_since_the_checkpoint() -> None:
    journal = journal_of(
        opened(0),
        began(1),
        noted(21, 20, step=20.0),  # 1 s a step
        began(25, 15),
        noted(32, 17, step=2.0),
        noted(37, 22, step=7.0),
        closed(37),
    )
    assert spent(journal) == {"start": 1.0, "step": 22.0, "lost_work": 5.0, "restart": 9.0}
    assert (journal.interruptions, journal.lost_steps) == (1, 5)


def test_a_killed_driver_ends_its_session_at_the_last_note_and_the_gap_is_nobodys() -> None:
    journal = journal_of(
        opened(0), began(2), noted(12, 10, step=10.0),
        opened(1000), began(1003, 8), noted(1007, 12, step=4.0), closed(1008),
    )  # fmt: skip
    assert spent(journal) == {"start": 5.0, "step": 12.0, "lost_work": 2.0, "finish": 1.0}
    assert journal.total_s == 20
    assert (journal.interruptions, journal.lost_steps) == (1, 2)


def test_an_attempt_that_never_stepped_is_part_of_the_restart_and_loses_nothing() -> None:
    journal = journal_of(
        opened(0), began(2), noted(12, 10, step=10.0),
        began(15, 5),  # died before its first step; the next one found a newer checkpoint
        began(20, 10), noted(25, 13, step=3.0), closed(25),
    )  # fmt: skip
    assert spent(journal) == {"start": 2.0, "step": 13.0, "restart": 10.0}
    assert (journal.interruptions, journal.lost_steps) == (2, 0)


def test_steps_thrown_away_twice_are_counted_twice() -> None:
    journal = journal_of(
        opened(0), began(0), noted(10, 10, step=10.0),
        began(10, 6), noted(14, 10, step=4.0),
        began(14, 2), noted(22, 10, step=8.0), closed(22),
    )  # fmt: skip
    assert journal.lost_steps == (10 - 2) + (10 - 6)
    assert spent(journal) == {"step": 10.0, "lost_work": 12.0}


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        ([opened(0)], {}),
        ([opened(0), closed(3)], {"start": 3.0}),
        ([opened(0), began(2)], {"start": 2.0}),
        ([opened(0), began(2), noted(5, 0), closed(7)], {"start": 7.0}),
        ([opened(0), began(2), began(5), closed(7)], {"start": 2.0, "restart": 5.0}),
    ],
)
def test_a_session_without_a_step_only_started(events: Any, expected: dict[str, float]) -> None:
    journal = journal_of(*events)
    assert spent(journal) == expected
    assert journal.goodput == 0


def test_a_worker_whose_clock_runs_faster_gets_no_more_than_the_time_there_was() -> None:
    journal = journal_of(opened(0), began(0), noted(10, 5, step=15.0, data_wait=5.0), closed(10))
    assert spent(journal) == {"step": 7.5, "data_wait": 2.5}


def test_a_clock_that_is_set_back_takes_no_time_away() -> None:
    journal = journal_of(opened(0), began(5), noted(9, 4, step=4.0), began(3, 4), closed(1))
    assert spent(journal) == {"start": 5.0, "step": 4.0}


def test_an_old_message_changes_nothing() -> None:
    journal = journal_of(opened(0), began(0), noted(4, 4, step=4.0), noted(9, 2, step=2.0))
    assert spent(journal) == {"step": 4.0}


def test_events_out_of_place_are_refused() -> None:
    with pytest.raises(ValueError, match="no session is open"):
        Journal().begin_attempt(0, 0)
    with pytest.raises(ValueError, match="before begin_attempt"):
        journal_of(opened(0), noted(1, 1, step=1.0))
    with pytest.raises(ValueError, match="no session is open"):
        journal_of(opened(0), began(0), closed(1), noted(2, 1, step=1.0))
    with pytest.raises(ValueError, match="from 0 on"):
        journal_of(opened(0), began(0), noted(1, 1, step=-1.0))


# --- any sequence of events

events = st.lists(
    st.tuples(
        st.sampled_from(["open", "close", "begin", "note", "note", "note"]),
        st.one_of(st.floats(0, 50), st.floats(-5, 0)),
        st.integers(0, 12),
        st.dictionaries(st.sampled_from([*CAUSES, "prepare"]), st.floats(0, 60)),
    ),
    max_size=25,
)


def play(events: list[Any]) -> tuple[Journal, int]:
    """A journal after a random history, and the lost steps by a simulation step by step.

    What an event needs and is not there (a session, an attempt) comes at the same moment.
    """
    journal, now = Journal(), START
    is_open = has_attempt = did_step = False
    kept: list[int] = []
    lost = step = resumed_at_step = 0
    for kind, pause, number, seconds in events:
        now += pause
        if kind == "open" or not is_open:
            journal.open_session(now)
            is_open, has_attempt = True, False
        if kind == "begin" or (kind == "note" and not has_attempt):
            resumed_at_step = step = min(number, max(kept, default=0))
            journal.begin_attempt(now, resumed_at_step)
            has_attempt, did_step = True, False
        if kind == "close":
            journal.close_session(now)
            is_open = False
        if kind == "note":
            if number and not did_step:
                lost += sum(done > resumed_at_step for done in kept)
                kept = [done for done in kept if done <= resumed_at_step]
                did_step = True
            kept += range(step + 1, step + number + 1)
            step += number
            journal.note(now, step, seconds)
    return journal, lost


@given(events)
def test_causes_are_never_negative_and_add_up_to_the_total(events: list[Any]) -> None:
    journal, _ = play(events)
    causes = journal.causes()
    assert tuple(causes) == CAUSES
    assert all(seconds >= 0 for seconds in causes.values())
    assert sum(causes.values()) == pytest.approx(journal.total_s, abs=1e-5)
    assert 0 <= journal.goodput <= 1 + 1e-9


@given(events)
def test_lost_steps_are_those_that_a_simulation_loses(events: list[Any]) -> None:
    journal, lost = play(events)
    assert journal.lost_steps == lost


@given(events, events)
def test_a_journal_goes_on_after_json_as_if_it_had_never_been_away(
    before: list[Any], after: list[Any]
) -> None:
    journal, _ = play(before)
    saved = journal.to_dict()
    again = Journal.from_dict(json.loads(json.dumps(saved)))
    assert again.to_dict() == saved
    for one in (journal, again):
        one.open_session(START + 1e6)
        one.begin_attempt(START + 1e6 + 1, 0)
        for index, (_, _, _, seconds) in enumerate(after):
            one.note(START + 1e6 + 2 + index, index + 1, seconds)
    assert again.to_dict() == journal.to_dict()


@pytest.mark.parametrize(
    "saved",
    [
        {},
        {"sessions": 3},
        {"sessions": [{}]},
        {"sessions": [{"began_at": "x", "ended_at": None, "attempts": []}]},
        {"sessions": [{"began_at": 0, "ended_at": None, "attempts": [
            {"began_at": 0, "resumed_at_step": 5, "last_at": 0, "step": 5, "first_step_at": 0,
             "seconds": {}}]}]},
    ],
)  # fmt: skip
def test_what_is_no_journal_is_refused(saved: dict[str, Any]) -> None:
    with pytest.raises(Corrupt, match=r"ledger\.json"):
        Journal.from_dict(saved)


# --- shown


def test_lines_are_aligned_and_tell_seconds_and_share() -> None:
    journal = journal_of(opened(0), began(5), noted(20, 15, step=15.0), closed(20))
    lines = ledger_lines(journal)
    assert len(lines) == len(CAUSES)
    assert lines[0].split() == ["step", "15.0", "s", "75.0%"]
    assert len({len(line) for line in lines}) == 1
    assert ledger_lines(Journal())[0].split() == ["step", "0.0", "s", "0.0%"]


@pytest.mark.parametrize("events", [[], [opened(0), began(5), noted(20, 15, step=15.0)]])
def test_the_picture_is_a_png_800_pixels_wide(events: Any) -> None:
    png = draw_ledger(journal_of(*events).causes(), "run")
    assert png.startswith(b"\x89PNG")
    assert int.from_bytes(png[16:20], "big") == 800


def test_every_cause_has_a_colour() -> None:
    assert set(LEDGER_COLORS) == set(CAUSES)
    assert len(set(LEDGER_COLORS.values())) == len(CAUSES)
