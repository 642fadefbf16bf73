"""Turn what a model takes and gives into the documents that describe it to clients."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rayloop.config import ServeConfig
from rayloop.serve.batcher import DEFAULT_PRIORITY, PRIORITY_LEVELS

INPUT_NAME, OUTPUT_NAME = "image", "probabilities"
EXTENSIONS = (
    "binary_tensor_data",
    "classification",
    "model_configuration",
    "model_repository",
    "model_repository(unload_dependents)",
    "parameters",
    "schedule_policy",
    "statistics",
)
"""What `GET /v2` advertises; only what is really offered, since clients act on it."""

PLATFORMS = {
    "onnx": ("onnxruntime_onnx", "onnxruntime", "model.onnx"),
    "torch": ("pytorch", "pytorch", ""),
}
"""Platform, backend and file name of a model, by the engine that runs it."""

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

    engine: Literal["onnx", "torch"] = "onnx"
    """What runs it."""

    @property
    def row_bytes(self) -> int:
        """Bytes of one image."""
        return math.prod(self.shape)


def server_document(version: str) -> dict[str, Any]:
    """The answer of `GET /v2`."""
    return {"name": "rayloop", "version": version, "extensions": list(EXTENSIONS)}


def model_document(spec: ModelSpec, versions: Sequence[str]) -> dict[str, Any]:
    """The answer of `GET /v2/models/MODEL`.

    Args:
        spec: The version that is asked for, or answers by default.
        versions: All that are loaded.
    """
    return {
        "name": spec.model,
        "versions": list(versions),
        "platform": PLATFORMS[spec.engine][0],
        "inputs": [{"name": INPUT_NAME, "datatype": "UINT8", "shape": [-1, *spec.shape]}],
        "outputs": [
            {"name": OUTPUT_NAME, "datatype": "FP32", "shape": [-1, len(spec.class_names)]}
        ],
    }


def config_document(
    spec: ModelSpec, versions: Sequence[str], config: ServeConfig
) -> dict[str, Any]:
    """The answer of `GET /v2/models/MODEL/config`: how it is really served.

    `max_batch_size` is what one request may hold; the engine takes `preferred_batch_size` at once.

    Args:
        spec: The version.
        versions: All that are loaded.
        config: Batch sizes, times and limits.
    """
    platform, backend, file_name = PLATFORMS[spec.engine]
    return {
        "name": spec.model,
        "platform": platform,
        "backend": backend,
        "version_policy": {"specific": {"versions": [int(version) for version in versions]}},
        "max_batch_size": config.max_rows_per_request,
        "input": [
            {
                "name": INPUT_NAME,
                "data_type": "TYPE_UINT8",
                "format": "FORMAT_NHWC",
                "dims": list(spec.shape),
            }
        ],
        "output": [
            {
                "name": OUTPUT_NAME,
                "data_type": "TYPE_FP32",
                "dims": [len(spec.class_names)],
                "label_filename": "",
            }
        ],
        "instance_group": [
            {
                "name": spec.model,
                "kind": "KIND_GPU" if config.use_gpu else "KIND_CPU",
                "count": config.max_replicas,
                "gpus": [],
            }
        ],
        "default_model_filename": file_name,
        "dynamic_batching": {
            "preferred_batch_size": [config.max_batch_rows],
            "max_queue_delay_microseconds": int(config.max_batch_wait_ms * 1000),
            "preserve_ordering": False,
            "priority_levels": PRIORITY_LEVELS,
            "default_priority_level": DEFAULT_PRIORITY,
            "default_queue_policy": {
                "timeout_action": "REJECT",
                "default_timeout_microseconds": int(config.default_timeout_ms * 1000),
                "allow_timeout_override": True,
                "max_queue_size": config.max_queued_rows,
            },
        },
        "parameters": {"labels": {"string_value": json.dumps(spec.class_names)}},
        "model_transaction_policy": {"decoupled": False},
    }
