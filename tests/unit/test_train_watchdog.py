"""A silent rank is reported with its stack, ended if need be, and told from those it holds up."""

import contextlib
import faulthandler
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayloop.errors import ConfigError
from rayloop.train.watchdog import PHASES, Hang, Watchdog, describe, suspects

GENEROUS_S = 120.0
PLATFORM = Path(__file__).parents[2] / "platform"

AT_WORK = '  File "/srv/app.py", line 3, in prepare\n    crop(images)\n'
IN_DDP = (
    '  File "/srv/site-packages/torch/autograd/graph.py", line 9, in _engine_run_backward\n'
    "    return Variable._execution_engine.run_backward(\n"
)
IN_ALL_REDUCE = (
    '  File "/srv/site-packages/torch/distributed/distributed_c10d.py", line 9, in all_reduce\n'
    "    work.wait()\n"
)
COMPILED_WAIT = (
    '  File "/srv/torch/distributed/_functional_collectives.py", line 9, in wait_tensor\n'
    '  File "/srv/torch/_ops.py", line 9, in __call__\n    return self._op(*args, **kwargs)\n'
)
IN_CONSTRUCTOR = (
    '  File "/srv/torch/distributed/utils.py", line 9, in _verify_param_shape_across_processes\n'
)
IN_SAVE = '  File "/srv/torch/distributed/checkpoint/filesystem.py", line 9, in write_data\n'
IN_EVENT = (
    '  File "/srv/app.py", line 3, in go\n    event.wait()\n'
    '  File "/usr/lib/threading.py", line 9, in wait\n    waiter.acquire()\n'
)


def wait_until(holds: Callable[[], bool], what: Callable[[], str] = lambda: "in vain") -> None:
    """Look until a condition holds; a minute or two without it is a failure."""
    deadline = time.monotonic() + GENEROUS_S
    while not holds():
        assert time.monotonic() < deadline, what()
        time.sleep(0.002)


class HandClock:
    """Time that moves when a test says so, and counts the looks the watchdog takes at it."""

    def __init__(self) -> None:
        self.at_s = 100.0
        self.looks = 0

    def now(self) -> float:
        return self.monotonic()

    def monotonic(self) -> float:
        if threading.current_thread().name == "rayloop-watchdog":
            self.looks += 1
        return self.at_s

    def let_watchdog_look(self) -> None:
        """Wait for more calls than one round of the watchdog makes."""
        before = self.looks
        wait_until(lambda: self.looks > before + 8)


