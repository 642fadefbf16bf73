"""One-line structured logs on stderr: time, level, stage and rank, then a plain sentence."""

import logging
import sys


def stage_logger(stage: str) -> logging.Logger:
    """The logger of one stage, e.g. `stage_logger("train")`; silent until `configure`."""
    return logging.getLogger(f"rayloop.{stage}")


def configure(level: str = "INFO", rank: int | None = None) -> None:
    """Send rayloop's logs to stderr, once; stdout belongs to results.

    Args:
        level: Lowest level shown.
        rank: The worker's rank, shown in each line; None on the driver.
    """
    root = logging.getLogger("rayloop")
    root.setLevel(level)
    root.propagate = False
    who = "" if rank is None else f" rank={rank}"
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        logging.Formatter(f"%(asctime)s %(levelname)s %(name)s{who} %(message)s", "%H:%M:%S")
    )
    root.handlers[:] = [handler]
