"""A small model, and releases of it as the registry leaves them, for tests of every kind."""

import hashlib
import io
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper

from rayloop.clock import SYSTEM_CLOCK
from rayloop.config import RegistryConfig
from rayloop.registry.release import ReleaseRecord
from rayloop.registry.store import open_registry
from rayloop.serve.engine import OnnxEngine
from rayloop.storage import Storage

SHAPE, LABELS = (12, 10, 1), ("ant", "bee", "cat", "dog")
MODEL = "classifier"


def model_bytes(
    seed: int = 0, shape: tuple[int, int, int] = SHAPE, classes: int = len(LABELS)
) -> bytes:
    """A linear classifier of images, as ONNX."""
    rng = np.random.default_rng(seed)
    size = int(np.prod(shape))
    nodes = [
        helper.make_node("Cast", ["image"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Reshape", ["f", "flat"], ["r"]),
        helper.make_node("Gemm", ["r", "w"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
    ]
    weights = rng.normal(0, 0.003, (size, classes)).astype(np.float32)
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["N", *shape])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["N", classes])],
        [
            helper.make_tensor("flat", TensorProto.INT64, [2], [-1, size]),
            helper.make_tensor("w", TensorProto.FLOAT, [size, classes], weights.ravel()),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return model.SerializeToString()


def images(count: int, seed: int = 0, shape: tuple[int, int, int] = SHAPE) -> np.ndarray:
    """Random images the model takes."""
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def publish(
    storage: Storage,
    version: str,
    shape: tuple[int, int, int] = SHAPE,
    labels: tuple[str, ...] = LABELS,
) -> None:
    """A release as the registry leaves it."""
    model = model_bytes(int(version), shape, len(labels))
    rows = images(4, 99, shape)
    buffer = io.BytesIO()
    np.savez(buffer, images=rows, probabilities=OnnxEngine(model).predict(rows))
    golden = buffer.getvalue()
    record = ReleaseRecord(
        model=MODEL,
        version=version,
        created_at="2026-11-21T00:00:00Z",
        artifact="model.onnx",
        artifact_digest=hashlib.sha256(model).hexdigest(),
        method="fp32",
        class_names=labels,
        shape=shape,
        run_id="run",
        checkpoint_digest="",
        dataset={},
        config_digest="",
        config={},
        metrics={},
        gates=(),
        profile={},
        golden={"file": "golden.npz", "rows": 4, "digest": hashlib.sha256(golden).hexdigest()},
        cpu_features=(),
        reduce_range=False,
        packages={},
    )
    folder = f"models/{MODEL}/{version}"
    storage.write(f"{folder}/model.onnx", model)
    storage.write(f"{folder}/golden.npz", golden)
    storage.write_json(f"{folder}/release.json", record.to_json())


def register_all(root: Path, versions: int, *, odd: str = "") -> Storage:
    """A root with a registry of so many versions: the first is champion, the second challenger.

    Args:
        root: An empty folder.
        versions: How many.
        odd: One that takes images of another shape.
    """
    storage = Storage(str(root))
    registry = open_registry(storage, RegistryConfig(), SYSTEM_CLOCK)
    for version in map(str, range(1, versions + 1)):
        assert registry.reserve(MODEL, f"digest {version}", "here", "") == version
        publish(storage, version, (6, 6, 3) if version == odd else SHAPE)
    registry.move_alias(MODEL, "champion", "1")
    registry.move_alias(MODEL, "challenger", "2")
    return storage