@pytest.fixture
def arms(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The delays faulthandler's timer was set to; it is not really set, and can't end the tests."""
    delays: list[float] = []
    monkeypatch.setattr(
        faulthandler, "dump_traceback_later", lambda delay, **_: delays.append(delay)
    )
    return delays


def watchdog_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "rayloop-watchdog"]


def test_a_silence_is_told_once_with_the_stack_of_the_thread_that_entered():
    hangs: list[Hang] = []
    release = threading.Event()

    def stuck_in_this_function() -> None:
        release.wait(GENEROUS_S)

    def loop() -> None:
        with Watchdog(3, 0.05, hangs.append, None) as watchdog:
            watchdog.mark(7, "prepare")
            stuck_in_this_function()

    thread = threading.Thread(target=loop)
    thread.start()
    wait_until(lambda: len(hangs) > 0)
    release.set()
    thread.join()
    hang = hangs[0]
    assert (hang.rank, hang.step, hang.phase) == (3, 7, "prepare")
    assert hang.waited_s >= 0.05
    assert "in stuck_in_this_function" in hang.stack
    assert "let_watchdog_look" not in hang.stack
    assert "wait_until" not in hang.stack  # the stack of this test's own thread
    assert pickle.loads(pickle.dumps(hang)) == hang


def test_marks_in_time_are_no_silence():
    clock, hangs = HandClock(), list[Hang]()
    with Watchdog(0, 0.02, hangs.append, None, clock) as watchdog:
        for step in range(5):
            watchdog.mark(step, "step")
            clock.at_s += 0.019
            clock.let_watchdog_look()
    assert hangs == []


def test_a_silence_is_told_again_only_after_progress():
    clock, hangs = HandClock(), list[Hang]()
    with Watchdog(0, 0.02, hangs.append, None, clock) as watchdog:
        watchdog.mark(1, "step")
        clock.at_s += 30
        wait_until(lambda: len(hangs) == 1)
        clock.at_s += 30
        clock.let_watchdog_look()
        assert len(hangs) == 1
        watchdog.mark(1, "step")  # the same place, but a new mark
        clock.let_watchdog_look()
        assert len(hangs) == 1
        clock.at_s += 40
        wait_until(lambda: len(hangs) == 2)
        clock.let_watchdog_look()
    assert [(hang.step, hang.phase, hang.waited_s) for hang in hangs] == [
        (1, "step", pytest.approx(30)),
        (1, "step", pytest.approx(40)),
    ]


def test_progress_while_the_stack_is_taken_is_no_silence(monkeypatch):
    """Else the stack would show another place than the report."""
    clock, hangs = HandClock(), list[Hang]()
    watchdog = Watchdog(0, 0.02, hangs.append, None, clock)
    taken: list[object] = []

    def go_on(frame: object) -> list[str]:
        taken.append(frame)
        watchdog.mark(2, "step")
        return []

    monkeypatch.setattr(traceback, "format_stack", go_on)
    with watchdog:
        watchdog.mark(1, "step")
        clock.at_s += 1
        wait_until(lambda: len(taken) == 1)
        clock.let_watchdog_look()
    assert hangs == []


def test_a_hang_before_the_first_mark_is_told_too():
    clock, hangs = HandClock(), list[Hang]()
    with Watchdog(0, 0.02, hangs.append, None, clock):
        clock.let_watchdog_look()
        assert hangs == []  # the time counts from the entry
        clock.at_s += 1
        wait_until(lambda: len(hangs) == 1)
    assert (hangs[0].step, hangs[0].phase) == (0, "data_wait")


def test_a_report_that_fails_is_logged_and_the_watch_goes_on(caplog):
    clock, hangs = HandClock(), list[Hang]()

    def fail(hang: Hang) -> None:
        hangs.append(hang)
        raise ConnectionError("nobody listens")

    with Watchdog(2, 0.02, fail, None, clock) as watchdog, caplog.at_level("ERROR", "rayloop"):
        clock.at_s += 1
        wait_until(lambda: len(hangs) == 1)
        watchdog.mark(4, "exchange")
        clock.at_s += 1
        wait_until(lambda: len(hangs) == 2)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert messages[1].startswith("rank 2 has been stuck in exchange at step 4")
    assert "nobody listens" in messages[1]


def test_leaving_waits_for_a_report_under_way():
    clock, told = HandClock(), list[Hang]()
    begun, leaving = threading.Event(), threading.Event()

    def report(hang: Hang) -> None:
        begun.set()
        assert leaving.wait(GENEROUS_S)
        time.sleep(0.05)  # time in which leaving would overtake it
        told.append(hang)

    with Watchdog(0, 0.02, report, None, clock):
        clock.at_s += 1
        assert begun.wait(GENEROUS_S)
        leaving.set()
    assert len(told) == 1


def test_zero_turns_it_off(tmp_path, arms):
    with Watchdog(0, 0.0, lambda _: None, tmp_path / "dump", HandClock()) as watchdog:
        watchdog.mark(0, "data_wait")
        assert watchdog_threads() == []
        assert not (tmp_path / "dump").exists()
    assert arms == []


@pytest.mark.parametrize("timeout_s", [-1.0, float("nan"), float("inf")])
def test_a_timeout_that_is_none_is_refused(timeout_s):
    with pytest.raises(ConfigError, match=r"train\.step_timeout_s=.*0 to turn the watchdog off"):
        Watchdog(0, timeout_s, lambda _: None, None)


def test_the_timer_is_set_again_with_progress_and_only_then(tmp_path, arms):
    clock, hangs = HandClock(), list[Hang]()
    with Watchdog(0, 0.02, hangs.append, tmp_path / "dump", clock) as watchdog:
        assert arms == [0.04]  # from the start, before any Python thread has to run
        clock.let_watchdog_look()
        assert len(arms) == 1
        for step in range(1, 4):
            watchdog.mark(step, "step")
            wait_until(lambda step=step: len(arms) == step + 1)
        clock.at_s += 1
        wait_until(lambda: len(hangs) == 1)
        clock.let_watchdog_look()
        assert len(arms) == 4
    assert set(arms) == {0.04}


@pytest.mark.parametrize("error", [None, ZeroDivisionError])
def test_leaving_cleans_up(tmp_path, monkeypatch, error):
    cancelled: list[bool] = []
    cancel = faulthandler.cancel_dump_traceback_later
    monkeypatch.setattr(
        faulthandler, "cancel_dump_traceback_later", lambda: cancelled.append(cancel() is None)
    )
    path = tmp_path / "new" / "rank0.txt"
    watchdog = Watchdog(0, 3600, lambda _: None, path)
    for _ in range(2):  # it can be entered again

        def enter() -> None:
            with watchdog:
                assert path.exists()
                assert len(watchdog_threads()) == 1
                if error:
                    raise error

        if error:
            with pytest.raises(error):
                enter()
        else:
            enter()
        assert watchdog_threads() == []
        assert not path.exists()
    assert cancelled == [True, True]


def test_a_dump_of_an_earlier_life_is_kept(tmp_path):
    path = tmp_path / "rank0.txt"
    path.write_text("Timeout!\n")
    with Watchdog(0, 3600, lambda _: None, path):
        pass
    assert path.read_text() == "Timeout!\n"


def test_a_second_timer_in_one_process_is_refused_and_the_first_stays(tmp_path, arms):
    first, second = tmp_path / "first", tmp_path / "second"
    with Watchdog(0, 3600, lambda _: None, first):
        with (
            pytest.raises(RuntimeError, match="Watch one loop"),
            Watchdog(1, 3600, lambda _: None, second),
        ):
            raise AssertionError("entered")
        assert arms == [7200]
        assert not second.exists()
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(OSError, match="file"),
        Watchdog(0, 3600, lambda _: None, tmp_path / "file" / "dump"),
    ):
        raise AssertionError("entered")
    with Watchdog(1, 3600, lambda _: None, second):
        assert second.exists()


STUCK_PROCESS = """
import ctypes, sys, time
from pathlib import Path
from rayloop.train.watchdog import Watchdog, describe

def with_the_lock():
    ctypes.PyDLL(None).sleep(600)

def without_the_lock():
    time.sleep(600)

def tell(hang):
    print(describe(hang), flush=True)

with Watchdog(1, 0.5, tell, Path(sys.argv[1])) as watchdog:
    watchdog.mark(37, "data_wait")
    globals()[sys.argv[2]]()
"""


@pytest.mark.parametrize("how", ["with_the_lock", "without_the_lock"])
def test_a_stuck_process_ends_and_leaves_its_stacks(tmp_path, how):
    dump = tmp_path / "rank1.txt"
    done = subprocess.run(
        [sys.executable, "-c", STUCK_PROCESS, dump, how], env={"PYTHONPATH": str(PLATFORM)},
        capture_output=True, text=True, check=False, timeout=GENEROUS_S,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert f"in {how}" in dump.read_text()
    if how == "with_the_lock":
        assert done.stdout == ""  # no Python thread could run
    else:
        assert done.stdout.startswith("rank 1 has been stuck in data_wait at step 37 for ")
        assert done.stdout.endswith("without_the_lock\n")


GLOO_PROCESSES = """
import os, pickle, sys, time
from pathlib import Path
import torch
import torch._dynamo  # DDP loads it, which takes seconds: once for both ranks
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from rayloop.train.watchdog import Watchdog

folder = Path(sys.argv[1])
torch.set_num_threads(1)
child = os.fork()
rank = 0 if child else 1
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
plain = DistributedDataParallel(nn.Linear(4, 4))
normed = DistributedDataParallel(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))

