"""What every micro-batch of a step gave -> what the whole global batch gave, in one all-reduce.

Rounding depends on the order in which numbers are added, and training amplifies it: after 100 steps
the losses of one and of two workers were measured 2e-2 apart. So everything a step adds up is added
in float64. A sum of float32 numbers in float64 is exact unless their sizes differ by more than
about 2^26, so its order does not matter, and any number of workers, with any all-reduce, gives the
same float32 gradient.
"""

from collections.abc import Sequence

import torch
import torch.distributed
from torch import Tensor, nn

from rayloop.models.norm import NormStatistics

HEAD = 4
"""Numbers before the norms' statistics: loss, hits, rows, groups."""


class StepSums:
    """Adds up a step's loss, hits, norm statistics and, if asked to, gradients.

    Args:
        statistics: The norms of this worker's network.
        parameters: Those whose gradients are added up here; none where DDP does it.
        world_size: All workers.
        device: Where the network is.
    """

    def __init__(
        self,
        statistics: NormStatistics,
        parameters: Sequence[nn.Parameter],
        world_size: int,
        device: torch.device,
    ) -> None:
        self._statistics, self._world_size = statistics, world_size
        self._parameters = list(parameters)
        counts = [HEAD, len(statistics.sums), *(p.numel() for p in self._parameters)]
        self._values = torch.zeros(sum(counts), dtype=torch.float64, device=device)
        head, self._norms, *gradients = torch.split(self._values, counts)
        self._loss_and_hits, self._rows, self._groups = head[:2], head[2], head[3]
        self.totals = head[:3]
        """Loss, hits and rows, float64, shape (3,); over all workers after `exchange`."""
        self._gradients = [
            part.view(p.shape) for part, p in zip(gradients, self._parameters, strict=True)
        ]

    def clear(self) -> None:
        """Begin a step."""
        self._values.zero_()
        self._statistics.sums.zero_()

    def add(self, loss_sum: Tensor, num_correct: Tensor, num_rows: int) -> None:
        """Add what one micro-batch gave, and take its gradients and statistics away.

        Args:
            loss_sum: Cross-entropy summed over the rows.
            num_correct: Hits among them.
            num_rows: How many they are.
        """
        self._loss_and_hits += torch.stack([loss_sum.double(), num_correct.double()])
        self._rows += num_rows
        self._groups += self._statistics.groups_in(num_rows)
        self._norms += self._statistics.sums
        self._statistics.sums.zero_()
        for total, parameter in zip(self._gradients, self._parameters, strict=True):
            if parameter.grad is not None:
                total.add_(parameter.grad)
                parameter.grad = None

    @torch.no_grad()
    def exchange(self) -> None:
        """Add up over the workers; then set the gradients and move the running statistics.

        Every worker must call it once a step.
        """
        if self._world_size > 1:
            torch.distributed.all_reduce(self._values)
        self._statistics.update_running(self._norms, self._groups)
        for total, parameter in zip(self._gradients, self._parameters, strict=True):
            # Fused optimizers walk the memory: a gradient must lie there as its parameter does.
            parameter.grad = torch.empty_like(parameter).copy_(total)
