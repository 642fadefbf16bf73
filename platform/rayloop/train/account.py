"""Times of a run's parts -> throughput, data wait, hardware use and goodput."""

import copy
import math
import re
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

STEPS_TO_COMPARE = 100
"""Steps after the first whose median tells what the first one would take without compiling."""

DATASHEET_TFLOPS = (
    (r"A100", 312),
    (r"H100.*(SXM|HBM3)", 989),
    (r"GH200", 989),
    (r"H100.*PCIe", 756),
    (r"H100.*NVL", 835),
    (r"H200.*NVL", 835),
    (r"H200", 989),
    (r"B200", 2250),
    (r"GB200", 2500),
    (r"MI300X", 1300),
)
"""Dense bf16 and fp16 matrix operations in TFLOP/s, by a pattern in the device's name."""


@dataclass
class Ledger:
    """Where a worker's time went, by cause, and how long each step and each checkpoint took.

    `seconds` is what was booked: `data_wait`, `step` (the only productive one), `evaluate`,
    `checkpoint`. `causes()` is what it means: there the first step's time beyond an ordinary one
    is `compile`, if `first_step_is_compile` says that the first step compiles the network, loads
    the device's kernels or tries out algorithms.
    """

    clock: Clock
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    step_seconds: list[float] = field(default_factory=list)
    checkpoint_seconds: list[float] = field(default_factory=list)
    first_step_is_compile: bool = False

    @contextmanager
    def spending(self, cause: str) -> Iterator[None]:
        """Book the time of a block under a cause."""
        before = self.clock.monotonic()
        yield
        spent = self.clock.monotonic() - before
        self.seconds[cause] += spent
        if cause == "step":
            self.step_seconds.append(spent)
        elif cause == "checkpoint":
            self.checkpoint_seconds.append(spent)

    def causes(self) -> dict[str, float]:
        """Seconds by cause, `compile` taken out of `step`; cheap enough to call at each step."""
        causes = dict(self.seconds)
        compile_s = self._compile_s()
        if compile_s > 0:
            causes["compile"] = compile_s
            causes["step"] -= compile_s
        return causes

    def _compile_s(self) -> float:
        """The first step's time beyond the median of those after it; 0 before there is one."""
        if not self.first_step_is_compile or len(self.step_seconds) < 2:
            return 0.0
        ordinary = statistics.median(self.step_seconds[1 : 1 + STEPS_TO_COMPARE])
        return max(0.0, self.step_seconds[0] - ordinary)

    @property
    def data_wait_share(self) -> float:
        """Share (0..1) of the training time, without compiling, that was spent waiting for data."""
        wait = self.seconds["data_wait"]
        return wait / max(1e-9, wait + self.seconds["step"] - self._compile_s())

    @property
    def checkpoint_ms(self) -> float:
        """Mean time that a checkpoint took from the training; 0 where there was none."""
        saved = self.checkpoint_seconds
        return round(1e3 * statistics.fmean(saved), 3) if saved else 0.0

    def step_percentiles_ms(self) -> dict[str, float]:
        """Median, 90th and 99th percentile of the step time, without a first step that compiles."""
        steps = self.step_seconds[1:] if self.first_step_is_compile else self.step_seconds
        if len(steps) < 2:
            return {}
        cuts = statistics.quantiles(steps, n=100, method="inclusive")
        return {f"p{p}": round(cuts[p - 1] * 1e3, 3) for p in (50, 90, 99)}


def flops_per_image(model: nn.Module, shape: tuple[int, int, int]) -> float:
    """Counted floating-point operations of forward and backward for one image.

    Counts on a copy: it is not compiled even if the model is, so that every operation is seen, and
    the model's gradients and DDP's hooks on its weights are left alone.

    Args:
        model: The classifier, not wrapped in DDP; its network may have been compiled in place.
        shape: Height, width, channels of an image.
    """
    plain = copy.deepcopy(model).eval()  # a module's compiled call is not part of its copy
    images = torch.zeros((2, *shape), dtype=torch.uint8, device=next(plain.parameters()).device)
    counter = FlopCounterMode(display=False)
    with counter:
        plain(images).sum().backward()
    return counter.get_total_flops() / 2


def datasheet_peak_flops(device_name: str, precision: str) -> float | None:
    """Dense matrix operations a second that the maker states for a device.

    None where no figure would be right: CPUs and unknown devices; a slice of a card (MIG), whose
    name is the whole card's; and `fp32`, for which convolutions may use TF32 units and matrix
    products not.

    Args:
        device_name: As `torch.cuda.get_device_name` gives it.
        precision: `bf16`, `fp16` or `fp32`.
    """
    if precision not in ("bf16", "fp16") or re.search(r"\bMIG\b", device_name):
        return None
    for pattern, tflops in DATASHEET_TFLOPS:
        if re.search(rf"\b{pattern}\b", device_name, re.IGNORECASE):
            return tflops * 1e12
    return None


def mfu(flops_per_image: float, images_per_second: float, peak: float | None) -> float | None:
    """Model FLOPs utilisation: the share of a peak that training makes use of.

    Args:
        flops_per_image: Counted operations of forward and backward.
        images_per_second: Rate over all devices.
        peak: Operations a second of all devices together, measured or from the datasheet; None
            where there is none.

    Returns:
        The share, or None where it is undefined: no peak, nothing counted, nothing trained.
    """
    used = flops_per_image * images_per_second
    if peak is None or not 0 < peak < math.inf or not 0 < used < math.inf:
        return None
    return used / peak


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