def all_reduce():
    dist.all_reduce(torch.ones(1))

def pending():
    dist.all_reduce(torch.ones(1), async_op=True).wait()

def gather():
    dist.all_gather_object([None, None], rank)

def backward():
    plain(torch.ones(4, 4)).sum().backward()

def forward():
    normed(torch.ones(4, 4))  # rank 0 hands its statistics to the others

def sleep(step):
    while not (folder / f"go-{step}").exists():
        time.sleep(0.01)

def enter(step, phase):
    global place
    place = step, phase
    watchdog.mark(step, phase)

def tell(hang):
    aside = folder / f"aside{rank}"
    aside.write_bytes(pickle.dumps(hang))
    aside.rename(folder / f"hang-{hang.step}-{rank}")
    watchdog.mark(*place)  # so that it is told again, should the machine have been slow at first

with Watchdog(rank, 0.2, tell, None) as watchdog:
    for step, exchange in enumerate([all_reduce, all_reduce, pending, gather, backward, forward]):
        if rank == (0 if exchange is forward else 1):
            enter(step, "prepare" if step == 0 else "step")
            sleep(step)
        enter(step, "step")
        exchange()
        enter(step, "exchange")
        dist.barrier()
if child:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
LATE_RANKS = [1, 1, 1, 1, 1, 0]


@pytest.fixture(scope="module", autouse=True)
def two_ranks(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """The ranks' process and its folder; it imports torch while the other tests run."""
    folder = tmp_path_factory.mktemp("ranks")
    script = folder / "loop_of_a_rank.py"
    script.write_text(GLOO_PROCESSES)
    env = {"PYTHONPATH": str(PLATFORM), "GLOO_SOCKET_IFNAME": "lo", "OPENBLAS_NUM_THREADS": "1"}
    with (folder / "stderr").open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, script, folder], env=env, stderr=stderr, start_new_session=True
        )
    yield process, folder
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def hang(rank: int, step: int = 5, phase: str = "step", stack: str = AT_WORK) -> Hang:
    return Hang(rank, step, phase, 60.0, stack)


