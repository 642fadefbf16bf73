"""A worker's ledger, counted operations, and what share of the hardware they use."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from rayloop.config import ModelConfig
from rayloop.models.classifier import ImageClassifier
from rayloop.models.zoo import build_classifier
from rayloop.train.account import (
    STEPS_TO_COMPARE,
    Ledger,
    datasheet_peak_flops,
    flops_per_image,
    measured_peak_flops,
    mfu,
)


class HandClock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def now(self) -> float:
        """Seconds since the epoch."""
        return self.seconds

    def monotonic(self) -> float:
        """Seconds since the clock was made."""
        return self.seconds


def ledger_of(*spent: tuple[str, float], first_step_is_compile: bool) -> Ledger:
    """A ledger in which each cause took its seconds, in turn."""
    clock = HandClock()
    ledger = Ledger(clock, first_step_is_compile=first_step_is_compile)
    for cause, seconds in spent:
        with ledger.spending(cause):
            clock.seconds += seconds
    return ledger


STEPS = [("data_wait", 1.0), ("step", 20.0), ("step", 1.0), ("step", 3.0), ("step", 2.0)]


def test_the_first_step_beyond_an_ordinary_one_is_compiling() -> None:
    ledger = ledger_of(*STEPS, first_step_is_compile=True)
    assert ledger.causes() == {"data_wait": 1.0, "compile": 18.0, "step": 8.0}
    assert ledger.seconds["step"] == 26.0
    assert ledger.data_wait_share == 1 / 9
    assert ledger.step_percentiles_ms()["p50"] == 2000


def test_without_compiling_the_first_step_is_a_step() -> None:
    ledger = ledger_of(*STEPS, first_step_is_compile=False)
    assert ledger.causes() == {"data_wait": 1.0, "step": 26.0}
    assert ledger.data_wait_share == 1 / 27
    assert ledger.step_percentiles_ms()["p50"] == 2500


@pytest.mark.parametrize("steps", [[], [("step", 9.0)], [("step", 1.0), ("step", 2.0)]])
def test_where_nothing_can_be_compared_or_the_first_was_quick_nothing_is_compiling(
    steps: Any,
) -> None:
    ledger = ledger_of(*steps, first_step_is_compile=True)
    assert "compile" not in ledger.causes()
    assert sum(ledger.causes().values()) == sum(seconds for _, seconds in steps)


def test_compiling_stays_what_it_was_when_steps_become_slower_later() -> None:
    steps = [("step", 10.0), *[("step", 1.0)] * STEPS_TO_COMPARE, *[("step", 5.0)] * 500]
    assert ledger_of(*steps, first_step_is_compile=True).causes()["compile"] == 9.0


# --- counted operations

SHAPE = (8, 8, 1)


def fastnet() -> ImageClassifier:
    """A small convolutional classifier."""
    return build_classifier(
        ModelConfig(name="fastnet", widths=(8,)), SHAPE, 3, (0.5,), (0.25,), seed=0
    )


def test_a_network_compiled_in_place_is_counted_like_a_plain_one_and_not_run() -> None:
    runs = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            runs.append(1)
            return graph.forward(*arguments)

        return run

    model, images = fastnet(), torch.zeros((2, *SHAPE), dtype=torch.uint8)
    model.network.compile(backend=backend)
    model.eval()(images)
    assert runs == [1]
    assert flops_per_image(model, SHAPE) == flops_per_image(fastnet(), SHAPE) > 0
    assert runs == [1]


def test_counting_leaves_the_model_as_it_was() -> None:
    model = fastnet()
    model(torch.zeros((2, *SHAPE), dtype=torch.uint8)).sum().backward()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = [parameter.grad.clone() for parameter in model.parameters()]  # type: ignore[union-attr]
    hooked: list[int] = []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda _: hooked.append(1))
    flops_per_image(model, SHAPE)
    assert model.training
    assert hooked == []
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, gradient)


# --- peaks


@pytest.mark.parametrize(
    ("device_name", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("AMD Instinct MI300X", 1300),
    ],
)
def test_known_devices_have_the_makers_peak(device_name: str, tflops: float) -> None:
    for precision in ("bf16", "fp16"):
        assert datasheet_peak_flops(device_name, precision) == tflops * 1e12
    assert datasheet_peak_flops(device_name, "fp32") is None


@pytest.mark.parametrize(
    "device_name",
    [
        "", "cpu", "AMD EPYC 7B13", "NVIDIA H20", "NVIDIA H100", "NVIDIA A10", "NVIDIA A1000",
        "Tesla T4", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA RTX A100X", "NVIDIA B2000",
    ],
)  # fmt: skip
def test_cpus_unknown_devices_and_slices_have_none(device_name: str) -> None:
    assert datasheet_peak_flops(device_name, "bf16") is None


def test_mfu_is_a_share_of_the_peak_or_nothing() -> None:
    assert mfu(2e9, 1000, 1e13) == pytest.approx(0.2)
    for undefined in [(2e9, 1000, None), (2e9, 1000, 0.0), (0.0, 1000, 1e13), (2e9, 0.0, 1e13),
                      (2e9, math.nan, 1e13), (2e9, 1000, math.inf)]:  # fmt: skip
        assert mfu(*undefined) is None


def test_the_measured_peak_is_a_number_of_operations() -> None:
    assert 1e6 < measured_peak_flops(torch.device("cpu"), "fp32", seconds=0.0) < 1e16
