"""Turn probabilities into the body of a V2 infer response, as JSON or as JSON and raw bytes."""

import json
import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayloop.serve.protocol.request import OutputWish
from rayloop.serve.protocol.spec import OUTPUT_NAME, ModelSpec

Probabilities = NDArray[np.float32]


def infer_answer(
    probabilities: Probabilities,
    spec: ModelSpec,
    request_id: str | None,
    wish: OutputWish,
    parameters: dict[str, str] | None = None,
) -> tuple[bytes, int | None]:
    """Write the answer.

    Args:
        probabilities: float32 [N, K].
        spec: The model that answers.
        request_id: Repeated when the client gave one.
        wish: How the output should come back.
        parameters: What else is said about the answer.

    Returns:
        The body, and the length of its JSON part for `Inference-Header-Content-Length`; None when
        all of it is JSON.
    """
    output: dict[str, Any] = {"name": OUTPUT_NAME}
    document: dict[str, Any] = {"model_name": spec.model, "model_version": spec.version}
    if request_id is not None:
        document["id"] = request_id
    if parameters:
        document["parameters"] = parameters
    document["outputs"] = [output]
    if not wish.binary:
        datatype, shape, data = _as_values(probabilities, spec, wish.classes)
        output |= {"datatype": datatype, "shape": shape, "data": data}
        return _dump(document), None
    datatype, shape, raw = as_bytes(probabilities, spec, wish.classes)
    output |= {"datatype": datatype, "shape": shape, "parameters": {"binary_data_size": len(raw)}}
    head = _dump(document)
    return head + raw, len(head)


def as_bytes(
    probabilities: Probabilities, spec: ModelSpec, classes: int
) -> tuple[str, list[int], bytes]:
    """The output tensor little-endian: its datatype, its shape and its bytes.

    Args:
        probabilities: float32 [N, K].
        spec: Has the labels.
        classes: 0 for the probabilities, else as in `top_classes`.
    """
    if not classes:
        raw = probabilities.astype("<f4", copy=False).tobytes()
        return "FP32", list(probabilities.shape), raw
    labels = top_classes(probabilities, spec.class_names, classes)
    elements = [label.encode() for row in labels for label in row]
    raw = b"".join(struct.pack("<I", len(element)) + element for element in elements)
    return "BYTES", [len(labels), classes], raw


def top_classes(
    probabilities: Probabilities, class_names: tuple[str, ...], classes: int
) -> list[list[str]]:
    """The most likely classes of each row, best first, as `score:index:label`.

    Of equal scores the lower index comes first.

    Args:
        probabilities: float32 [N, K].
        class_names: K labels.
        classes: How many, 1 to K.
    """
    best = np.argsort(-probabilities, axis=1, kind="stable")[:, :classes]
    return [
        [f"{row[index]:.6f}:{index}:{class_names[index]}" for index in order.tolist()]
        for row, order in zip(probabilities, best, strict=True)
    ]


def _as_values(
    probabilities: Probabilities, spec: ModelSpec, classes: int
) -> tuple[str, list[int], list[Any]]:
    if not classes:
        return "FP32", list(probabilities.shape), probabilities.ravel().tolist()
    labels = top_classes(probabilities, spec.class_names, classes)
    return "BYTES", [len(labels), classes], [label for row in labels for label in row]


def _dump(document: dict[str, Any]) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()
