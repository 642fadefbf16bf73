"""Turn the bytes of an exported model into something that predicts batches of uint8 images."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from rayloop.errors import Corrupt
from rayloop.serve.protocol.spec import INPUT_NAME, OUTPUT_NAME

Images = NDArray[np.uint8]
Probabilities = NDArray[np.float32]


class Engine(Protocol):
    """What the batcher asks of a model; called from one thread at a time."""

    def predict(self, images: Images) -> Probabilities:
        """Probabilities [N, K] of uint8 images [N, H, W, C]."""
        ...

    def warm(self, batch_sizes: Sequence[int]) -> None:
        """Run once with each batch size, so that no request pays for first-time work."""
        ...


class OnnxEngine:
    """An ONNX model on ONNX Runtime's CPU provider.

    The pool's threads sleep between runs instead of spinning: a spinning pool takes whole cores
    from the event loop and from neighbours while nothing is asked.

    Args:
        model: Bytes of `model.onnx`, whose input is `image` and output `probabilities`.
        num_threads: Threads one run may use; the CPU cores of the replica.

    Raises:
        Corrupt: The bytes are not such a model.
    """

    def __init__(self, model: bytes, num_threads: int = 1) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = num_threads
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(
                model, options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            raise Corrupt(
                f"ONNX Runtime cannot load the model ({str(error)[:300]}); export and register it "
                "again."
            ) from error
        self._shape = self._checked_signature()

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels of an image."""
        return self._shape

    def predict(self, images: Images) -> Probabilities:
        """Probabilities [N, K] of uint8 images [N, H, W, C]."""
        result: Probabilities = self._session.run([OUTPUT_NAME], {INPUT_NAME: images})[0]
        return result

    def warm(self, batch_sizes: Sequence[int]) -> None:
        """Run once with each batch size on grey images."""
        for rows in batch_sizes:
            self.predict(np.full((rows, *self._shape), 128, np.uint8))

    def _checked_signature(self) -> tuple[int, int, int]:
        inputs = {node.name: node for node in self._session.get_inputs()}
        outputs = {node.name for node in self._session.get_outputs()}
        node = inputs.get(INPUT_NAME)
        if (
            len(inputs) != 1
            or node is None
            or node.type != "tensor(uint8)"
            or len(node.shape) != 4
            or not all(isinstance(size, int) for size in node.shape[1:])
            or OUTPUT_NAME not in outputs
        ):
            raise Corrupt(
                f"The model takes {sorted(inputs)} and gives {sorted(outputs)}; serving needs one "
                f"uint8 input {INPUT_NAME!r} [N, H, W, C] of fixed size and {OUTPUT_NAME!r} [N, K]."
            )
        height, width, channels = node.shape[1:]
        return height, width, channels


def warm_up_sizes(max_batch_rows: int) -> tuple[int, ...]:
    """The batch sizes worth warming: 1, 2, 4, ... and the largest."""
    powers = [1 << power for power in range(max_batch_rows.bit_length())]
    return tuple(sorted({*powers, max_batch_rows}))
