"""An ONNX file and threads -> an ONNX Runtime session; uint8 images -> probabilities."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime

Images = npt.NDArray[np.uint8]
Probabilities = npt.NDArray[np.float32]
SEVERITY_ERROR = 3


def open_session(model: Path | bytes, num_threads: int = 1) -> onnxruntime.InferenceSession:
    """Load a model for the CPU.

    Args:
        model: An ONNX file or its bytes.
        num_threads: Threads of one call; they do not spin while idle, since they share the cores
            with whatever feeds them.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.inter_op_num_threads = 1
    options.log_severity_level = SEVERITY_ERROR
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    source = str(model) if isinstance(model, Path) else model
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def predict(
    session: onnxruntime.InferenceSession, images: Images, batch_size: int = 128
) -> Probabilities:
    """Probabilities of any number of images, a batch at a time.

    Args:
        session: As `open_session` returns it.
        images: uint8, shape (N, H, W, C).
        batch_size: Rows of one call.

    Returns:
        float32, shape (N, K).
    """
    name = session.get_inputs()[0].name
    parts = [
        session.run(None, {name: images[start : start + batch_size]})[0]
        for start in range(0, len(images), batch_size)
    ]
    answers: Probabilities = np.concatenate(parts)
    return answers
