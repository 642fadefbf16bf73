"""Turn a server's process tree into CPU seconds, memory and open files, and end it whole."""

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

TICK_S = 1 / os.sysconf("SC_CLK_TCK")
PR_SET_CHILD_SUBREAPER = 36
PARENT, UTIME, STIME, CUTIME, CSTIME = 1, 11, 12, 13, 14
"""Places of fields of /proc/PID/stat behind the process's name."""


def adopt_orphans() -> None:
    """Make daemons that leave their parents children of this process, so that none is missed."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """What a process tree has used up to now."""

    cpu_s: float
    """User and system seconds of all processes, those that ended included."""

    memory_mb: float
    """Proportional set size: a page shared by n processes counts 1/n in each."""

    open_files: int
    processes: int

    by_name: dict[str, float]
    """CPU seconds by process name."""


class Tree:
    """Every process that descends from this one, except those that were there at the start.

    One server runs at a time, so whatever appears is part of it. Processes are remembered: what
    one that has ended had used still counts.
    """

    def __init__(self) -> None:
        self._before = _descendants(os.getpid())
        self._cpu_s: dict[int, tuple[str, float]] = {}

    def pids(self, but: int = 0) -> list[int]:
        """The tree's living processes.

        Args:
            but: A process that is none of the server's, e.g. the client.
        """
        return [pid for pid in _descendants(os.getpid()) if pid not in self._before and pid != but]

    def usage(self, but: int = 0, memory: bool = True) -> Usage:
        """What the tree has used.

        Args:
            but: A process that is none of the server's.
            memory: Measuring memory walks page tables and costs milliseconds; False leaves it out.
        """
        pids, memory_kb, files = self.pids(but), 0, 0
        for pid in pids:
            with contextlib.suppress(OSError, ValueError, IndexError):
                name, fields = _stat(pid)
                ticks = sum(int(fields[i]) for i in (UTIME, STIME))
                self._cpu_s[pid] = (name, ticks * TICK_S)
                if memory:
                    memory_kb += _pss_kb(pid)
                    files += len(os.listdir(f"/proc/{pid}/fd"))
        by_name: dict[str, float] = {}
        for name, cpu_s in self._cpu_s.values():
            by_name[name] = by_name.get(name, 0.0) + cpu_s
        return Usage(
            cpu_s=sum(by_name.values()),
            memory_mb=memory_kb / 1024,
            open_files=files,
            processes=len(pids),
            by_name=by_name,
        )

    def end(self, first: int, grace_s: float = 20.0) -> None:
        """End the server: SIGTERM to its first process, SIGKILL to what is left after the grace."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(first, signal.SIGTERM)
        until = time.monotonic() + grace_s
        while self.pids() and time.monotonic() < until:
            _reap()
            time.sleep(0.1)
        while pids := self.pids():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)
            _reap()


def _reap() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _stat(pid: int) -> tuple[str, list[str]]:
    text = Path(f"/proc/{pid}/stat").read_text()
    head, _, tail = text.rpartition(")")
    return head.partition("(")[2], tail.split()


def _pss_kb(pid: int) -> int:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1])
    return 0


def _descendants(root: int) -> set[int]:
    parents = dict(_parents())
    found = {root}
    grew = True
    while grew:
        more = {pid for pid, parent in parents.items() if parent in found} - found
        found |= more
        grew = bool(more)
    return found - {root}


def _parents() -> Iterator[tuple[int, int]]:
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError, IndexError, ValueError):
                yield int(entry), int(_stat(int(entry))[1][PARENT])
