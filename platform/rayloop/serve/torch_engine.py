"""Turn a trained classifier into an engine on torch: fp32, bf16 or fp16, CPU or GPU, compiled."""

import contextlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from rayloop.errors import DoesNotFit
from rayloop.models.classifier import ImageClassifier
from rayloop.serve.engine import Images, Probabilities, warm_up_sizes
from rayloop.train.step import DTYPES

COMPILED_FORMS = 256
"""Batch sizes times loaded versions that torch.compile may keep; its default is 8."""


class TorchEngine:
    """A classifier in evaluation mode on one device.

    Batches are filled up to the next size of `warm_up_sizes`: kernels, and compiled code, see few
    sizes, all of them warm. A row's probabilities may differ in their last bits with the size of
    the batch it came in, unlike ONNX Runtime's on the CPU.

    Args:
        model: The trained model, fp32 on the CPU.
        precision: `auto`, `fp32`, `bf16` or `fp16`; `auto` is fp32 on the CPU and bf16 on a GPU.
        use_gpu: Run on the first GPU the process sees.
        compiled: Let torch.compile fuse it; the first run of each batch size takes seconds.
        num_threads: CPU threads one run may use.
        max_batch_rows: Most rows in a batch.

    Raises:
        DoesNotFit: There is no GPU.
    """

    def __init__(
        self,
        model: ImageClassifier,
        *,
        precision: str = "auto",
        use_gpu: bool = False,
        compiled: bool = False,
        num_threads: int = 1,
        max_batch_rows: int = 32,
    ) -> None:
        if use_gpu and not torch.cuda.is_available():
            raise DoesNotFit(
                "serve.use_gpu is set, but the replica sees no GPU; serve on a node that has one, "
                "or leave it out."
            )
        torch.set_num_threads(num_threads)
        self._device = torch.device("cuda" if use_gpu else "cpu")
        self._shape, self._sizes = model.shape, warm_up_sizes(max_batch_rows)
        self._dtype = DTYPES[_precision(precision, use_gpu)]
        self._model = model.eval().to(memory_format=torch.channels_last)
        self._model.to(self._device)
        self._run: Any = self._model
        if compiled:  # each batch size is compiled by itself, for each version that is loaded
            torch._dynamo.config.recompile_limit = COMPILED_FORMS
            self._run = torch.compile(self._model, dynamic=False)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels of an image."""
        return self._shape

    @torch.inference_mode()
    def predict(self, images: Images) -> Probabilities:
        """Probabilities [N, K] of uint8 images [N, H, W, C]."""
        rows = len(images)
        size = next((size for size in self._sizes if size >= rows), rows)
        filled = images if size == rows else np.resize(images, (size, *self._shape))
        pixels = torch.from_numpy(np.ascontiguousarray(filled)).to(self._device)
        with self._autocast():
            logits = self._run(pixels)
        result: Probabilities = torch.softmax(logits.float(), dim=-1)[:rows].cpu().numpy()
        return result

    def warm(self, batch_sizes: Sequence[int]) -> None:
        """Run once with each batch size on grey images."""
        for rows in batch_sizes:
            self.predict(np.full((rows, *self._shape), 128, np.uint8))

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self._dtype is torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self._device.type, self._dtype)


def _precision(wanted: str, use_gpu: bool) -> str:
    if wanted != "auto":
        return wanted
    return "bf16" if use_gpu and torch.cuda.is_bf16_supported() else "fp16" if use_gpu else "fp32"
