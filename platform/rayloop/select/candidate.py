"""What is compared: a run's model in one form, with what it is worth and what it costs."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from rayloop.tune.front import Best, pareto_front

Aim = Literal["accuracy", "latency", "throughput", "bytes"]

AIMS: dict[Aim, tuple[str, Best]] = {
    "accuracy": ("accuracy", "highest"),
    "latency": ("latency_ms_b1", "lowest"),
    "bytes": ("size_bytes", "lowest"),
    "throughput": ("images_per_second", "highest"),
}
"""What can be aimed at: the candidate's figure, and which end of it is the good one."""
MAX_LABEL = 22
MIN_COMMON = 5
"""Fewer letters that all names begin with are not worth leaving out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """One model of one run.

    Attributes:
        name: `RUN_ID/fp32` or `RUN_ID/int8`.
        run_id: The training run.
        method: `fp32` or `int8_static`.
        accuracy: Share (0..1) of the validation rows that it gets right.
        agreement: Share (0..1) of the validation rows on which it chooses fp32's class.
        latency_ms_b1: Median time of one row in milliseconds, in the quietest pass.
        latency_ms_p99: 99th percentile of the same.
        images_per_second: Rows a second in calls of 32 rows, at the median of the quietest pass.
        spread: How much slower the slowest pass was, as a share of the quietest; the larger one of
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


def short_names(run_ids: Sequence[str]) -> dict[str, str]:
    """A label for each run: without what all have in common, and the end of a long name."""
    names = sorted(set(run_ids))
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(names[0], names[-1]))  # noqa: B905
    cut = "".join(letter for letter, _ in same).rfind("-") + 1
    cut = cut if cut >= MIN_COMMON and len(names) > 1 else 0
    short = {name: f"…{name[cut:]}" if cut else name for name in names}
    return {
        name: label if len(label) <= MAX_LABEL else f"…{label[-MAX_LABEL + 1 :]}"
        for name, label in short.items()
    }
