"""Turn a PNG, JPEG or WebP file into the pixels a model takes, refusing any loss of information.

Conversions that lose nothing are made: a palette is looked up, an alpha channel that is opaque
throughout is dropped, grey becomes RGB with equal channels, and RGB with equal channels becomes
grey. What would lose something is refused with 422: colour for a grey model, transparency, 16 bits,
another size, several frames. EXIF orientation is not applied: pixels are taken as stored.
"""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rayloop.serve.protocol.error import ProtocolError

MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA"}


def decode_image(content: bytes, shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    """Pixels uint8 [H, W, C] of an image file of exactly the model's size.

    Args:
        content: The file.
        shape: Height, width and channels (1 or 3) the model takes.

    Raises:
        ProtocolError: 400 damaged or empty, 415 another format, 422 refused with the remedy.
    """
    if not content:
        raise ProtocolError(400, "The image is empty; send the bytes of a PNG, JPEG or WebP file.")
    kind = sniff(content)
    image = _open(content, kind)
    _check_size(image, shape)
    if kind == "PNG" and content[24:25] == b"\x10":
        raise ProtocolError(422, "The PNG has 16 bits a channel; convert it to 8 bits.")
    if getattr(image, "n_frames", 1) > 1:
        raise ProtocolError(422, "The image has several frames; send one.")
    if image.mode not in MODES:
        raise ProtocolError(
            422, f"The image has colour mode {image.mode}; convert it to 8-bit grey or RGB."
        )
    try:
        image.load()
        pixels = np.asarray(image.convert("RGBA"))
    except Exception as error:  # decoders raise many kinds; each means a damaged file
        raise ProtocolError(400, f"The {kind} is damaged or cut short: {error}.") from error
    return _fit_channels(pixels, shape[2])


def sniff(content: bytes) -> str:
    """The image format by its first bytes.

    Raises:
        ProtocolError: 415, it is none of the three.
    """
    if content.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if content.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "WEBP"
    raise ProtocolError(
        415, "The body is neither PNG, JPEG nor WebP; send one of these, or use the V2 protocol."
    )


def _open(content: bytes, kind: str) -> Image.Image:
    try:
        return Image.open(io.BytesIO(content), formats=(kind,))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ProtocolError(422, "The image has far too many pixels; resize it.") from None
    except Exception as error:  # decoders raise many kinds; each means a damaged file
        raise ProtocolError(400, f"The {kind} is damaged or cut short: {error}.") from error


def _check_size(image: Image.Image, shape: tuple[int, int, int]) -> None:
    width, height = image.size
    if (height, width) != shape[:2]:
        raise ProtocolError(
            422,
            f"The image is {width}x{height} pixels (width x height); the model takes "
            f"{shape[1]}x{shape[0]}. Resize it before sending.",
        )


def _fit_channels(pixels: NDArray[np.uint8], channels: int) -> NDArray[np.uint8]:
    if pixels[..., 3].min() < 255:
        raise ProtocolError(
            422, "The image is partly transparent; flatten it onto a background of your choice."
        )
    if channels == 3:
        return np.ascontiguousarray(pixels[..., :3])
    red, green, blue = pixels[..., 0], pixels[..., 1], pixels[..., 2]
    if not (np.array_equal(red, green) and np.array_equal(green, blue)):
        raise ProtocolError(
            422, "The image is in colour and the model takes grey; convert it to 8-bit grey."
        )
    return np.ascontiguousarray(red[..., None])
