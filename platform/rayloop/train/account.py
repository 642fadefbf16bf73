"""Times of a run's parts -> throughput, data wait, hardware use and goodput."""

import math
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from rayloop.clock import Clock
from rayloop.train.step import DTYPES


@dataclass
class Ledger:
    """Where a worker's time went, by cause, and how long each step took.

    Causes: `start` (until the first step), `data_wait`, `step` (the only productive one),
    `evaluate`, `checkpoint`.
    """

    clock: Clock
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    step_seconds: list[float] = field(default_factory=list)

    @contextmanager
    def spending(self, cause: str) -> Iterator[None]:
        """Book the time of a block under a cause."""
        before = self.clock.monotonic()
        yield
        spent = self.clock.monotonic() - before
        self.seconds[cause] += spent
        if cause == "step":
            self.step_seconds.append(spent)

    @property
    def data_wait_share(self) -> float:
        """Share (0..1) of the training time that was spent waiting for a batch."""
        wait = self.seconds["data_wait"]
        return wait / max(1e-9, wait + self.seconds["step"])

    def step_percentiles_ms(self) -> dict[str, float]:
        """Median, 90th and 99th percentile of the step time."""
        if len(self.step_seconds) < 2:
            return {}
        cuts = statistics.quantiles(self.step_seconds, n=100, method="inclusive")
        return {f"p{p}": round(cuts[p - 1] * 1e3, 3) for p in (50, 90, 99)}


def flops_per_image(model: nn.Module, shape: tuple[int, int, int]) -> float:
    """Counted floating-point operations of forward and backward for one image."""
    was_training = model.training
    model.eval()
    images = torch.zeros((2, *shape), dtype=torch.uint8, device=next(model.parameters()).device)
    counter = FlopCounterMode(display=False)
    with counter:
        model(images).sum().backward()
    model.zero_grad(set_to_none=True)
    model.train(was_training)
    return counter.get_total_flops() / 2


def measured_peak_flops(device: torch.device, precision: str, seconds: float = 0.2) -> float:
    """Operations a second of large matrix products in this precision with the threads set now.

    It is the achievable peak, the honest yardstick on machines without a datasheet. Reads the
    process's own timer, since it measures the machine and decides nothing.
    """
    size = 4096 if device.type == "cuda" else 1024
    left = torch.randn(size, size, device=device, dtype=DTYPES[precision])
    best, until = math.inf, time.perf_counter() + seconds
    while time.perf_counter() < until or best is math.inf:
        start = time.perf_counter()
        left @ left
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
