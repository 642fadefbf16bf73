"""Run a job's main function: its result becomes the last line of stdout, its error one message."""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from rayloop import logs
from rayloop.errors import RayloopError
from rayloop.submit.arrival import refuse_to_start, run_shipped_code


def run_job(main: Callable[[], dict[str, Any]]) -> None:
    """Run `main`, print what it returns as one JSON line, and end the process.

    Exit codes: 0 done, 1 the work failed, 2 the request was wrong, 143 stopped by SIGTERM,
    130 by Ctrl-C. A `RayloopError` is shown as its message alone; anything else is a defect of
    rayloop and keeps its traceback.
    """
    logs.configure()
    signal.signal(signal.SIGTERM, _terminate)
    run_shipped_code(os.environ, Path.cwd())
    try:
        refuse_to_start(os.environ)
        result = main()
    except RayloopError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        raise SystemExit(130) from None
    sys.stdout.flush()
    print(json.dumps(result), flush=True)


def _terminate(_signal: int, _frame: FrameType | None) -> None:
    """Turn SIGTERM into an exception, so that context managers stop what they started."""
    raise SystemExit(143)
