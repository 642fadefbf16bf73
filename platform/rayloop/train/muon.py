"""Gradients of convolution filters -> updates of equal strength in every direction.

Muon (Jordan 2024, "Muon: An optimizer for hidden layers in neural networks") replaces a matrix's
momentum by the nearest matrix whose singular values are all about 1, found by a few steps of
Newton-Schulz iteration. As in airbench94_muon (Jordan 2025), a filter counts as a matrix of (output
channels, input channels x height x width) and is kept at a fixed norm, so that the learning rate
means the same in all layers. torch.optim.Muon takes two-dimensional parameters only.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

MOMENTUM = 0.6
NEWTON_SCHULZ_STEPS = 3
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic iteration, chosen by Jordan for steepness at zero."""
REST_RATE_SHARE = 1 / 30
"""Learning rate of everything that is no filter, as a share of the filters' rate."""
REST_BETAS = (0.9, 0.98)


class Muon(torch.optim.Optimizer):
    """Muon for filters, AdamW for all other parameters.

    Args:
        filters: Convolution filters, each of shape (out, in, height, width).
        rest: Parameter groups for AdamW, with their weight decay.
        lr: Learning rate of the filters, the share of its norm by which a filter moves.
    """

    def __init__(self, filters: list[nn.Parameter], rest: list[dict[str, Any]], lr: float) -> None:
        super().__init__([{"params": filters, "rate_share": 1.0}], {"lr": lr})
        for group in rest:
            group["rate_share"] = REST_RATE_SHARE
        self._rest = torch.optim.AdamW(rest, lr * REST_RATE_SHARE, REST_BETAS, fused=True)
        self.param_groups = [self.param_groups[0], *self._rest.param_groups]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient; takes no closure."""
        assert closure is None
        rate = self.param_groups[0]["lr"]
        for weight in self.param_groups[0]["params"]:
            if weight.grad is not None:
                self._move(weight, weight.grad, rate)
        self._rest.step()

    def state_dict(self) -> dict[str, Any]:
        """The filters' momenta in their order, and AdamW's own state."""
        momenta = [self.state[weight].get("momentum") for weight in self.param_groups[0]["params"]]
        return {"momenta": momenta, "rest": self._rest.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        filters = self.param_groups[0]
        for weight, momentum in zip(filters["params"], state_dict["momenta"], strict=True):
            if momentum is not None:
                self.state[weight]["momentum"] = torch.empty_like(weight).copy_(momentum)
        self._rest.load_state_dict(state_dict["rest"])
        self.param_groups = [filters, *self._rest.param_groups]

    def _move(self, weight: Tensor, gradient: Tensor, rate: float) -> None:
        state = self.state[weight]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(weight)
        state["momentum"].mul_(MOMENTUM).add_(gradient)
        update = gradient.add(state["momentum"], alpha=MOMENTUM)  # Nesterov's look ahead
        norm = math.sqrt(weight.shape[0])
        weight.mul_(norm / (weight.norm() + 1e-7))
        direction = orthogonal(update.reshape(weight.shape[0], -1)).view(weight.shape)
        weight.add_(direction * (norm / (direction.norm() + 1e-7)), alpha=-rate)


def orthogonal(matrix: Tensor) -> Tensor:
    """Nearly the matrix with the same singular vectors and all singular values 1.

    Args:
        matrix: Shape (rows, columns).
    """
    a, b, c = COEFFICIENTS
    is_tall = matrix.shape[0] > matrix.shape[1]
    x: Tensor = matrix / (matrix.norm() + 1e-7)
    x = x.transpose(0, 1) if is_tall else x
    for _ in range(NEWTON_SCHULZ_STEPS):
        square = torch.mm(x, x.transpose(0, 1))
        x = a * x + torch.mm(b * square + c * torch.mm(square, square), x)
    return x.transpose(0, 1) if is_tall else x
