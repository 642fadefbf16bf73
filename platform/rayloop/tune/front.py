"""Points and what is better in each figure -> those that no other point beats."""

from collections.abc import Sequence
from typing import Literal

import numpy as np

Best = Literal["highest", "lowest"]


def pareto_front(points: Sequence[Sequence[float]], best: Sequence[Best]) -> list[int]:
    """Where the points are that no other one dominates.

    A point dominates another if it is nowhere worse and somewhere better; equal points do not
    dominate each other, so of duplicates all stay or none does.

    Args:
        points: The figures of each point, in the order of `best`.
        best: For each figure whether the highest or the lowest is best.

    Returns:
        Indices into `points`, rising.

    Raises:
        ValueError: A figure is not a number, or a point has more or fewer than `best`.
    """
    if not points:
        return []
    signs = np.array([1.0 if direction == "highest" else -1.0 for direction in best])
    values = np.array(points, dtype=np.float64).reshape(len(points), -1)
    if values.shape[1] != len(best) or np.isnan(values).any():
        raise ValueError(f"Points {points} must have {len(best)} figures each, and no NaN.")
    values = values * signs
    return [
        at
        for at, value in enumerate(values)
        if not ((values >= value).all(axis=1) & (values > value).any(axis=1)).any()
    ]
