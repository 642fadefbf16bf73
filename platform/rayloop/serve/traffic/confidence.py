"""Turn probabilities into what to do with each row: accept it, ask a larger model, ask a person."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

BURST_ROWS = 32.0
"""Rows that may fall back at once after a time in which none did."""


@dataclass(slots=True)
class FallbackCap:
    """Keeps the share of rows that fall back below a limit, as a bucket of tokens.

    Each answered row brings `max_share` of a token, each row that falls back takes one. Over any
    stretch of n rows at most `max_share` * n + `BURST_ROWS` fall back.
    """

    max_share: float
    """0..1."""

    tokens: float = field(default=BURST_ROWS, init=False)

    def seen(self, rows: int) -> None:
        """Rows have been answered."""
        self.tokens = min(BURST_ROWS, self.tokens + rows * self.max_share)

    def take(self, rows: int) -> int:
        """How many of the rows may fall back; they are counted as having done so."""
        allowed = min(rows, int(self.tokens)) if self.max_share > 0 else 0
        self.tokens -= allowed
        return allowed


def doubtful_rows(probabilities: NDArray[np.float32], below: float) -> list[int]:
    """The rows whose highest probability is below a limit, or is no number; the first one first.

    Args:
        probabilities: float32 [N, K].
        below: 0..1.
    """
    if below <= 0.0:
        return []
    if len(probabilities) == 1:  # most requests; several times as fast as the general way
        return [] if probabilities.max() >= below else [0]
    sure: NDArray[np.bool_] = probabilities.max(axis=1) >= below
    return [] if sure.all() else np.flatnonzero(~sure).tolist()