@pytest.mark.parametrize(
    ("hangs", "world_size", "expected"),
    [
        ([hang(0), hang(2, step=1)], 4, [1, 3]),  # the silent ones, whatever the others say
        ([], 2, [0, 1]),
        ([hang(0, 6), hang(1, 5, "checkpoint"), hang(2, 6)], 3, [1]),
        ([hang(0, 5, "exchange"), hang(1, 5, "data_wait"), hang(2, 5, "data_wait")], 3, [1, 2]),
        ([hang(0, 5, "data_wait", IN_DDP), hang(1, 6, "step", AT_WORK)], 2, [0]),
        ([hang(0, stack=IN_DDP), hang(1), hang(2, stack=IN_ALL_REDUCE)], 3, [1]),
        ([hang(0, stack=IN_DDP), hang(1, stack=IN_DDP + AT_WORK)], 2, [1]),
        ([hang(0, stack=IN_DDP), hang(1, stack="")], 2, [1]),
        ([hang(0, stack=IN_DDP), hang(1, stack=IN_SAVE)], 2, [1]),
        ([hang(0, stack=IN_DDP), hang(1, stack=IN_EVENT)], 2, [1]),
        ([hang(0, stack=COMPILED_WAIT), hang(1, stack=IN_CONSTRUCTOR), hang(2)], 3, [2]),
        ([hang(0, stack=IN_DDP), hang(1, stack=IN_ALL_REDUCE)], 2, [0, 1]),
        ([hang(1), hang(0)], 2, [0, 1]),
        ([hang(0, 2), hang(1, 5), hang(0, 9)], 2, [1]),  # a rank's last report counts
    ],
)
def test_suspects(hangs, world_size, expected):
    assert suspects(hangs, world_size) == expected


def test_a_report_from_an_earlier_start_is_refused():
    with pytest.raises(ValueError, match=r"ranks \[3\] among world_size=2"):
        suspects([hang(0), hang(3)], 2)


HANGS = st.builds(
    hang,
    rank=st.integers(0, 4),
    step=st.integers(0, 2),
    phase=st.sampled_from(PHASES),
    stack=st.sampled_from([AT_WORK, IN_DDP, IN_ALL_REDUCE, IN_DDP + AT_WORK, ""]),
)


def progress_of(hang: Hang) -> tuple[int, int]:
    return hang.step, PHASES.index(hang.phase)


@given(st.lists(HANGS, unique_by=lambda hang: hang.rank), st.randoms())
def test_suspects_are_somebody_the_least_advanced_and_independent_of_report_order(hangs, random):
    named = suspects(hangs, 5)
    assert named == sorted(set(named)) != []
    assert set(named) <= set(range(5))
    shuffled = list(hangs)
    random.shuffle(shuffled)
    assert suspects(shuffled, 5) == named
    silent = sorted(set(range(5)) - {hang.rank for hang in hangs})
    if silent:
        assert named == silent
        return
    behind = [h.rank for h in hangs if progress_of(h) == min(map(progress_of, hangs))]
    if len(behind) < 5:
        assert named == sorted(behind)
        return
    busy = [h.rank for h in hangs if h.stack in (AT_WORK, IN_DDP + AT_WORK, "")]
    assert named == (sorted(busy) or list(range(5)))


def test_describe():
    stack = (
        '  File "/srv/loop.py", line 4, in run\n    go()\n  File "/srv/feed.py", line 9, in go\n'
    )
    assert describe(Hang(1, 37, "data_wait", 60.02, stack)) == (
        "rank 1 has been stuck in data_wait at step 37 for 60 s (train.step_timeout_s): "
        "/srv/feed.py:9 go"
    )
    assert describe(Hang(0, 0, "step", 0.52, "")) == (
        "rank 0 has been stuck in step at step 0 for 0.5 s (train.step_timeout_s): "
        "its thread has ended"
    )


def test_the_late_rank_is_told_from_the_one_that_waits_for_it(two_ranks):
    process, folder = two_ranks
    for step, late in enumerate(LATE_RANKS):
        hangs: list[Hang] = []

        def is_told(step: int = step, late: int = late, hangs: list[Hang] = hangs) -> bool:
            assert process.poll() is None, (folder / "stderr").read_text()
            paths = [folder / f"hang-{step}-{rank}" for rank in range(2)]
            hangs[:] = [pickle.loads(path.read_bytes()) for path in paths if path.exists()]
            return len(hangs) == 2 and suspects(hangs, 2) == [late]

        wait_until(is_told, lambda hangs=hangs: "\n".join(hang.stack for hang in hangs))
        assert "in sleep" in hangs[late].stack
        assert hangs[late].phase == ("prepare" if step == 0 else "step")
        (folder / f"go-{step}").touch()
    assert process.wait(GENEROUS_S) == 0, (folder / "stderr").read_text()
