"""Processes that meet a root without a database at the same moment, each with a run to record.

    python tests/unit/cold_database.py WARM COLD COUNT

All are forked after MLflow's imports, which takes them seconds off. They wait for one sign to open
the database, and when all have it for another to start the same run.
"""

import os
import sys

from rayloop.storage import Storage
from rayloop.tracking import Tracker

SHARED = "shared"


class Gate:
    """A pipe that forked processes wait at until the first of them closes it."""

    def __init__(self) -> None:
        self._waits, self._held = os.pipe()

    def wait(self) -> None:
        os.close(self._held)
        os.read(self._waits, 1)

    def open(self) -> None:
        os.close(self._held)


def record(root: str, number: int, cold: Gate, ready: int, same: Gate) -> None:
    """A run that all of them start, and one of one's own."""
    tracker = Tracker(Storage(root))
    cold.wait()
    tracker.find(SHARED)
    os.write(ready, b".")
    os.close(ready)
    same.wait()
    tracker.start_run(SHARED, {"number": "any"})
    run = tracker.start_run(f"run-{number}", {"number": number})
    tracker.log_metrics(run, {"loss": number}, 1)
    tracker.finish(run)


def main(warm: str, root: str, count: str) -> None:
    """Fork, give the signs, and fail if one of them failed."""
    Tracker(Storage(warm)).start_run("imports everything", {})
    cold, same, (heard, ready) = Gate(), Gate(), os.pipe()
    children = []
    for number in range(int(count)):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                record(root, number, cold, ready, same)
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    os.close(ready)
    cold.open()
    while os.read(heard, 100):  # until each has written and closed it, or died
        pass
    same.open()
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    sys.exit(any(codes))


if __name__ == "__main__":
    main(*sys.argv[1:])
