"""Figures measured at several sizes -> a curve, and what it says of another size, with its doubt.

An error that falls with data or parameters follows a power law with an asymptote over a wide range
(Hestness et al. 2017, Rosenfeld et al. 2020): a + b * n^-c. Few points do not always bear it, so
it competes with the pure power law and with a constant; for the batch size, which has an optimum,
a parabola in log2 competes with a line and a constant. AICc names the winner.

The doubt has three sources, all kept:
- Seeds. Their variance is pooled over the points, as a multiple of the mean, and drawn itself, as
  in Student's t, since few seeds say little about it.
- The rows of the validation split, the same for every run. How the runs' mistakes go together
  over these rows gives the covariance of the points, so what all points share does not bend a
  curve, and still moves it. Of the error it is never less than its binomial part.
- The form of the curve. In each of several hundred redrawn measurements the curve is drawn by
  its Akaike weight (Burnham and Anderson 2002), not always the winner. These weights go by AIC:
  the noise is known from seeds and rows, so AICc's correction has no ground here, and with three
  points it would never admit an asymptote and be sure of what it cannot see. Where no curve passes
  the points within chance, that is said, and the doubt is widened by as much as the points are off
  (the ratio of Birge 1932).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Form = Literal["power", "parabola"]

DRAWS = 500
INTERVAL = (0.05, 0.95)
"""Quantiles that bound the 90% interval."""
LEAST_POINTS = 3
CURVE_POINTS = 60
EXPONENTS = np.geomspace(0.05, 3.0, 25)
"""Where the search for a power law's exponent begins."""
SEARCH_ROUNDS = 6
SEARCH_STEPS = 7
BEYOND_CHANCE = 3.0
"""Standard deviations of chi-squared from which on no curve is said to fit."""

NO_EFFECT = "no effect that can be told from chance"


@dataclass(frozen=True, slots=True)
class RowNoise:
    """What the choice of the validation rows adds to the doubt.

    Attributes:
        covariance: Of the points' means, shape (K, K).
        least_seed_variance: Least variance between two seeds of a point, shape (K,): even equally
            good models differ in which rows they get wrong.
    """

    covariance: Array
    least_seed_variance: Array


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """One figure at several sizes.

    Attributes:
        x: The sizes, ascending, at least `LEAST_POINTS` of them.
        values: The figure of each seed at each size.
        noise: What the validation rows add; None where the figure has nothing to do with them.
        form: `power` falls with x and never below 0; `parabola` may do anything.
        upper: The figure cannot be above this.
        is_ratio: The figure is positive and its logarithm is what a curve is laid through, as for
            images a second.
    """

    x: Sequence[float]
    values: Sequence[Sequence[float]]
    noise: RowNoise | None = None
    form: Form = "power"
    upper: float = float("inf")
    is_ratio: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """What a curve through the points says of another size.

    Attributes:
        model: The curve AICc prefers.
        coefficients: Its own, by name.
        weights: Share (0..1) of the redrawn measurements that each curve was taken for.
        x_now: The size compared with.
        x_then: The size asked about.
        now: Mean measured at `x_now`.
        predicted: Median at `x_then`.
        low: Lower end of the 90% interval of the mean over seeds and over all rows there could be.
        high: Its upper end.
        change: Median of the difference between the two sizes, both on the same curve; a ratio
            where the figure is one.
        change_low: Lower end of its 90% interval.
        change_high: Its upper end.
        effect: `lower`, `higher`, or that no effect can be told from chance.
        misfit: No curve passes the points within what chance allows; the intervals are widened, and
            what lies beyond the points is still doubtful.
        curve: `x`, and the redrawn curves' `median`, `low` and `high` there.
    """

    model: str
    coefficients: dict[str, float]
    weights: dict[str, float]
    x_now: float
    x_then: float
    now: float
    predicted: float
    low: float
    high: float
    change: float
    change_low: float
    change_high: float
    effect: str
    misfit: bool
    curve: dict[str, list[float]] = field(default_factory=dict)


