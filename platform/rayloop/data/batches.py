"""Rows in memory and an order -> one worker's batches, step by step."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from rayloop.data.order import SampleOrder
from rayloop.data.versions import Split


@dataclass(frozen=True, slots=True)
class Batch:
    """One rank's part of one step.

    Attributes:
        step: The global step.
        images: uint8, shape (B, H, W, C).
        labels: int64, shape (B,).
    """

    step: int
    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]


class Feed(Protocol):
    """What the training loop asks of a source of batches."""

    def batches(self, first_step: int, last_step: int) -> Iterator[Batch]:
        """This rank's batches of the steps from `first_step` up to, not including, `last_step`."""
        ...


class ResidentFeed:
    """Batches gathered from arrays in memory; in a Ray worker, the object store's own pages.

    Args:
        split: The training rows.
        order: The run's order.
        rank: This worker.
        world_size: All workers.
    """

    def __init__(self, split: Split, order: SampleOrder, rank: int, world_size: int) -> None:
        self._split, self._order = split, order
        self._rank, self._world_size = rank, world_size

    def batches(self, first_step: int, last_step: int) -> Iterator[Batch]:
        """This rank's batches of the steps from `first_step` up to, not including, `last_step`."""
        for step in range(first_step, last_step):
            rows, _ = self._order.rows(step)
            mine = rows[self._order.stripe(step, self._rank, self._world_size)]
            yield Batch(step, self._split.images[mine], self._split.labels[mine])
