"""One global step of one worker: forward and backward over its rows, then clip and update."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from rayloop.config import TrainConfig
from rayloop.errors import WorkError
from rayloop.logs import stage_logger
from rayloop.models.classifier import ImageClassifier
from rayloop.models.norm import NormStatistics
from rayloop.train.sums import StepSums

log = stage_logger("train")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_precision(config: TrainConfig, device: torch.device) -> str:
    """The configured precision; `auto` is bf16 where the device computes it natively, else fp32."""
    if config.precision != "auto":
        return config.precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() else "fp32"


class Stepper:
    """Changes a model by one step at a time: `backward`, `exchange`, `update`.

    With `worker_invariant` each group of `norm_group_rows` rows goes through the network by itself
    and the gradients are added up in float64, so that the number of workers changes no bit. Else
    a worker takes as many rows at once as memory allows, and DDP adds up the gradients while the
    backward pass still runs.

    Args:
        model: The classifier, on its device.
        optimizer: Its optimizer.
        config: The train section.
        precision: `fp32`, `bf16` or `fp16`.
        device: Where the model is.
        world_size: All workers.
    """

    def __init__(
        self,
        model: ImageClassifier,
        optimizer: torch.optim.Optimizer,
        config: TrainConfig,
        precision: str,
        device: torch.device,
        world_size: int = 1,
    ) -> None:
        self.optimizer, self.config = optimizer, config
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self._precision, self._device, self._world_size = precision, device, world_size
        statistics = NormStatistics(model)
        self._unit = config.norm_group_rows or 1
        own_gradients = config.worker_invariant
        self._network = (
            model
            if own_gradients or world_size == 1
            else _distributed(model, device, plain_norm=config.norm_group_rows == 0)
        )
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self.sums = StepSums(
            statistics, self._parameters if own_gradients else [], world_size, device
        )
        self._loss_scale = 1 / config.global_batch_size
        if isinstance(self._network, DistributedDataParallel):
            self._loss_scale *= world_size  # DDP takes the mean over the workers
        self.micro_batch_size = self._unit if own_gradients else config.micro_batch_size

    def backward(self, images: Tensor, labels: Tensor, seeds: Callable[[int], int]) -> None:
        """Add up the gradients of this worker's rows, and what else the step is to know.

        Args:
            images: This worker's rows: uint8, shape (B, H, W, C), on the device.
            labels: int64, shape (B,), on the device.
            seeds: From the place of a micro-batch's first row among this worker's, to the seed of
                random numbers inside the network, such as dropout's.

        Raises:
            WorkError: Memory is too small even for the smallest micro-batch.
        """
        if self.micro_batch_size == 0:
            self.micro_batch_size = len(labels)
            if self._world_size > 1:
                self._agree_on_micro_batch(images, labels, seeds)
        while True:
            try:
                return self._accumulate(images, labels, seeds)
            except RuntimeError as error:
                if not is_out_of_memory(error) or self._world_size > 1:
                    raise
                self._halve_micro_batch(error)

    def exchange(self) -> Tensor:
        """Add up over the workers; gives loss, hits and rows of the global batch, shape (3,)."""
        self.sums.exchange()
        return self.sums.totals

    def update(self, learning_rate: float) -> Tensor:
        """Clip the gradients, change the weights, and give the gradients' norm before clipping."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group.get("rate_share", 1.0)
        self.scaler.unscale_(self.optimizer)
        limit = self.config.clip_norm or float("inf")
        norm = nn.utils.clip_grad_norm_(self._parameters, limit)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return norm

    def _accumulate(
        self, images: Tensor, labels: Tensor, seeds: Callable[[int], int], sync: bool = True
    ) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.sums.clear()
        for part, is_last in self._micro_batches(len(labels)):
            torch.manual_seed(seeds(part.start))
            with self._gradient_sync(is_last and sync):
                logits = self._forward(images[part])
                loss = cross_entropy(
                    logits.float(),
                    labels[part],
                    label_smoothing=self.config.label_smoothing,
                    reduction="sum",
                )
                scaled: Any = self.scaler.scale(loss * self._loss_scale)
                scaled.backward()
            hits = (logits.detach().argmax(dim=1) == labels[part]).sum()
            self.sums.add(loss.detach(), hits, part.stop - part.start)

    def _forward(self, images: Tensor) -> Tensor:
        with torch.autocast(
            self._device.type, DTYPES[self._precision], enabled=self._precision != "fp32"
        ):
            logits: Tensor = self._network(images)
        return logits

    def _micro_batches(self, count: int) -> Iterator[tuple[slice, bool]]:
        size = self.micro_batch_size
        for start in range(0, count, size):
            yield slice(start, min(start + size, count)), start + size >= count

    def _gradient_sync(self, sync: bool) -> contextlib.AbstractContextManager[None]:
        """Workers exchange gradients once a step, in the backward pass of the last micro-batch."""
        if isinstance(self._network, DistributedDataParallel) and not sync:
            return self._network.no_sync()
        return contextlib.nullcontext()

    def _agree_on_micro_batch(
        self, images: Tensor, labels: Tensor, seeds: Callable[[int], int]
    ) -> None:
        """Try the first batch without any exchange, and take what the smallest worker can bear.

        A worker that ran out of memory in the midst of an exchange would leave the others waiting.
        """
        while True:
            try:
                self._accumulate(images, labels, seeds, sync=False)
                break
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                self._halve_micro_batch(error)
        fits = torch.tensor(self.micro_batch_size, device=self._device)
        torch.distributed.all_reduce(fits, torch.distributed.ReduceOp.MIN)
        self.micro_batch_size = int(fits)

    def _halve_micro_batch(self, error: RuntimeError) -> None:
        """Half the rows, in whole groups of the norms so that the statistics stay as they are."""
        unit = self._unit
        half = max(unit, -(-self.micro_batch_size // (2 * unit)) * unit)
        if half >= self.micro_batch_size:
            raise WorkError(
                f"Memory is too small for one micro-batch of {self.micro_batch_size} rows "
                f"({str(error).splitlines()[0]}). Use a smaller network, smaller images, a smaller "
                "--train.norm_group_rows, or --train.no-worker-invariant."
            ) from error
        log.warning(
            "out of memory with micro-batches of %d rows; going on with %d",
            self.micro_batch_size, half,
        )  # fmt: skip
        self.micro_batch_size = half
        self.optimizer.zero_grad(set_to_none=True)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def _distributed(model: ImageClassifier, device: torch.device, plain_norm: bool) -> nn.Module:
    """Wrap in DDP; plain norms have each worker's own statistics, so the first one's are taken."""
    ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(
        model, device_ids=ids, gradient_as_bucket_view=True, forward_sync_buffers=plain_norm
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that the device, or the machine for the CPU, has no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )
