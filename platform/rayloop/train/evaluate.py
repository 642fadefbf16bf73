"""A model and a split -> metrics that add up across workers, every row counted once."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed
from torch import nn
from torch.nn.functional import cross_entropy

from rayloop.data.versions import Split


@dataclass(frozen=True, slots=True)
class Metrics:
    """Sums over rows.

    Attributes:
        confusion: Rows by (true class, predicted class), shape (K, K).
        loss_sum: Summed cross-entropy.
    """

    confusion: npt.NDArray[np.int64]
    loss_sum: float

    @property
    def count(self) -> int:
        """Rows counted."""
        return int(self.confusion.sum())

    @property
    def accuracy(self) -> float:
        """Share of rows whose class was predicted."""
        return float(np.trace(self.confusion) / max(1, self.count))

    @property
    def loss(self) -> float:
        """Mean cross-entropy."""
        return self.loss_sum / max(1, self.count)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    split: Split,
    num_classes: int,
    batch_size: int,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    flip: bool = False,
) -> Metrics:
    """Evaluate a split with all workers; each takes every world_size-th row.

    Whatever the number of workers, each row is counted once, which is checked after the sums are
    added up. The model is left in the mode it was in.

    Args:
        model: The bare classifier (not wrapped in DDP), uint8 images to logits.
        split: The rows, the same on every worker.
        num_classes: K.
        batch_size: Rows at once.
        device: Where the model is.
        rank: This worker.
        world_size: All workers.
        flip: Average the logits of each image and its mirror image (test-time augmentation).
    """
    was_training = model.training
    model.eval()
    sums = torch.zeros(num_classes * num_classes + 1, dtype=torch.float64, device=device)
    for start in range(rank, len(split), world_size * batch_size):
        part = slice(start, start + world_size * batch_size, world_size)
        images = torch.from_numpy(split.images[part].copy()).to(device)
        labels = torch.from_numpy(split.labels[part].copy()).to(device)
        logits = model(images).float()
        if flip:
            logits = (logits + model(images.flip(2)).float()) / 2
        sums[-1] += cross_entropy(logits, labels, reduction="sum")
        cells = labels * num_classes + logits.argmax(dim=1)
        sums[:-1] += torch.bincount(cells, minlength=num_classes**2)
    if world_size > 1:
        torch.distributed.all_reduce(sums)
    model.train(was_training)
    confusion = sums[:-1].cpu().numpy().astype(np.int64).reshape(num_classes, num_classes)
    metrics = Metrics(confusion, float(sums[-1]))
    assert metrics.count == len(split), f"counted {metrics.count} of {len(split)} rows"
    return metrics
