"""What a search gives: a configuration to try, or that it must wait for running trials."""

from dataclasses import dataclass
from enum import Enum

import numpy as np

from rayloop.tune.space import Assignment


class Wait(Enum):
    """There is nothing to try until a running trial ends."""

    FOR_TRIALS = "for trials"


@dataclass(frozen=True, slots=True)
class Suggestion:
    """A configuration, and which part of a run it is for.

    Attributes:
        assignment: Values by field.
        parent: Number of the trial whose model it goes on with; -1 begins anew.
        start_epoch: Epochs that were done before it.
        stop_epochs: Epochs after which it ends; 0 is the configured end.
    """

    assignment: Assignment
    parent: int = -1
    start_epoch: float = 0.0
    stop_epochs: float = 0.0


def generator(seed: int, number: int) -> np.random.Generator:
    """The random numbers of one suggestion: a function of the sweep's seed and its number."""
    return np.random.Generator(np.random.Philox(key=[seed, number]))