def row_noise(rows: Sequence[npt.NDArray[np.generic]], is_share: bool) -> RowNoise:
    """What the validation rows add to the doubt, from each run's result on each row.

    Args:
        rows: For each point an array (seeds, rows): whether the row is wrong, or its loss.
        is_share: The results are 0 or 1. Then two rows that all runs get wrong and two that all
            get right are added (Agresti and Coull 1998): a split without a mistake is no proof
            that there are none.
    """
    results = [np.asarray(point, np.float64) for point in rows]
    if is_share:
        results = [np.concatenate([r, np.tile([0.0, 0, 1, 1], (len(r), 1))], 1) for r in results]
    count = results[0].shape[1]
    covariance = np.atleast_2d(np.cov(np.stack([r.mean(0) for r in results]), bias=True))
    least = np.zeros(len(results))
    for i, point in enumerate(results):
        seeds = len(point)
        if seeds > 1:  # between different seeds alone: what a seed adds is counted by itself
            own = point.var(1).sum()
            covariance[i, i] = (seeds**2 * covariance[i, i] - own) / (seeds * (seeds - 1))
            least[i] = point.var(0, ddof=1).mean() / count
    return RowNoise(covariance / count, least)


def binomial_deviation(share: float, rows: int) -> float:
    """Standard deviation of a share counted over so many rows, by Agresti and Coull."""
    at = (share * rows + 2) / (rows + 4)
    return float(np.sqrt(at * (1 - at) / (rows + 4)))


def forecast(measured: Measured, x_now: float, x_then: float, seed: int) -> Forecast | None:
    """Lay curves through the points and say what they give at another size.

    Args:
        measured: The points.
        x_now: One of the sizes measured: the one compared with.
        x_then: The size asked about.
        seed: Decides the redrawn measurements.

    Returns:
        None where there are too few points, or no point has two seeds.
    """
    scale = _log if measured.is_ratio else _same
    values = [scale(np.asarray(point, np.float64)) for point in measured.values]
    x, counts = np.asarray(measured.x, np.float64), np.array([len(v) for v in values])
    if len(x) < LEAST_POINTS or counts.sum() == len(x):
        return None
    lowest, highest = (-np.inf, np.inf) if measured.is_ratio else (0.0, measured.upper)
    means = np.array([v.mean() for v in values])
    draws, weights = _redraw(values, means, measured, np.random.default_rng(seed))
    names, solve, value_at = _FORMS[measured.form]
    at = np.concatenate([np.geomspace(min(x), max(*x, x_then), CURVE_POINTS), [x_now, x_then]])
    penalties = 2.0 * np.arange(1, len(names) + 1)[:, None]

    def solved(y: Array) -> tuple[Array, Array]:
        """Coefficients (M, B, 3) and weighted squares (M, B) of every curve."""
        coefficients = solve(y, weights, x / x_now)
        fitted = value_at(coefficients, x / x_now)
        return coefficients, np.asarray(((y - fitted) ** 2) @ weights)

    own, squares = solved(means[None])
    best = int((squares[:, 0] + _small_sample(len(x), int(counts.sum()))).argmin())
    closest = int((squares + penalties)[:, 0].argmin())
    off, freedom = float(squares[closest, 0]), len(x) - closest - 1
    misfit = freedom > 0 and off > freedom + BEYOND_CHANCE * float(np.sqrt(2 * freedom))
    if misfit:
        draws = means + (draws - means) * np.sqrt(off / freedom)
        weights = weights / (off / freedom)
    coefficients, squares = solved(np.clip(draws, lowest, highest))
    scores = squares + penalties
    chosen = _by_akaike_weight(scores, np.random.default_rng([seed, 1]))
    taken = coefficients[chosen, np.arange(len(draws))]
    curves = np.clip(value_at(taken, at / x_now), lowest, highest)
    changes = curves[:, -1] - curves[:, -2]
    back = np.exp if measured.is_ratio else _same
    low, median, high = back(np.quantile(curves, [INTERVAL[0], 0.5, INTERVAL[1]], axis=0))
    changed_low, changed, changed_high = np.quantile(changes, [INTERVAL[0], 0.5, INTERVAL[1]])
    return Forecast(
        model=names[best],
        coefficients=_named(measured.form, best, own[best, 0], x_now),
        weights={
            name: round(float((chosen == i).mean()), 4) for i, name in enumerate(names)
        },
        x_now=float(x_now),
        x_then=float(x_then),
        now=float(back(means[int(np.argmin(abs(x - x_now)))])),
        predicted=float(median[-1]),
        low=float(low[-1]),
        high=float(high[-1]),
        change=float(back(changed)),
        change_low=float(back(changed_low)),
        change_high=float(back(changed_high)),
        effect=_effect(changed_low, changed_high),
        misfit=misfit,
        curve={
            "x": at[:-2].tolist(),
            "median": median[:-2].tolist(),
            "low": low[:-2].tolist(),
            "high": high[:-2].tolist(),
        },
    )  # fmt: skip


