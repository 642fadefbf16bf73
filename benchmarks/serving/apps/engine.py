"""The one engine every server here serves: the same file, the same ONNX Runtime settings.

BENCH_MODEL names the ONNX file, or is `noop` for an engine that only makes zeros; BENCH_SHAPE is
`H,W,C`, BENCH_CLASSES the number of classes, BENCH_THREADS the threads of one engine.
"""

import os
from collections.abc import Callable

import numpy as np

Predict = Callable[[np.ndarray], np.ndarray]

SHAPE = tuple(int(size) for size in os.environ.get("BENCH_SHAPE", "28,28,1").split(","))
CLASSES = int(os.environ.get("BENCH_CLASSES", "10"))
MAX_BATCH = int(os.environ.get("BENCH_MAX_BATCH", "32"))
MAX_WAIT_S = float(os.environ.get("BENCH_MAX_WAIT_S", "0.002"))
WORKERS = int(os.environ.get("BENCH_WORKERS", "1"))
FORM = os.environ.get("BENCH_FORM", "")
PORT = int(os.environ.get("BENCH_PORT", "8000"))


def load() -> Predict:
    """The engine: uint8 [N, H, W, C] -> float32 [N, K]."""
    path = os.environ["BENCH_MODEL"]
    if path == "noop":
        return noop
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = int(os.environ.get("BENCH_THREADS", "1"))
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    predict = lambda images: session.run(["probabilities"], {"image": images})[0]  # noqa: E731
    for rows in (1, 2, 4, 8, 16, 32):
        predict(np.full((rows, *SHAPE), 128, np.uint8))
    return predict


def noop(images: np.ndarray) -> np.ndarray:
    """Zeros of the right shape."""
    return np.zeros((len(images), CLASSES), np.float32)


def images_of(body: bytes) -> np.ndarray:
    """Raw bytes of one or more images -> uint8 [N, H, W, C]."""
    return np.frombuffer(body, np.uint8).reshape(-1, *SHAPE)
