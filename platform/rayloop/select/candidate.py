"""What is compared: a run's model in one form, with what it is worth and what it costs."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from rayloop.select.front import Best, pareto_front

Aim = Literal["accuracy", "latency", "throughput", "bytes"]

AIMS: dict[Aim, tuple[str, Best]] = {
    "accuracy": ("accuracy", "highest"),
    "latency": ("latency_ms_b1", "lowest"),
    "bytes": ("size_bytes", "lowest"),
    "throughput": ("images_per_second", "highest"),
}
"""What can be aimed at: the candidate's figure, and which end of it is the good one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """One model of one run.

    Attributes:
        name: `RUN_ID/fp32` or `RUN_ID/int8`.
        run_id: The training run.
        method: `fp32` or `int8_static`.
        accuracy: Share (0..1) of the validation rows that it gets right.
        agreement: Share (0..1) of the validation rows on which it chooses fp32's class.
        latency_ms_b1: Median time of one row in milliseconds.
        latency_ms_p99: 99th percentile of the same.
        images_per_second: Rows a second in calls of 32 rows.
        spread: How far the rounds of timing lie apart, as a share of the median; the larger one of
            the two batch sizes.
        size_bytes: Size of its file.
        refused: Why it cannot be registered and is only compared; empty when it can.
        right: Which validation rows it gets right, shape (N,); empty where it is only compared.
    """

    name: str
    run_id: str
    method: str
    accuracy: float
    agreement: float
    latency_ms_b1: float
    latency_ms_p99: float
    images_per_second: float
    spread: float
    size_bytes: int
    refused: str = ""
    right: npt.NDArray[np.bool_] = field(
        default_factory=lambda: np.zeros(0, dtype=np.bool_), compare=False, repr=False
    )

    def figure(self, aim: Aim) -> float:
        """What counts for an aim."""
        return float(getattr(self, AIMS[aim][0]))

    def summary(self) -> dict[str, Any]:
        """The candidate as the job prints it."""
        return {
            "name": self.name,
            "run_id": self.run_id,
            "accuracy": self.accuracy,
            "latency_ms_b1": self.latency_ms_b1,
            "images_per_second": self.images_per_second,
            "size_bytes": self.size_bytes,
        }


def front_of(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those that no other one beats in all four figures, in the given order."""
    figures = [[candidate.figure(aim) for aim in AIMS] for candidate in candidates]
    return [candidates[at] for at in pareto_front(figures, [best for _, best in AIMS.values()])]
