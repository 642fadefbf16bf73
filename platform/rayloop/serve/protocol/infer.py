"""Turn the body of a V2 infer request into an image batch, strictly.

A malformed request is 400; a well-formed tensor that this model does not take (another datatype,
another image size, no rows) is 422; too many rows are 413.
"""

import json
import math
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from rayloop.serve.protocol.error import ProtocolError
from rayloop.serve.protocol.spec import DATATYPES, INPUT_NAME, OUTPUT_NAME, ModelSpec

Images = NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True, slots=True)
class InferRequest:
    """One understood request."""

    images: Images
    """uint8 [N, H, W, C], N at least 1; may share memory with the body."""

    request_id: str | None
    """The client's `id`, which the answer repeats."""

    binary_output: bool
    """Whether the probabilities go back as raw little-endian bytes."""


def parse_infer(
    body: bytes, header_length: str | None, spec: ModelSpec, max_rows: int
) -> InferRequest:
    """Understand the body of an infer request.

    Args:
        body: The whole body, uncompressed.
        header_length: `Inference-Header-Content-Length`: bytes of JSON before the raw tensors;
            "0" means that the body is one raw image; None means JSON throughout.
        spec: What the model takes.
        max_rows: Most images in one request.

    Raises:
        ProtocolError: 400, 413 or 422 with the reason.
    """
    if header_length is None:
        return _parse_document(_load(body), b"", spec, max_rows)
    length = _header_length(header_length, len(body))
    if length == 0:
        return _parse_raw(body, spec)
    return _parse_document(_load(body[:length]), memoryview(body)[length:], spec, max_rows)


def _header_length(text: str, body_bytes: int) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        _malformed(f"Inference-Header-Content-Length {text[:40]!r} is not a number of bytes.")
    if int(text) > body_bytes:
        _malformed(
            f"Inference-Header-Content-Length is {int(text)}, but the body has {body_bytes} bytes."
        )
    return int(text)


def _parse_raw(body: bytes, spec: ModelSpec) -> InferRequest:
    if len(body) != spec.row_bytes:
        _malformed(
            f"A raw request holds one image of {_dims(spec.shape)} = {spec.row_bytes} bytes; this "
            f"one has {len(body)}."
        )
    images = np.frombuffer(body, np.uint8).reshape(1, *spec.shape)
    return InferRequest(images=images, request_id=None, binary_output=True)


def _load(text: bytes) -> dict[str, Any]:
    try:
        document = json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        _malformed("The JSON is nested too deeply; a tensor needs at most 4 levels.")
    except ValueError as error:
        _malformed(f"The body is not valid JSON: {str(error)[:200]}.")
    if not isinstance(document, dict):
        _malformed("The body must be a JSON object with `inputs`.")
    return document


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not allowed")


def _parse_document(
    document: dict[str, Any], raw: bytes | memoryview, spec: ModelSpec, max_rows: int
) -> InferRequest:
    request_id = document.get("id")
    if request_id is not None and not isinstance(request_id, str):
        _malformed("`id` must be a string.")
    binary_output = _wants_binary(document)
    tensor = _only_input(document)
    shape = _checked_shape(tensor, spec, max_rows)
    size = _parameters(tensor, f"input {INPUT_NAME!r}").get("binary_data_size")
    if size is None:
        if len(raw):
            _malformed(f"{len(raw)} bytes follow the JSON, but no input has `binary_data_size`.")
        images = _from_json(tensor, shape)
    else:
        images = _from_bytes(tensor, size, raw, shape)
    return InferRequest(images=images, request_id=request_id, binary_output=binary_output)


def _only_input(document: dict[str, Any]) -> dict[str, Any]:
    inputs = document.get("inputs")
    if not isinstance(inputs, list) or len(inputs) != 1 or not isinstance(inputs[0], dict):
        _malformed(f"`inputs` must be a list with one tensor, named {INPUT_NAME!r}.")
    tensor: dict[str, Any] = inputs[0]
    if tensor.get("name") != INPUT_NAME:
        _malformed(
            f"Input {_short(tensor.get('name'))} is unknown; the model takes {INPUT_NAME!r}."
        )
    return tensor


