"""Losses and gradient norms of the last steps -> the first step whose loss is no number."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rayloop.data.order import SampleOrder
from rayloop.errors import Diverged

READ_EVERY_ON_CUDA = 16
"""Steps between two readings on a GPU, since each reading waits for the device."""
ROWS_IN_MESSAGE = 8


@dataclass(frozen=True, slots=True)
class Loss:
    """Mean training loss of a global step, over the rows of all workers."""

    step: int
    loss: float


class DivergenceWatch:
    """Keeps every step's loss on the device until it is read, and stops the run at a bad one.

    Args:
        order: Names the rows of the step.
        device: Where the losses are; on the CPU they are read at once.
        trust_norms: Whether a gradient norm that is no number is an error too; not with fp16, whose
            scaler skips such steps.
    """

    def __init__(self, order: SampleOrder, device: torch.device, trust_norms: bool) -> None:
        self._order, self._trust_norms = order, trust_norms
        self._read_every = 1 if device.type == "cpu" else READ_EVERY_ON_CUDA
        self._steps: list[int] = []
        self._values: list[Tensor] = []

    def add(self, step: int, loss_sum: Tensor, gradient_norm: Tensor) -> list[Loss]:
        """Note a step; gives the losses that were read on this occasion, often none on a GPU.

        Raises:
            Diverged: One of the losses read is no number; says which step and which rows.
        """
        self._steps.append(step)
        self._values.append(torch.stack([loss_sum, gradient_norm.to(loss_sum.dtype)]))
        return self.read() if len(self._steps) >= self._read_every else []

    def is_sound(self) -> bool:
        """Whether all that is not read yet is finite, so that a checkpoint may be written.

        It changes nothing: all workers go on reading at the same steps, and stop together.
        """
        values = torch.stack(self._values) if self._values else torch.zeros(1, 2)
        return bool((values if self._trust_norms else values[:, 0]).isfinite().all())

    def read(self) -> list[Loss]:
        """Read all that is noted; every worker does so at the same steps, and once at the end.

        Raises:
            Diverged: One of the losses is no number.
        """
        if not self._steps:
            return []
        values, steps = torch.stack(self._values).tolist(), self._steps
        self._steps, self._values = [], []
        losses = []
        for step, (loss_sum, norm) in zip(steps, values, strict=True):
            if not math.isfinite(loss_sum):
                raise self._diverged(step, f"training loss became {loss_sum}")
            if self._trust_norms and not math.isfinite(norm):
                raise self._diverged(step, f"gradient's norm became {norm}")
            losses.append(Loss(step, loss_sum / self._order.global_batch_size))
        return losses

    def _diverged(self, step: int, what: str) -> Diverged:
        rows = self._order.rows(step)[0]
        named = ", ".join(str(row) for row in rows[:ROWS_IN_MESSAGE])
        more = f" and {len(rows) - ROWS_IN_MESSAGE} more" if len(rows) > ROWS_IN_MESSAGE else ""
        error = Diverged(
            f"The {what} at step {step}, on the batch of training rows {named}{more}. The last "
            "good checkpoint is kept. Lower --train.learning_rate, or use --train.precision fp32."
        )
        error.step = step
        return error
