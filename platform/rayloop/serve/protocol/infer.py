"""Turn the body of a V2 infer request over REST into an image batch, strictly."""

import json
import math
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from rayloop.serve.protocol.error import ProtocolError
from rayloop.serve.protocol.parameters import NOTHING_ASKED, Schedule, read_schedule
from rayloop.serve.protocol.request import (
    Images,
    InferRequest,
    OutputWish,
    checked_shape,
    decode_files,
    dims,
    known_input,
    malformed,
    output_wish,
    short,
    split_elements,
)
from rayloop.serve.protocol.spec import INPUT_NAME, OUTPUT_NAME, ModelSpec

RAW_OUTPUT = OutputWish(binary=True)

LONGEST_KNOWN_HEAD = 1024
"""Bytes of a head that is worth remembering."""

SMALL_DOCUMENT = 10_000
"""Values and containers that a document without tensor data may have."""


@dataclass(frozen=True, slots=True)
class _Head:
    """What the JSON before a raw tensor of pixels says."""

    spec: ModelSpec
    shape: tuple[int, ...]
    size_bytes: int
    output: OutputWish
    schedule: Schedule


class KnownHeads:
    """Heads that were understood before: those of a client's binary requests repeat byte for byte.

    Args:
        most: Heads that are remembered; one more, and all are forgotten.
    """

    def __init__(self, most: int = 256) -> None:
        self._most = most
        self._heads: dict[bytes, _Head] = {}

    def find(self, body: bytes, length: int, spec: ModelSpec) -> InferRequest | None:
        """The request, if its head is known for this model and its tensor is whole."""
        head = self._heads.get(body[:length]) if length <= LONGEST_KNOWN_HEAD else None
        if head is None or head.spec is not spec or len(body) - length != head.size_bytes:
            return None
        images = np.frombuffer(body, np.uint8, offset=length).reshape(head.shape)
        return InferRequest(
            images=images, request_id=None, output=head.output, schedule=head.schedule
        )

    def keep(self, head: bytes, size_bytes: int, spec: ModelSpec, request: InferRequest) -> None:
        """Remember a head that is short and names no request."""
        shape = request.images.shape
        if request.request_id is not None or len(head) > LONGEST_KNOWN_HEAD:
            return
        if request.images.nbytes != size_bytes:
            return
        if len(self._heads) >= self._most:
            self._heads.clear()
        self._heads[head] = _Head(spec, shape, size_bytes, request.output, request.schedule)


def parse_infer(
    body: bytes,
    header_length: str | None,
    spec: ModelSpec,
    max_rows: int,
    known: KnownHeads | None = None,
) -> InferRequest:
    """Understand the body of an infer request.

    Args:
        body: The whole body, uncompressed.
        header_length: `Inference-Header-Content-Length`: bytes of JSON before the raw tensors;
            "0" means that the body is one raw image; None means JSON throughout.
        spec: What the model takes.
        max_rows: Most images in one request.
        known: Heads of earlier requests under the same limits.

    Raises:
        ProtocolError: 400, 413 or 422 with the reason.
    """
    most = 2 * max_rows * spec.row_bytes + SMALL_DOCUMENT
    if header_length is None:
        return _parse_document(load_object(body, most), b"", spec, max_rows)
    length = _header_length(header_length, len(body))
    if length == 0:
        return _parse_raw(body, spec)
    if known is not None and (request := known.find(body, length, spec)) is not None:
        return request
    head, raw = body[:length], memoryview(body)[length:]
    document = load_object(head, most)
    request = _parse_document(document, raw, spec, max_rows)
    if known is not None and document["inputs"][0]["datatype"] == "UINT8":
        known.keep(head, len(raw), spec, request)
    return request


def _header_length(text: str, body_bytes: int) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        malformed(f"Inference-Header-Content-Length {text[:40]!r} is not a number of bytes.")
    if int(text) > body_bytes:
        malformed(
            f"Inference-Header-Content-Length is {int(text)}, but the body has {body_bytes} bytes."
        )
    return int(text)


def _parse_raw(body: bytes, spec: ModelSpec) -> InferRequest:
    if len(body) != spec.row_bytes:
        malformed(
            f"A raw request holds one image of {dims(spec.shape)} = {spec.row_bytes} bytes; this "
            f"one has {len(body)}."
        )
    images = np.frombuffer(body, np.uint8).reshape(1, *spec.shape)
    return InferRequest(images=images, request_id=None, output=RAW_OUTPUT, schedule=NOTHING_ASKED)