def _checked_shape(tensor: dict[str, Any], spec: ModelSpec, max_rows: int) -> tuple[int, ...]:
    datatype, shape = tensor.get("datatype"), tensor.get("shape")
    if not isinstance(datatype, str) or datatype not in DATATYPES:
        _malformed(f"Datatype {_short(datatype)} is unknown; send UINT8.")
    if datatype != "UINT8":
        raise ProtocolError(422, f"The model takes UINT8 images (0..255), not {datatype}.")
    if (
        not isinstance(shape, list)
        or len(shape) > 16
        or not all(type(size) is int and 0 <= size < 2**31 for size in shape)
    ):
        _malformed(f"`shape` must be [N, {_dims(spec.shape, ', ')}] in whole numbers.")
    if tuple(shape[1:]) != spec.shape or shape[0] < 1:
        raise ProtocolError(
            422,
            f"The model takes images of shape [N, {_dims(spec.shape, ', ')}] (rows, height, width, "
            f"channels) with N at least 1, not {shape}.",
        )
    if shape[0] > max_rows:
        raise ProtocolError(
            413, f"{shape[0]} images are too many for one request; send at most {max_rows}."
        )
    return tuple(shape)


def _from_json(tensor: dict[str, Any], shape: tuple[int, ...]) -> Images:
    data = tensor.get("data")
    if not isinstance(data, list):
        _malformed("`data` must be a list of pixel values, or `binary_data_size` must be given.")
    try:
        values = np.asarray(data)
    except (ValueError, OverflowError):
        _malformed("`data` is ragged or mixes kinds; it must be whole numbers, nested or flat.")
    if values.dtype.kind not in "iu":
        _malformed("`data` must hold whole numbers from 0 to 255 only.")
    if values.shape not in (shape, (math.prod(shape),)):
        _malformed(
            f"`data` has shape {list(values.shape)}; it must be {list(shape)}, or flat with "
            f"{math.prod(shape)} values."
        )
    if values.min() < 0 or values.max() > 255:
        _malformed(f"Pixel values must be from 0 to 255; found {values.min()} to {values.max()}.")
    return values.astype(np.uint8).reshape(shape)


def _from_bytes(
    tensor: dict[str, Any], size: object, raw: bytes | memoryview, shape: tuple[int, ...]
) -> Images:
    expected = math.prod(shape)
    if "data" in tensor:
        _malformed("An input has either `data` or `binary_data_size`, not both.")
    if type(size) is not int or size != expected:
        _malformed(
            f"`binary_data_size` is {_short(size)}; shape {list(shape)} in UINT8 needs {expected}."
        )
    if len(raw) != expected:
        _malformed(f"{expected} bytes of tensor must follow the JSON; {len(raw)} do.")
    return np.frombuffer(raw, np.uint8).reshape(shape)


def _wants_binary(document: dict[str, Any]) -> bool:
    whole = _parameters(document, "the request").get("binary_data_output", False)
    if not isinstance(whole, bool):
        _malformed("`binary_data_output` must be true or false.")
    outputs = document.get("outputs")
    if outputs is None or outputs == []:
        return whole
    if not isinstance(outputs, list) or len(outputs) != 1 or not isinstance(outputs[0], dict):
        _malformed(f"`outputs` must be a list with one output, named {OUTPUT_NAME!r}.")
    if outputs[0].get("name") != OUTPUT_NAME:
        name = _short(outputs[0].get("name"))
        _malformed(f"Output {name} is unknown; the model gives {OUTPUT_NAME!r}.")
    parameters = _parameters(outputs[0], f"output {OUTPUT_NAME!r}")
    if "classification" in parameters:
        _malformed("The classification extension is not offered; see `extensions` in GET /v2.")
    binary = parameters.get("binary_data", whole)
    if not isinstance(binary, bool):
        _malformed("`binary_data` must be true or false.")
    return binary


def _parameters(holder: dict[str, Any], where: str) -> dict[str, Any]:
    parameters = holder.get("parameters")
    if parameters is None:
        return {}
    if not isinstance(parameters, dict):
        _malformed(f"`parameters` of {where} must be a JSON object.")
    if "shared_memory_region" in parameters:
        _malformed("Shared memory is not offered; send the tensor in the request.")
    return parameters


def _malformed(message: str) -> NoReturn:
    raise ProtocolError(400, message)


def _short(value: object) -> str:
    return repr(value)[:60]


def _dims(shape: tuple[int, ...], joint: str = "x") -> str:
    return joint.join(map(str, shape))
