"""A job's log as it is followed: nothing twice, nothing lost, the last JSON line last."""

import asyncio
from collections.abc import AsyncIterator
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayloop.errors import Unreachable, WorkError
from rayloop.submit.follow import Lines, Stopper, follow
from rayloop.submit.job import Job

LINES = st.lists(
    st.one_of(
        st.text(alphabet='ab{}"1: \r', max_size=12),
        st.sampled_from(['{"a": 1}', '{"b": 2}', "{}", '{"broken": ', "[1]"]),
    ),
    max_size=12,
)


@given(lines=LINES, cuts=st.lists(st.integers(0, 80), max_size=6), ends=st.booleans())
def test_every_line_comes_once_and_in_order_however_it_is_cut(
    lines: list[str], cuts: list[int], ends: bool
) -> None:
    text = "\n".join(lines) + ("\n" if ends and lines else "")
    told: list[str] = []
    taken = Lines(told.append)
    edges = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    for start, stop in pairwise(edges):
        taken.add(text[start:stop])
    last = taken.end()
    expected = text.split("\n")
    if expected[-1] == "":
        expected.pop()
    objects = [n for n, line in enumerate(expected) if line in ('{"a": 1}', '{"b": 2}', "{}")]
    if last is None:
        assert not objects
        assert told == expected
    else:
        assert last == expected[objects[-1]]
        kept = [line for n, line in enumerate(expected) if n != objects[-1]]
        # An object is told when the next one comes, so later than lines between the two.
        assert sorted(told) == sorted(kept)
        assert [x for x in told if x[:1] != "{"] == [x for x in kept if x[:1] != "{"]


def job(status: str = "SUCCEEDED", message: str = "", exit_code: int | None = 0) -> Job:
    return Job("train-1", status, message, exit_code)


class Cluster:
    """A log that can be read in part before the connection breaks."""

    def __init__(self, text: str, breaks: list[int], states: list[Job | Exception]) -> None:
        self.text, self.breaks, self.states = text, breaks, states
        self.said: list[str] = []
        self.warned: list[str] = []

    async def stream(self) -> AsyncIterator[str]:
        until = self.breaks.pop(0) if self.breaks else len(self.text)
        for start in range(0, until, 3):
            yield self.text[start : min(start + 3, until)]
        if until < len(self.text):
            raise ConnectionResetError("gone")

    def look(self) -> Job:
        state = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        if isinstance(state, Exception):
            raise state
        return state

    def follow(self) -> tuple[int, str | None]:
        times = iter(range(10_000))
        return follow(
            self.stream, self.look, self.said.append, self.warned.append,
            clock=lambda: float(next(times)), quiet_s=9.0,
        )  # fmt: skip


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)


LOG = 'one\ntwo\n{"epoch": 1}\nthree\n{"done": true}\nwarning at the end\n'


@pytest.mark.parametrize(
    ("breaks", "losses"), [([], 0), ([5], 1), ([0, 20, 21], 3), ([50, 3], 1), ([50, 3, 2, 1], 1)]
)
def test_a_broken_connection_is_taken_up_where_it_was(breaks: list[int], losses: int) -> None:
    """And each loss is told once, however often it is tried again."""
    cluster = Cluster(LOG, breaks, [job()])
    assert cluster.follow() == (0, '{"done": true}')
    assert cluster.said == ["one", "two", "three", '{"epoch": 1}', "warning at the end"]
    assert len(cluster.warned) == losses


@pytest.mark.parametrize(
    ("ended", "code"),
    [
        (job("SUCCEEDED", "", 0), 0),
        (job("FAILED", "x", 2), 2),
        (job("FAILED", "x", 1), 1),
        (job("FAILED", "no room", None), 1),
        (job("FAILED", "killed", -9), 137),
        (job("STOPPED", "", None), 143),
        (job("STOPPED", "", 1), 143),
    ],
)
def test_the_command_ends_as_the_job_ends(ended: Job, code: int) -> None:
    cluster = Cluster("x\n", [], [ended])
    assert cluster.follow() == (code, None)
    if ended.message == "no room":
        assert cluster.warned == ["the job did not start: no room"]


def test_a_job_whose_log_ends_before_it_does_is_waited_for() -> None:
    cluster = Cluster("x\n", [], [job("PENDING", "", None), job("RUNNING", "", None), job()])
    assert cluster.follow() == (0, None)
    assert cluster.said == ["x"]


def test_a_job_that_a_new_head_does_not_know_is_told_at_once() -> None:
    cluster = Cluster("x\n", [], [job()])
    cluster.states = [None]  # type: ignore[list-item]
    with pytest.raises(WorkError, match="does not know the job any more"):
        cluster.follow()


def test_a_head_that_closes_no_connection_is_asked_after_a_silence() -> None:
    """It lost its power: the stream says nothing more, and nobody answers."""
    cluster = Cluster("x\n", [], [ConnectionError("refused")])

    async def silent() -> AsyncIterator[str]:
        yield "one\n"
        await asyncio.sleep(3600)

    times = iter(range(10_000))
    with pytest.raises(WorkError, match="has not answered"):
        follow(
            silent, cluster.look, cluster.said.append, cluster.warned.append,
            clock=lambda: float(next(times)), quiet_s=3.0, silence_s=0.01,
        )  # fmt: skip
    assert cluster.said == ["one"]


def test_a_silence_while_the_head_answers_is_no_loss() -> None:
    cluster = Cluster("", [], [job("RUNNING"), job("RUNNING"), job()])

    async def slow() -> AsyncIterator[str]:
        yield "one\n"
        await asyncio.sleep(0.05)
        yield "two\n"

    assert follow(
        slow, cluster.look, cluster.said.append, cluster.warned.append, silence_s=0.01
    ) == (0, None)
    assert cluster.said == ["one", "two"] and cluster.warned == []


def test_a_head_that_does_not_come_back_ends_the_waiting_with_a_sentence() -> None:
    cluster = Cluster("x\n", [], [ConnectionError("refused")])
    with pytest.raises(WorkError, match="has not answered for 9 s .* the same command follows it"):
        cluster.follow()


def test_a_stop_that_is_not_heard_is_told_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A head may be away for a moment just when Ctrl-C comes."""
    monkeypatch.setattr("rayloop.submit.follow.STOP_AGAIN_S", 0.01)
    away, warned = [Unreachable("gone"), WorkError("500")], []

    def stop() -> None:
        if away:
            raise away.pop()

    stopper = Stopper(stop, warned.append)
    assert not stopper.is_owed
    stopper.start()
    stopper.start()  # twice is once
    assert stopper.wait(60)
    assert not stopper.is_owed and not away
    assert len(warned) == 1 and "500" in warned[0]
