"""Failures by chance -> how long one run took: the closed form of `failures`, played out."""

import math
import random


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
    now_s, left_s = 0.0, work_s
    fails_at_s = _next(0.0, between_s, chance)
    while left_s > 0:
        piece_s = min(interval_s, left_s)
        end_s = now_s + piece_s + cost_s
        if end_s <= fails_at_s:
            now_s, left_s = end_s, left_s - piece_s
            continue
        while True:  # a restart may fail too
            now_s = fails_at_s
            fails_at_s = _next(now_s, between_s, chance)
            if now_s + restart_s <= fails_at_s:
                now_s += restart_s
                break
    return now_s


def _next(now_s: float, between_s: float, chance: random.Random) -> float:
    return math.inf if math.isinf(between_s) else now_s + chance.expovariate(1 / between_s)