def _redraw(
    values: Sequence[Array], means: Array, measured: Measured, chance: np.random.Generator
) -> tuple[Array, Array]:
    """Means as they might have come out as well, shape (DRAWS, K), and the weight of each point."""
    counts = np.array([len(v) for v in values])
    noise = measured.noise or RowNoise(np.zeros((len(means),) * 2), np.zeros(len(means)))
    smallest = max(float(abs(means).max()) * 1e-3, 1e-12)
    size = np.ones(len(means)) if measured.is_ratio else np.maximum(means, smallest)
    freedom = int((counts - 1).sum())
    pairs = zip(values, means, size, strict=True)
    dispersion = sum(float(((v - mean) ** 2).sum()) / s for v, mean, s in pairs) / freedom
    dispersion = max(dispersion, float(np.mean(noise.least_seed_variance / size)))
    of_seeds = dispersion * size / counts
    # A covariance from data can have directions of slightly negative variance.
    lengths, directions = np.linalg.eigh(noise.covariance)
    root = directions * np.sqrt(np.clip(lengths, 0, None))
    spread = np.sqrt(of_seeds * (freedom / chance.chisquare(freedom, (DRAWS, 1))))
    draws = means + chance.standard_normal((DRAWS, len(means))) @ root.T
    draws = draws + chance.standard_normal(draws.shape) * spread
    own = noise.covariance.diagonal()
    apart = noise.covariance[~np.eye(len(means), dtype=bool)]
    shared = max(0.0, min(float(apart.mean()), float(own.min())))
    variances = of_seeds + np.maximum(own - shared, 0) + (smallest * 0.1) ** 2
    return draws, 1 / variances


def _small_sample(points: int, runs: int) -> Array:
    """What AICc adds for 1, 2 and 3 coefficients; a curve through every point is never named."""
    penalties = []
    for count in (1, 2, 3):
        left = runs - count - 1
        is_allowed = count < points and left > 0
        penalties.append(2 * count + 2 * count * (count + 1) / left if is_allowed else np.inf)
    return np.array(penalties)


def _by_akaike_weight(scores: Array, chance: np.random.Generator) -> npt.NDArray[np.int64]:
    """One curve for each column, drawn with probability exp(-AIC / 2)."""
    weights = np.exp(-(scores - scores.min(0)) / 2)
    steps = np.cumsum(weights / weights.sum(0), axis=0)
    return np.asarray((chance.random(scores.shape[1]) > steps[:-1]).sum(0), np.int64)


def _effect(low: float, high: float) -> str:
    if high < -1e-9:
        return "lower"
    return "higher" if low > 1e-9 else NO_EFFECT


def _log(values: Array) -> Array:
    return np.log(values)


def _same(values: Array) -> Array:
    return values


