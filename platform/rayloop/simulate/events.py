"""Failures by chance -> how long one run took: the closed form of `failures`, played out."""

import math
import random

ROUNDING = 1e-9


def play_s(
    work_s: float,
    interval_s: float,
    cost_s: float,
    restart_s: float,
    between_s: float,
    chance: random.Random,
) -> float:
    """Seconds until so much work is done and kept.

    The run tries a piece of work and its checkpoint. A failure that comes before the end of it
    throws the piece away and is followed by a restart, in which the next failure may come.

    Args:
        work_s: Work of the whole run; the last piece may be shorter.
        interval_s: Work between two checkpoints.
        cost_s: Time a checkpoint takes from the work.
        restart_s: From a failure to the first step after it.
        between_s: Mean time between failures.
        chance: Draws the failures.
    """
    now_s, fails_at_s = 0.0, _next(0.0, between_s, chance)
    for piece_s in _pieces(work_s, interval_s):
        while now_s + piece_s + cost_s > fails_at_s:
            now_s = fails_at_s
            fails_at_s = _next(now_s, between_s, chance)
            while now_s + restart_s > fails_at_s:  # a restart may fail too
                now_s = fails_at_s
                fails_at_s = _next(now_s, between_s, chance)
            now_s += restart_s
        now_s += piece_s + cost_s
    return now_s


def _pieces(work_s: float, interval_s: float) -> list[float]:
    """Work between checkpoints; what rounding leaves over is no piece, which would cost one."""
    whole = math.floor(work_s / interval_s + ROUNDING)
    rest_s = work_s - whole * interval_s
    return [interval_s] * whole + ([rest_s] if rest_s > ROUNDING * interval_s else [])


def _next(now_s: float, between_s: float, chance: random.Random) -> float:
    return math.inf if math.isinf(between_s) else now_s + chance.expovariate(1 / between_s)
