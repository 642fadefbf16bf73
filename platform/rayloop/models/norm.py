"""Batch norm whose groups are fixed rows: the same training on any number of workers.

Plain batch norm takes its statistics over whatever a worker puts through the network at once, so
the loss changes with the number of workers and with the micro-batch. Ghost batch norm (Hoffer et
al. 2017, "Train longer, generalize better") takes them over groups of a fixed number of consecutive
rows. Here the running statistics, too, are those of the whole global batch: each forward pass adds
up its groups' statistics, and once a step the sums of all workers decide one update.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm


class GhostBatchNorm2d(nn.BatchNorm2d):
    """Batch norm over groups of `group_rows` consecutive rows; in evaluation a plain batch norm.

    Args:
        num_features: Channels.
        group_rows: Rows that share statistics; a shorter group at the end of a batch is its own.
        eps: Added to the variance.
        momentum: Share (0..1) of a step's statistics in the running ones.
        affine: Whether scale and shift are trained.
    """

    sums: Tensor

    def __init__(
        self,
        num_features: int,
        group_rows: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
    ) -> None:
        super().__init__(num_features, eps=eps, momentum=momentum, affine=affine)
        self.group_rows = group_rows
        self.register_buffer("sums", torch.zeros(2, num_features), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (N, C, H, W); in training the groups' means and variances are added up."""
        if not self.training:
            return super().forward(x)
        parts = torch.split(x, self.group_rows)
        means = self.sums.new_zeros(len(parts), self.num_features)
        variances = torch.zeros_like(means)
        normal = [
            batch_norm(part, means[i], variances[i], self.weight, self.bias, True, 1.0, self.eps)
            for i, part in enumerate(parts)
        ]
        self.sums += torch.stack([means.sum(0), variances.sum(0)])
        return normal[0] if len(normal) == 1 else torch.cat(normal)

    def extra_repr(self) -> str:
        """Shown when the network is printed."""
        return f"{self.num_features}, group_rows={self.group_rows}, momentum={self.momentum}"


def with_ghost_norms(network: nn.Module, group_rows: int) -> nn.Module:
    """Replace every 2-d batch norm by a ghost batch norm with the same weights and names.

    Args:
        network: Changed in place where it contains batch norms.
        group_rows: Rows that share statistics; 0 leaves the network as it is.
    """
    if group_rows == 0:
        return network
    ghosts: dict[nn.Module, GhostBatchNorm2d] = {}
    for path, norm in list(network.named_modules(remove_duplicate=False)):
        if type(norm) is nn.BatchNorm2d:
            ghost = ghosts.setdefault(norm, _ghost_of(norm, group_rows))
            if norm is network:
                return ghost
            network.set_submodule(path, ghost)
    return network


def _ghost_of(norm: nn.BatchNorm2d, group_rows: int) -> GhostBatchNorm2d:
    ghost = GhostBatchNorm2d(norm.num_features, group_rows, norm.eps, norm.momentum, norm.affine)
    ghost.weight, ghost.bias = norm.weight, norm.bias
    ghost.load_state_dict(norm.state_dict())
    return ghost.train(norm.training)


def has_batch_norm(network: nn.Module) -> bool:
    """Whether a network takes statistics over rows in training."""
    return any(isinstance(module, nn.BatchNorm2d) for module in network.modules())


class NormStatistics:
    """What all ghost norms of a network have seen since the last update, as one tensor.

    Make it after the network is on its device. `sums` is a window on the norms' own buffers, so
    that the workers can add theirs up in one exchange.

    Args:
        network: Any module.
    """

    def __init__(self, network: nn.Module) -> None:
        self._norms = [m for m in network.modules() if isinstance(m, GhostBatchNorm2d)]
        sizes = [norm.sums.numel() for norm in self._norms]
        device = self._norms[0].sums.device if self._norms else None
        self.sums = torch.zeros(sum(sizes), device=device)
        """Means and variances summed over groups, float32, shape (S,); S may be 0."""
        for norm, window in zip(self._norms, torch.split(self.sums, sizes), strict=True):
            norm.sums = window.view(2, norm.num_features)
        self.group_rows = self._norms[0].group_rows if self._norms else 0

    def groups_in(self, num_rows: int) -> int:
        """Groups that rows make that go through the network together."""
        return -(-num_rows // self.group_rows) if self._norms else 0

    @torch.no_grad()
    def update_running(self, sums: Tensor, num_groups: Tensor) -> None:
        """Move the running statistics towards the means over all workers' groups.

        Args:
            sums: `sums` added up over micro-batches and workers, shape (S,).
            num_groups: Groups added up over the workers, a scalar.
        """
        if not self._norms:
            return
        means = (sums / num_groups).to(self.sums.dtype)
        windows = torch.split(means, [norm.sums.numel() for norm in self._norms])
        for norm, window in zip(self._norms, windows, strict=True):
            mean, variance = window.view(2, norm.num_features)
            momentum = 0.1 if norm.momentum is None else norm.momentum
            assert norm.running_mean is not None and norm.running_var is not None
            norm.running_mean.lerp_(mean, momentum)
            norm.running_var.lerp_(variance, momentum)
            if norm.num_batches_tracked is not None:
                norm.num_batches_tracked += 1
