"""Do the intervals of `jobs/scaling.py` hold what they say? Curves through points of known truth.

    .venv/bin/python benchmarks/scaling_coverage.py
    .venv/bin/python benchmarks/scaling_coverage.py --points 3 --seeds 2 --repeats 120

Prints a Markdown table: how often the 90% interval holds the error at twice as much, and how often
that of the change does. Nothing is trained; a minute.
"""

import argparse
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np

from rayloop.tune.scaling_fit import NO_EFFECT, Form, Measured, forecast, row_noise

Truth = Callable[[float], float]

NORMAL = NormalDist()
SHARES = (0.125, 0.25, 0.5, 1.0)
LARGEST = 48_000.0
BATCHES = (32.0, 64.0, 128.0, 256.0)
BATCH_NOW = 64.0
POWER_LAWS = (
    (0.05, 0.03, 0.6, 6000), (0.0, 0.08, 0.3, 6000), (0.07, 0.01, 1.0, 6000),
    (0.02, 0.1, 0.5, 1000), (0.3, 0.1, 0.3, 2000), (0.01, 0.02, 1.0, 180),
    (0.08, 0.0, 1.0, 6000), (0.03, 0.0, 1.0, 180),
)  # fmt: skip
"""a, b at the largest size, c, and the rows of the validation split."""
PARABOLAS = ((0.05, 0.005, 0.004, 1000), (0.05, 0.01, 0.0, 1000), (0.05, 0.0, 0.0, 1000))
"""Error at the batch of now, slope and bend in log2, and the rows of the validation split."""


def power_law(a: float, b: float, c: float) -> Truth:
    """The error a + b * n^-c, where b is what its part is at the largest size."""
    return lambda n: float(a + b * (n / LARGEST) ** -c)


def parabola(level: float, slope: float, bend: float) -> Truth:
    """A parabola in log2 around the batch of now."""
    return lambda n: float(
        level + slope * np.log2(n / BATCH_NOW) + bend * np.log2(n / BATCH_NOW) ** 2
    )


def mistakes(
    truth: Truth,
    chance: np.random.Generator,
    sizes: Sequence[float],
    rows: int,
    seeds: int = 3,
    luck: float = 0.03,
) -> list[Any]:
    """Which rows the runs get wrong: some are hard for all runs, some at a size, some for a run.

    Args:
        truth: Error (0..1) at a size.
        chance: Where all randomness comes from.
        sizes: Of the points.
        rows: Of the validation split.
        seeds: Runs of a point.
        luck: Relative standard deviation of the models' own errors between seeds.

    Returns:
        For each size an array of bool, shape (seeds, rows).
    """
    hard_for_all = chance.standard_normal(rows)
    wrong = []
    for size in sizes:
        share = np.clip(truth(size) * (1 + luck * chance.standard_normal(seeds)), 1e-4, 0.99)
        level = np.array([NORMAL.inv_cdf(1 - one) for one in share])
        here = np.sqrt(0.15) * chance.standard_normal(rows)
        own = np.sqrt(0.45) * chance.standard_normal((seeds, rows))
        wrong.append(np.sqrt(0.4) * hard_for_all + here + own > level[:, None])
    return wrong


def coverage(
    truth: Truth, sizes: Sequence[float], now: float, form: Form, repeats: int, **kinds: Any
) -> dict[str, float]:
    """How often the intervals hold the truth, and how often no effect is seen; shares (0..1)."""
    then, change = truth(2 * now), truth(2 * now) - truth(now)
    held = {"error": 0, "change": 0, "no_effect": 0}
    for index in range(repeats):
        wrong = mistakes(truth, np.random.default_rng([7, index]), sizes, **kinds)
        values = [point.mean(1) for point in wrong]
        noise = row_noise(wrong, is_share=True)
        measured = Measured(x=sizes, values=values, noise=noise, form=form, upper=1.0)
        told = forecast(measured, now, 2 * now, index)
        assert told is not None
        assert 0 <= told.low <= told.predicted <= told.high <= 1
        held["error"] += told.low <= then <= told.high
        held["change"] += told.change_low - 1e-12 <= change <= told.change_high + 1e-12
        held["no_effect"] += told.effect == NO_EFFECT
    return {name: count / repeats for name, count in held.items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=200)
    options = parser.parse_args()
    sizes = [share * LARGEST for share in SHARES[-options.points :]]
    print("| truth | validation rows | holds the error | holds the change | no effect seen |")
    print("| --- | --- | --- | --- | --- |")

    def row(name: str, truth: Truth, at: Sequence[float], now: float, form: Form, n: int) -> None:
        luck = 0.1 if n < 500 else 0.03
        kinds = {"rows": n, "seeds": options.seeds, "luck": luck}
        told = coverage(truth, at, now, form, options.repeats, **kinds)
        shares = " | ".join(f"{100 * share:.0f}%" for share in told.values())
        print(f"| {name} | {n:,} | {shares} |", flush=True)

    for a, b, c, n in POWER_LAWS:
        name = f"a {100 * a:g}%, b {100 * b:g}%, c {c:g}" if b else f"flat at {100 * a:g}%"
        row(name, power_law(a, b, c), sizes, LARGEST, "power", n)
    for level, slope, bend, n in PARABOLAS:
        name = f"batch: {100 * level:g}%, slope {100 * slope:g}, bend {100 * bend:g}"
        row(name, parabola(level, slope, bend), BATCHES[: options.points], BATCH_NOW, "parabola", n)


if __name__ == "__main__":
    main()
