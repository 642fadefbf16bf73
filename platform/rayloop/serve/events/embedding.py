"""Turn an exported classifier into an embedder: images -> the input of its last linear layer."""

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from rayloop.errors import Corrupt, RequestError
from rayloop.quantize.graph import PRODUCTS
from rayloop.quantize.session import open_session
from rayloop.serve.protocol.spec import INPUT_NAME, OUTPUT_NAME

Images = NDArray[np.uint8]
Embeddings = NDArray[np.float32]

LINEAR = (*PRODUCTS, "MatMulInteger")
ROUNDING = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")
"""Between the float tensor and an INT8 layer; the embedding is taken before it."""

BATCH_ROWS = 64


class Embedder:
    """Embeddings of images by a model that is served.

    The layers after the embedding are cut off, so a row costs a little less than a prediction.

    Args:
        model: Bytes of `model.onnx`, fp32 or INT8.
        num_threads: Threads one call may use.

    Raises:
        Corrupt: The bytes are no ONNX model, or not one of uint8 images.
        RequestError: The model has no linear layer that takes one vector an image.
    """

    def __init__(self, model: bytes, num_threads: int = 1) -> None:
        graph = _parsed(model)
        name = last_linear_input(graph.graph)
        _cut_after(graph.graph, name)
        try:
            self._session = open_session(graph.SerializeToString(), num_threads)
            self.width = self._checked_width(name)
        except RequestError:
            raise
        except Exception as error:
            raise Corrupt(
                f"ONNX Runtime cannot compute embeddings with the model ({str(error)[:300]}); "
                "export and register it again."
            ) from error

    def embed(self, images: Images) -> Embeddings:
        """Embeddings float32 [N, D] of images uint8 [N, H, W, C]; D is `width`."""
        found = np.empty((len(images), self.width), np.float32)
        for at in range(0, len(images), BATCH_ROWS):
            found[at : at + BATCH_ROWS] = self._run(images[at : at + BATCH_ROWS])
        return found

    def _run(self, images: Images) -> NDArray[np.generic]:
        result: NDArray[np.generic] = self._session.run(None, {INPUT_NAME: images})[0]
        return result

    def _checked_width(self, name: str) -> int:
        shape = self._session.get_inputs()[0].shape[1:]
        found = self._run(np.full((2, *shape), 128, np.uint8))
        if found.ndim != 2 or len(found) != 2 or found.dtype != np.float32:
            raise RequestError(
                f"The last linear layer takes {name!r}, {found.dtype} {list(found.shape)} for two "
                "images, which is not one vector an image; set events.embedding_share to 0."
            )
        return int(found.shape[1])


def last_linear_input(graph: onnx.GraphProto) -> str:
    """Name of the float tensor that goes into the last linear layer before the answer.

    Raises:
        RequestError: There is no such layer.
    """
    makers = {output: node for node in graph.node for output in node.output}
    constants = {tensor.name for tensor in graph.initializer}
    for node in _needed_for(graph, OUTPUT_NAME):
        for name in node.input[:2] if node.op_type in LINEAR else ():
            source = _before_rounding(name, makers)
            if source not in constants and source in makers:
                return source
    raise RequestError(
        "The model has no linear layer between its images and its answer, so there are no "
        "embeddings; set events.embedding_share to 0."
    )


def _before_rounding(name: str, makers: dict[str, onnx.NodeProto]) -> str:
    """The tensor that was rounded to 8 bits to become this one, or else the tensor itself."""
    while name in makers and makers[name].op_type in ROUNDING:
        name = makers[name].input[0]
    return name


def _needed_for(graph: onnx.GraphProto, name: str) -> list[onnx.NodeProto]:
    """The nodes that a tensor is computed by, its own first and those they need later."""
    wanted, found = {name}, []
    for node in reversed(graph.node):
        if wanted.intersection(node.output):
            wanted.update(node.input)
            found.append(node)
    return found


def _cut_after(graph: onnx.GraphProto, name: str) -> None:
    """Make a tensor the graph's one output and remove what it does not need."""
    needed = _needed_for(graph, name)
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in reversed(needed)]
    used = {source for node in kept for source in node.input}
    constants = [
        onnx.TensorProto.FromString(tensor.SerializeToString())
        for tensor in graph.initializer
        if tensor.name in used
    ]
    for field, entries in ((graph.node, kept), (graph.initializer, constants)):
        del field[:]
        field.extend(entries)
    del graph.output[:]
    graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))


def _parsed(model: bytes) -> onnx.ModelProto:
    try:
        parsed = onnx.load_from_string(model)
    except Exception as error:  # the parser's own kind, which differs by protobuf's version
        raise Corrupt(
            f"The model is no ONNX file ({error}); export and register it again."
        ) from error
    if not parsed.graph.node:
        raise Corrupt("The model's graph is empty; export and register it again.")
    return parsed
