"""One global step of one worker: augment, forward, backward, clip, update."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from rayloop.config import TrainConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_precision(config: TrainConfig, device: torch.device) -> str:
    """The configured precision; `auto` is bf16 where the device computes it natively, else fp32."""
    if config.precision != "auto":
        return config.precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() else "fp32"


@dataclass(frozen=True, slots=True)
class StepResult:
    """Sums over a worker's rows of one step, left on the device so that nothing waits for them."""

    loss_sum: Tensor
    num_correct: Tensor


class Stepper:
    """Changes a model by one step at a time.

    Args:
        model: The classifier, wrapped in DDP when there are several workers.
        optimizer: Its optimizer.
        config: The train section.
        precision: `fp32`, `bf16` or `fp16`.
        device: Where the model is.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: TrainConfig,
        precision: str,
        device: torch.device,
    ) -> None:
        self.model, self.optimizer, self.config = model, optimizer, config
        self._precision, self._device = precision, device
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")

    def __call__(self, images: Tensor, labels: Tensor, learning_rate: float) -> StepResult:
        """Update the model on this worker's rows of one step.

        Args:
            images: uint8, shape (B, H, W, C), on the device.
            labels: int64, shape (B,), on the device.
            learning_rate: The rate of this step.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.zero_grad(set_to_none=True)
        loss_sum, num_correct = (
            torch.zeros((), device=self._device),
            torch.zeros((), dtype=torch.long, device=self._device),
        )
        for part, is_last in self._micro_batches(len(labels)):
            with self._gradient_sync(is_last):
                logits = self._forward(images[part])
                loss = cross_entropy(
                    logits.float(),
                    labels[part],
                    label_smoothing=self.config.label_smoothing,
                    reduction="sum",
                )
                scaled: Any = self.scaler.scale(loss / len(labels))
                scaled.backward()
            loss_sum += loss.detach()
            num_correct += (logits.detach().argmax(dim=1) == labels[part]).sum()
        self.scaler.unscale_(self.optimizer)
        if self.config.clip_norm > 0:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return StepResult(loss_sum, num_correct)

    def _forward(self, images: Tensor) -> Tensor:
        with torch.autocast(
            self._device.type, DTYPES[self._precision], enabled=self._precision != "fp32"
        ):
            logits: Tensor = self.model(images)
        return logits

    def _micro_batches(self, count: int) -> Iterator[tuple[slice, bool]]:
        size = self.config.micro_batch_size or count
        for start in range(0, count, size):
            yield slice(start, min(start + size, count)), start + size >= count

    def _gradient_sync(self, is_last: bool) -> contextlib.AbstractContextManager[None]:
        """Workers exchange gradients once a step, in the backward pass of the last micro-batch."""
        if isinstance(self.model, DistributedDataParallel) and not is_last:
            return self.model.no_sync()
        return contextlib.nullcontext()