def _power_curves(y: Array, weights: Array, t: Array) -> Array:
    """Coefficients (a, b, c) of a constant, a power law and one with an asymptote, (3, B, 3).

    For a given exponent the rest is linear, so only the exponent is searched: on a grid, then ever
    finer around the best, for all rows of `y` (B, K) at once.
    """
    weights = weights / weights.sum()
    nothing = np.zeros(len(y))
    found = [np.stack([y @ weights, nothing, nothing], axis=1)]
    rows = np.arange(len(y))
    for has_asymptote in (False, True):
        exponents = EXPONENTS[None]
        for _ in range(SEARCH_ROUNDS):
            a, b, squares = _given_exponents(y, weights, t, exponents, has_asymptote)
            exponents = np.broadcast_to(exponents, squares.shape)
            at = squares.argmin(1)
            best = np.stack([a[rows, at], b[rows, at], exponents[rows, at]], axis=1)
            below = exponents[rows, np.maximum(at - 1, 0)]
            above = exponents[rows, np.minimum(at + 1, squares.shape[1] - 1)]
            exponents = np.geomspace(below, above, SEARCH_STEPS, axis=1)
        found.append(best)
    return np.stack(found)


def _given_exponents(
    y: Array, weights: Array, t: Array, exponents: Array, has_asymptote: bool
) -> tuple[Array, Array, Array]:
    """Best a >= 0 and b >= 0 for each exponent, and the mean square left; all (B, G)."""
    falls = t ** -exponents[:, :, None]  # (B or 1, G, K)
    mean, power = (y @ weights)[:, None], ((y**2) @ weights)[:, None]
    centre, fall_power = falls @ weights, falls**2 @ weights
    along = (falls @ (weights * y)[:, :, None])[:, :, 0]
    alone = np.maximum(along / fall_power, 0)
    a, b = np.zeros_like(alone), alone
    if has_asymptote:
        b = np.maximum((along - mean * centre) / (fall_power - centre**2), 0)
        a = mean - b * centre
        b = np.where(a < 0, alone, b)
        a = np.maximum(a, 0)
    squares = power - 2 * (a * mean + b * along - a * b * centre) + a**2 + b**2 * fall_power
    return a, b, squares


def _power_at(coefficients: Array, t: Array) -> Array:
    a, b, c = (coefficients[..., i, None] for i in range(3))
    return np.asarray(a + b * t**-c)


def _parabolas(y: Array, weights: Array, t: Array) -> Array:
    """Coefficients of a constant, a line and a parabola in log2, (3, B, 3)."""
    root, powers = np.sqrt(weights), np.vander(np.log2(t), 3, increasing=True)
    found = np.zeros((3, len(y), 3))
    for count in (1, 2, 3):
        inverse = np.linalg.pinv(powers[:, :count] * root[:, None])
        found[count - 1, :, :count] = (y * root) @ inverse.T
    return found


def _parabola_at(coefficients: Array, t: Array) -> Array:
    return np.asarray(coefficients @ np.vander(np.log2(t), 3, increasing=True).T)


Solve = Callable[[Array, Array, Array], Array]
Evaluate = Callable[[Array, Array], Array]
_FORMS: dict[Form, tuple[tuple[str, str, str], Solve, Evaluate]] = {
    "power": (
        ("constant", "power law", "power law with asymptote"), _power_curves, _power_at
    ),
    "parabola": (("constant", "line", "parabola"), _parabolas, _parabola_at),
}  # fmt: skip


def _named(form: Form, model: int, values: Array, reference: float) -> dict[str, float]:
    """The coefficients a curve really has: a + b * x^-c, or p0 + p1 * l + p2 * l^2, l of x."""
    if form == "parabola":
        named = {f"p{i}": float(values[i]) for i in range(model + 1)}
        return {**named, "log2_from": float(reference)}
    a, b, c = (float(value) for value in values)
    if model == 0:
        return {"a": a}
    b *= float(reference) ** c
    return {"b": b, "c": c} if model == 1 else {"a": a, "b": b, "c": c}
