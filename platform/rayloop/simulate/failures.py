"""Failures, restarts and checkpoints -> the share of the time that is training which is kept.

The model of Daly 2006, "A higher order estimate of the optimum checkpoint interval for restart
dumps": failures come at a constant rate at any moment, also while a checkpoint is written and while
the run restarts; each costs the work since the last checkpoint and a restart. A run is cut into
pieces of `interval_s` work and `cost_s` checkpoint. How long a piece takes then is exact:

    expected = mtbf exp(restart / mtbf) (exp((interval + cost) / mtbf) - 1)

`rayloop.simulate.events` plays the same by chance, and a test holds the two together.
"""

import math

SECONDS_A_DAY = 86_400.0
LARGEST_EXPONENT = 700.0
"""Beyond it a float overflows: the run never gets there."""
HALVINGS = 200
"""Of the stretch in which the best interval is looked for; a float has 53 bits."""


def mtbf_s(workers: int, failures_per_worker_day: float) -> float:
    """Seconds between two failures of any of so many workers; infinite where none fails."""
    rate = workers * failures_per_worker_day / SECONDS_A_DAY
    return 1 / rate if rate > 0 else math.inf


def goodput(interval_s: float, cost_s: float, restart_s: float, between_s: float) -> float:
    """Share (0..1) of the time that is work which is kept, in the long run.

    Args:
        interval_s: Work between two checkpoints.
        cost_s: Time a checkpoint takes from the work.
        restart_s: From a failure to the first step after it.
        between_s: Mean time between failures; may be infinite.
    """
    piece_s = interval_s + cost_s
    if math.isinf(between_s):
        return interval_s / piece_s
    if (piece_s + restart_s) / between_s > LARGEST_EXPONENT:
        return 0.0
    expected = between_s * math.exp(restart_s / between_s) * math.expm1(piece_s / between_s)
    return interval_s / expected


def best_interval_s(cost_s: float, between_s: float) -> float:
    """The interval with the largest `goodput`.

    Its derivative is zero where log(1 - x) + x = -cost / mtbf for x = interval / mtbf. The left
    side falls from 0 at x = 0 without end towards x = 1, so halving finds it. The restart time does
    not move it.

    Args:
        cost_s: Time a checkpoint takes from the work.
        between_s: Mean time between failures.

    Returns:
        Seconds; 0 where checkpoints are free, infinite where nothing fails.
    """
    if math.isinf(between_s):
        return math.inf
    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if middle < 1 and math.log1p(-middle) + middle > -cost_s / between_s:
            low = middle
        else:
            high = middle
    return high * between_s


def young_s(cost_s: float, between_s: float) -> float:
    """The interval of Young 1974, sqrt(2 cost mtbf): right where both are small beside the mtbf."""
    return math.sqrt(2 * cost_s * between_s)


def daly_s(cost_s: float, between_s: float) -> float:
    """The interval of Daly 2006, eq. 37: two more terms, less the checkpoint's own time."""
    if cost_s >= 2 * between_s:
        return between_s
    part = cost_s / (2 * between_s)
    return young_s(cost_s, between_s) * (1 + math.sqrt(part) / 3 + part / 9) - cost_s
