"""Turn a gRPC infer request into an image batch, and probabilities into a gRPC infer response."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayloop.serve.protocol import inference_pb2 as pb
from rayloop.serve.protocol.answer import as_bytes
from rayloop.serve.protocol.parameters import read_schedule
from rayloop.serve.protocol.request import (
    Images,
    InferRequest,
    OutputWish,
    checked_shape,
    decode_files,
    known_input,
    malformed,
    output_wish,
    split_elements,
)
from rayloop.serve.protocol.spec import INPUT_NAME, OUTPUT_NAME, ModelSpec

WHOLE_OUTPUT = OutputWish(binary=True)


def parse_message(message: Any, spec: ModelSpec, max_rows: int) -> InferRequest:
    """Understand a `ModelInferRequest`.

    Args:
        message: The request; its pixels are `raw_input_contents`, or `contents` of the one input.
        spec: What the model takes.
        max_rows: Most images in one request.

    Raises:
        ProtocolError: 400, 413 or 422 with the reason.
    """
    if len(message.inputs) != 1:
        malformed(f"The model takes one input, {INPUT_NAME!r}, not {len(message.inputs)}.")
    tensor = message.inputs[0]
    known_input(tensor.name)
    if tensor.parameters and "shared_memory_region" in tensor.parameters:
        malformed("Shared memory is not offered; send the tensor in the request.")
    shape = checked_shape(tensor.datatype, list(tensor.shape), spec, max_rows)
    return InferRequest(
        images=_pixels(message, tensor, shape, spec),
        request_id=message.id or None,
        output=_output(message, spec),
        schedule=read_schedule(scalars(message.parameters)),
    )


def scalars(parameters: Any) -> dict[str, object]:
    """A map of parameters as plain values.

    Raises:
        ProtocolError: 400, one has no value.
    """
    if not parameters:
        return {}
    found: dict[str, object] = {}
    for name, parameter in parameters.items():
        kind = parameter.WhichOneof("parameter_choice")
        if kind is None:
            malformed(f"Parameter {name[:60]!r} has no value.")
        found[name] = getattr(parameter, kind)
    return found


def infer_response(
    probabilities: NDArray[np.float32],
    spec: ModelSpec,
    request_id: str | None,
    wish: OutputWish,
    parameters: dict[str, str],
) -> Any:
    """The `ModelInferResponse`.

    Args:
        probabilities: float32 [N, K].
        spec: The model that answers.
        request_id: Repeated when the client gave one.
        wish: How the output should come back.
        parameters: What else is said about the answer.
    """
    datatype, shape, raw = as_bytes(probabilities, spec, wish.classes)
    response = pb.ModelInferResponse(
        model_name=spec.model,
        model_version=spec.version,
        id=request_id or "",
        outputs=[{"name": OUTPUT_NAME, "datatype": datatype, "shape": shape}],
        raw_output_contents=[raw],
    )
    for name, value in parameters.items():
        response.parameters[name].string_param = value
    return response


def _output(message: Any, spec: ModelSpec) -> OutputWish:
    if not message.outputs:
        return WHOLE_OUTPUT
    if len(message.outputs) != 1:
        malformed(f"The model gives one output, {OUTPUT_NAME!r}, not {len(message.outputs)}.")
    output = message.outputs[0]
    return output_wish(output.name, scalars(output.parameters), True, spec)


def _pixels(message: Any, tensor: Any, shape: tuple[int, ...], spec: ModelSpec) -> Images:
    files = tensor.datatype == "BYTES"
    if message.raw_input_contents:
        if len(message.raw_input_contents) != 1 or tensor.HasField("contents"):
            malformed(
                "`raw_input_contents` must have one entry for each input, and then no input has "
                "`contents`."
            )
        raw: bytes = message.raw_input_contents[0]
        if files:
            return decode_files(split_elements(raw, math.prod(shape)), spec)
        if len(raw) != math.prod(shape):
            malformed(
                f"Shape {list(shape)} in UINT8 needs {math.prod(shape)} bytes; `raw_input_contents`"
                f" has {len(raw)}."
            )
        return np.frombuffer(raw, np.uint8).reshape(shape)
    return _typed(tensor.contents, files, shape, spec)


def _typed(contents: Any, files: bool, shape: tuple[int, ...], spec: ModelSpec) -> Images:
    field = "bytes_contents" if files else "uint_contents"
    present = [descriptor.name for descriptor, _ in contents.ListFields()]
    if present != [field]:
        malformed(
            f"The tensor's values belong in `{field}` or in `raw_input_contents`; found "
            f"{', '.join(present) or 'none'}."
        )
    values = getattr(contents, field)
    if len(values) != math.prod(shape):
        malformed(f"Shape {list(shape)} needs {math.prod(shape)} values; there are {len(values)}.")
    if files:
        return decode_files(values, spec)
    pixels = np.fromiter(values, np.uint32, len(values))
    if pixels.max() > 255:
        malformed(f"Pixel values must be from 0 to 255; found {pixels.max()}.")
    return pixels.astype(np.uint8).reshape(shape)
