"""What an infer request asks, whichever way it came, and the checks both ways share.

A malformed request is 400; a well-formed tensor that this model does not take (another datatype,
another image size, no rows) is 422; too many rows are 413.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from rayloop.serve.images import decode_image
from rayloop.serve.protocol.error import ProtocolError
from rayloop.serve.protocol.parameters import Scalars, Schedule, whole
from rayloop.serve.protocol.spec import DATATYPES, INPUT_NAME, OUTPUT_NAME, ModelSpec

Images = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class OutputWish:
    """How the one output should come back."""

    binary: bool = False
    """As raw little-endian bytes behind the JSON."""

    classes: int = 0
    """The most likely classes with their labels, so many of them; 0 wants the probabilities."""


@dataclass(frozen=True, kw_only=True, slots=True)
class InferRequest:
    """One understood request."""

    images: Images
    """uint8 [N, H, W, C], N at least 1; may share memory with the body."""

    request_id: str | None
    """The client's `id`, which the answer repeats."""

    output: OutputWish
    schedule: Schedule


def checked_shape(
    datatype: object, shape: object, spec: ModelSpec, max_rows: int
) -> tuple[int, ...]:
    """The shape of the input tensor as a tuple: [N, H, W, C], or [N] or [N, 1] of image files.

    Args:
        datatype: As sent: `UINT8`, or `BYTES` for encoded images.
        shape: As sent.
        spec: What the model takes.
        max_rows: Most images in one request.

    Raises:
        ProtocolError: 400, 413 or 422.
    """
    if not isinstance(datatype, str) or datatype not in DATATYPES:
        malformed(f"Datatype {short(datatype)} is unknown; send UINT8.")
    if datatype not in ("UINT8", "BYTES"):
        raise ProtocolError(
            422, f"The model takes UINT8 pixels (0..255) or BYTES of image files, not {datatype}."
        )
    if (
        not isinstance(shape, Sequence)
        or isinstance(shape, str)
        or len(shape) > 16
        or not all(type(size) is int and 0 <= size < 2**31 for size in shape)
    ):
        malformed(f"`shape` must be [N, {dims(spec.shape, ', ')}] in whole numbers.")
    found = tuple(shape)
    fits = found[1:] == spec.shape if datatype == "UINT8" else found[1:] in ((), (1,))
    if not fits or not found or found[0] < 1:
        raise ProtocolError(
            422,
            f"The model takes images of shape [N, {dims(spec.shape, ', ')}] (rows, height, width, "
            f"channels) in UINT8, or [N] image files in BYTES, with N at least 1; not {datatype} "
            f"{list(found)}.",
        )
    if found[0] > max_rows:
        raise ProtocolError(
            413, f"{found[0]} images are too many for one request; send at most {max_rows}."
        )
    return found


def known_input(name: object) -> None:
    """Refuse an input the model does not have.

    Raises:
        ProtocolError: 400.
    """
    if name != INPUT_NAME:
        malformed(f"Input {short(name)} is unknown; the model takes {INPUT_NAME!r}.")


def output_wish(name: object, parameters: Scalars, binary: bool, spec: ModelSpec) -> OutputWish:
    """How a requested output should come back.

    Args:
        name: As sent.
        parameters: Of that output.
        binary: What holds where the output itself does not say.
        spec: Has the classes.

    Raises:
        ProtocolError: 400, no such output, or a wrong parameter.
    """
    if name != OUTPUT_NAME:
        malformed(f"Output {short(name)} is unknown; the model gives {OUTPUT_NAME!r}.")
    if "shared_memory_region" in parameters:
        malformed("Shared memory is not offered; the tensor comes in the answer.")
    wanted = parameters.get("binary_data", binary)
    if not isinstance(wanted, bool):
        malformed("`binary_data` must be true or false.")
    classes = whole(parameters, "classification", 0, 2**31 - 1)
    return OutputWish(wanted, min(classes, len(spec.class_names)))


def split_elements(raw: bytes | memoryview, count: int) -> list[bytes]:
    """The elements of a BYTES tensor: each is its length (4 bytes, little-endian) and its bytes.

    Raises:
        ProtocolError: 400, the lengths do not add up.
    """
    elements: list[bytes] = []
    start, total = 0, len(raw)
    while start < total and len(elements) < count:
        if start + 4 > total:
            break
        (size,) = struct.unpack_from("<I", raw, start)
        start += 4
        if start + size > total:
            break
        elements.append(bytes(raw[start : start + size]))
        start += size
    if start != total or len(elements) != count:
        malformed(
            f"The BYTES tensor is not {count} elements of a 4-byte little-endian length and as "
            "many bytes each."
        )
    return elements


def decode_files(files: Sequence[bytes], spec: ModelSpec) -> Images:
    """The pixels of image files, one a row.

    Raises:
        ProtocolError: 400, 415 or 422, naming the row.
    """
    rows = np.empty((len(files), *spec.shape), np.uint8)
    for index, content in enumerate(files):
        try:
            rows[index] = decode_image(content, spec.shape)
        except ProtocolError as error:
            raise ProtocolError(error.status, f"Row {index}: {error.message}") from error
    return rows


def malformed(message: str) -> NoReturn:
    """Refuse with 400."""
    raise ProtocolError(400, message)


def short(value: object) -> str:
    """A value as it is quoted in an error."""
    return repr(value)[:60]


def dims(shape: tuple[int, ...], joint: str = "x") -> str:
    """A shape in words."""
    return joint.join(map(str, shape))
