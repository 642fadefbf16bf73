"""Processes that meet a root without a database at the same moment, each with a run to record.

    python tests/unit/cold_database.py WARM COLD COUNT

All are forked after MLflow's imports, which takes them seconds off, and wait for one sign.
"""

import os
import sys

from rayloop.storage import Storage
from rayloop.tracking import Tracker

SHARED = "shared"


def record(root: str, number: int) -> None:
    """A run of one's own, and one that all of them start."""
    tracker = Tracker(Storage(root))
    run = tracker.start_run(f"run-{number}", {"number": number})
    tracker.log_metrics(run, {"loss": number}, 1)
    tracker.finish(run)
    tracker.start_run(SHARED, {"number": "any"})


def main(warm: str, cold: str, count: str) -> None:
    """Fork, give the sign, and fail if one of them failed."""
    Tracker(Storage(warm)).find("imports everything")
    sign, held = os.pipe()
    children = []
    for number in range(int(count)):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.close(held)
                os.read(sign, 1)
                record(cold, number)
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    os.close(held)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    sys.exit(any(codes))


if __name__ == "__main__":
    main(*sys.argv[1:])