def load_object(text: bytes, most_values: int = SMALL_DOCUMENT) -> dict[str, Any]:
    """A JSON object from the bytes of a body.

    Args:
        text: The bytes.
        most_values: Most values and most containers; a few bytes of text become many of memory.

    Raises:
        ProtocolError: 400, it is something else; 413, it has too many values.
    """
    if text.count(b"[") + text.count(b"{") > most_values:
        malformed(f"The JSON is nested too deeply: more than {most_values} lists and objects.")
    if text.count(b",") > most_values:
        raise ProtocolError(413, f"The JSON has more than {most_values} values; send fewer.")
    try:
        document = json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        malformed("The JSON is nested too deeply; a tensor needs at most 4 levels.")
    except ValueError as error:
        malformed(f"The body is not valid JSON: {str(error)[:200]}.")
    if not isinstance(document, dict):
        malformed("The body must be a JSON object.")
    return document


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not allowed")


def _parse_document(
    document: dict[str, Any], raw: bytes | memoryview, spec: ModelSpec, max_rows: int
) -> InferRequest:
    request_id = document.get("id")
    if request_id is not None and not isinstance(request_id, str):
        malformed("`id` must be a string.")
    schedule = read_schedule(_parameters(document, "the request"))
    output = _output(document, schedule.binary_output, spec)
    tensor = _only_input(document)
    shape = checked_shape(tensor.get("datatype"), tensor.get("shape"), spec, max_rows)
    return InferRequest(
        images=_pixels(tensor, raw, shape, spec),
        request_id=request_id,
        output=output,
        schedule=schedule,
    )


def _pixels(
    tensor: dict[str, Any], raw: bytes | memoryview, shape: tuple[int, ...], spec: ModelSpec
) -> Images:
    size = _parameters(tensor, f"input {INPUT_NAME!r}").get("binary_data_size")
    if size is None and len(raw):
        malformed(f"{len(raw)} bytes follow the JSON, but no input has `binary_data_size`.")
    if size is not None and "data" in tensor:
        malformed("An input has either `data` or `binary_data_size`, not both.")
    if tensor["datatype"] == "BYTES":
        if size is None:
            malformed("Image files do not fit into JSON; send them with `binary_data_size`.")
        _check_size(size, len(raw), len(raw))
        return decode_files(split_elements(raw, math.prod(shape)), spec)
    if size is None:
        return _from_json(tensor, shape)
    _check_size(size, len(raw), math.prod(shape))
    return np.frombuffer(raw, np.uint8).reshape(shape)


def _check_size(size: object, found: int, expected: int) -> None:
    if type(size) is not int or size != expected:
        malformed(f"`binary_data_size` is {short(size)}; the tensor needs {expected} bytes.")
    if found != expected:
        malformed(f"{expected} bytes of tensor must follow the JSON; {found} do.")


def _only_input(document: dict[str, Any]) -> dict[str, Any]:
    inputs = document.get("inputs")
    if not isinstance(inputs, list) or len(inputs) != 1 or not isinstance(inputs[0], dict):
        malformed(f"`inputs` must be a list with one tensor, named {INPUT_NAME!r}.")
    tensor: dict[str, Any] = inputs[0]
    known_input(tensor.get("name"))
    return tensor


def _from_json(tensor: dict[str, Any], shape: tuple[int, ...]) -> Images:
    data = tensor.get("data")
    if not isinstance(data, list):
        malformed("`data` must be a list of pixel values, or `binary_data_size` must be given.")
    try:
        values = np.asarray(data)
    except (ValueError, OverflowError):
        malformed("`data` is ragged or mixes kinds; it must be whole numbers, nested or flat.")
    if values.dtype.kind not in "iu":
        malformed("`data` must hold whole numbers from 0 to 255 only.")
    if values.shape not in (shape, (math.prod(shape),)):
        malformed(
            f"`data` has shape {list(values.shape)}; it must be {list(shape)}, or flat with "
            f"{math.prod(shape)} values."
        )
    if values.min() < 0 or values.max() > 255:
        malformed(f"Pixel values must be from 0 to 255; found {values.min()} to {values.max()}.")
    return values.astype(np.uint8).reshape(shape)


def _output(document: dict[str, Any], binary: bool, spec: ModelSpec) -> OutputWish:
    outputs = document.get("outputs")
    if outputs is None or outputs == []:
        return OutputWish(binary)
    if not isinstance(outputs, list) or len(outputs) != 1 or not isinstance(outputs[0], dict):
        malformed(f"`outputs` must be a list with one output, named {OUTPUT_NAME!r}.")
    parameters = _parameters(outputs[0], "an output")
    return output_wish(outputs[0].get("name"), parameters, binary, spec)


def _parameters(holder: dict[str, Any], where: str) -> dict[str, Any]:
    parameters = holder.get("parameters")
    if parameters is None:
        return {}
    if not isinstance(parameters, dict):
        malformed(f"`parameters` of {where} must be a JSON object.")
    if "shared_memory_region" in parameters:
        malformed("Shared memory is not offered; send the tensor in the request.")
    return parameters
