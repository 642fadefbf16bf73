"""Turn probabilities into the body of a V2 infer response, as JSON or as JSON and raw bytes."""

import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayloop.serve.protocol.spec import OUTPUT_NAME, ModelSpec


def infer_answer(
    probabilities: NDArray[np.float32], spec: ModelSpec, request_id: str | None, binary: bool
) -> tuple[bytes, int | None]:
    """Write the answer.

    Args:
        probabilities: float32 [N, K].
        spec: The model that answers.
        request_id: Repeated when the client gave one.
        binary: Put the tensor behind the JSON, little-endian.

    Returns:
        The body, and the length of its JSON part for `Inference-Header-Content-Length`; None when
        all of it is JSON.
    """
    output: dict[str, Any] = {
        "name": OUTPUT_NAME,
        "datatype": "FP32",
        "shape": list(probabilities.shape),
    }
    document: dict[str, Any] = {"model_name": spec.model, "model_version": spec.version}
    if request_id is not None:
        document["id"] = request_id
    document["outputs"] = [output]
    if not binary:
        output["data"] = probabilities.ravel().tolist()
        return _dump(document), None
    output["parameters"] = {"binary_data_size": probabilities.nbytes}
    head = _dump(document)
    return head + probabilities.astype("<f4", copy=False).tobytes(), len(head)


def _dump(document: dict[str, Any]) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()
