"""Turn what a model takes and gives into the documents that describe it to clients."""

import math
from dataclasses import dataclass
from typing import Any

INPUT_NAME, OUTPUT_NAME = "image", "probabilities"
EXTENSIONS = ("binary_tensor_data",)
"""What `GET /v2` advertises; only what is really offered, since clients act on it."""

PLATFORM = "onnxruntime_onnx"
DATATYPES = frozenset(
    [
        "BOOL",
        "BYTES",
        "FP16",
        "BF16",
        "FP32",
        "FP64",
        "UINT8",
        "UINT16",
        "UINT32",
        "UINT64",
        "INT8",
        "INT16",
        "INT32",
        "INT64",
    ]
)
"""Datatypes of the protocol."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec:
    """The one signature of an image classifier: uint8 NHWC images in, probabilities out."""

    model: str
    """Name in paths."""

    version: str
    """Version that answers, an integer as text."""

    shape: tuple[int, int, int]
    """Height, width and channels of an image."""

    class_names: tuple[str, ...]
    """Labels in index order."""

    @property
    def row_bytes(self) -> int:
        """Bytes of one image."""
        return math.prod(self.shape)


def server_document(version: str) -> dict[str, Any]:
    """The answer of `GET /v2`."""
    return {"name": "rayloop", "version": version, "extensions": list(EXTENSIONS)}


def model_document(spec: ModelSpec) -> dict[str, Any]:
    """The answer of `GET /v2/models/MODEL`."""
    return {
        "name": spec.model,
        "versions": [spec.version],
        "platform": PLATFORM,
        "inputs": [{"name": INPUT_NAME, "datatype": "UINT8", "shape": [-1, *spec.shape]}],
        "outputs": [
            {"name": OUTPUT_NAME, "datatype": "FP32", "shape": [-1, len(spec.class_names)]}
        ],
    }
