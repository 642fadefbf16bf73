"""A classifier -> one ONNX file that takes uint8 images and gives probabilities.

Normalisation is inside `ImageClassifier` and softmax is added here, so training, batch
prediction and the server share one preprocessing. Batch norms are folded into convolutions.
"""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import torch
from onnxruntime.quantization import quant_pre_process
from torch import Tensor, nn

from rayloop.errors import WorkError
from rayloop.models.classifier import ImageClassifier
from rayloop.quantize import graph
from rayloop.quantize.session import Images, open_session, predict

INPUT_NAME = "image"
OUTPUT_NAME = "probabilities"
OPSET = 20
CHECK_ROWS = 16
CHECK_TOLERANCE = 1e-3
"""Largest difference in probability between torch and the exported graph, both in fp32."""


class WithSoftmax(nn.Module):
    """A classifier whose answer is probabilities instead of logits."""

    def __init__(self, classifier: ImageClassifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, image: Tensor) -> Tensor:
        """Probabilities (N, K) of uint8 images (N, H, W, C)."""
        return torch.softmax(self.classifier(image), dim=-1)


def export_onnx(classifier: ImageClassifier, target: Path) -> None:
    """Write a classifier as an fp32 ONNX file and check that it answers as torch does.

    The file has one input `image`, uint8 (batch, H, W, C), one output `probabilities`, fp32
    (batch, K), any batch from 1, and no side files.

    Args:
        classifier: The model on the CPU; it is put into evaluation mode.
        target: The file to write.

    Raises:
        WorkError: The graph's answers differ from torch's.
    """
    module = WithSoftmax(classifier).eval()
    exported = target.with_suffix(".exported.onnx")
    example = torch.zeros((2, *classifier.shape), dtype=torch.uint8)
    with quiet():
        program = torch.onnx.export(
            module,
            (example,),
            dynamo=True,
            external_data=False,
            verbose=False,
            input_names=[INPUT_NAME],
            output_names=[OUTPUT_NAME],
            dynamic_shapes={"image": {0: torch.export.Dim("batch", min=1)}},
            opset_version=OPSET,
        )
        if program is None:
            raise WorkError("torch.onnx.export gave no program; is onnxscript installed?")
        program.save(str(exported))
    model = onnx.load(exported)
    graph.strip(model)
    graph.swap_pooling(model)
    onnx.save(model, exported)
    with quiet():
        quant_pre_process(str(exported), str(target), skip_symbolic_shape=True)
    exported.unlink()
    model = onnx.load(target)
    graph.strip(model)
    onnx.save(model, target)
    check_export(module, target, classifier.shape)


def check_export(module: WithSoftmax, path: Path, shape: tuple[int, int, int]) -> float:
    """Compare an exported file with the module it came from, on noise images.

    Returns:
        The largest difference in probability.

    Raises:
        WorkError: It is above `CHECK_TOLERANCE`.
    """
    images: Images = np.random.default_rng(0).integers(0, 256, (CHECK_ROWS, *shape), dtype=np.uint8)
    with torch.inference_mode():
        wanted = module(torch.from_numpy(images)).numpy()
    difference = float(np.abs(predict(open_session(path), images) - wanted).max())
    if not difference <= CHECK_TOLERANCE:
        raise WorkError(
            f"The exported ONNX graph answers up to {difference:.2g} in probability away from "
            f"torch (at most {CHECK_TOLERANCE:g} is rounding); an operator of this model was "
            "exported wrongly. Try another model.name."
        )
    return difference


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the prints, warnings and log lines of export libraries off stdout and stderr."""
    root = logging.getLogger()
    level = root.level
    names = ("torch.onnx", "onnxscript", "onnx_ir")
    before = {name: logging.getLogger(name).level for name in names}
    try:
        root.setLevel(logging.ERROR)
        for name in names:
            logging.getLogger(name).setLevel(logging.ERROR)
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        root.setLevel(level)
        for name, value in before.items():
            logging.getLogger(name).setLevel(value)
