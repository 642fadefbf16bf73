"""The row contract: one raw row -> a uint8 image with a known label, or why it is refused."""

import hashlib
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

Pixels = npt.NDArray[np.uint8]

MAX_PIXELS = 64_000_000
"""Images with more pixels than this are refused before they are decoded."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RowContract:
    """What every row of a dataset must look like.

    Attributes:
        shape: Height, width and channels of an image.
        class_names: Labels that are allowed, in index order.
        resize: Resize and centre-crop images to `shape` before the check; else a wrong size is
            refused.
        convert: Bring images to the colour mode of `shape`; else one of another mode is refused.
    """

    shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    resize: bool = False
    convert: bool = False

    def label_index(self, label: Any) -> int | None:
        """The class index of a label given by index or by name; None when it is unknown."""
        if isinstance(label, bytes):
            label = label.decode(errors="replace")
        if isinstance(label, str):
            return self.class_names.index(label) if label in self.class_names else None
        if not isinstance(label, (int, float, np.number)) or not np.isfinite(label):
            return None
        index = int(label)
        return index if index == label and 0 <= index < len(self.class_names) else None


class RowRefused(ValueError):
    """A row breaks the contract; the text is the reason, the part before ':' its kind."""


def decode(content: bytes) -> Image.Image:
    """Decode an image file.

    Raises:
        RowRefused: The bytes are not a whole image, or it is absurdly large.
    """
    try:
        image = Image.open(io.BytesIO(content))
        if image.width * image.height > MAX_PIXELS:
            raise RowRefused(f"undecodable: {image.width}x{image.height} pixels is over the limit")
        image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, RowRefused):
            raise
        raise RowRefused(f"undecodable: {error}") from None
    return image


def as_pixels(image: Image.Image, contract: RowContract) -> Pixels:
    """An image in the contract's colour mode, and size where the contract resizes.

    Raises:
        RowRefused: A colour mode that the contract does not convert, or one of more than 8 bits,
            which would be clipped.
    """
    height, width, channels = contract.shape
    mode = "L" if channels == 1 else "RGB"
    accepted = {mode, "P", "1", "RGBA", "LA"}
    if contract.resize or contract.convert:
        accepted |= {"L", "RGB", "CMYK", "YCbCr"}
    if image.mode not in accepted:
        raise RowRefused(f"wrong mode: {image.mode}, wanted {mode}")
    if contract.resize:
        image = _resize_and_crop(image.convert(mode), height, width)
    pixels = np.asarray(image.convert(mode), dtype=np.uint8)
    return pixels.reshape(*pixels.shape[:2], channels)


def _resize_and_crop(image: Image.Image, height: int, width: int) -> Image.Image:
    """Scale so that the image covers height x width, then cut out the middle."""
    scale = max(height / image.height, width / image.width)
    size = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    image = image.resize(size, Image.Resampling.BILINEAR)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def check_pixels(pixels: npt.NDArray[Any], contract: RowContract) -> Pixels:
    """An array as uint8 pixels (H, W, C).

    Floats are accepted when they are finite and from 0 to 255, and are rounded.

    Raises:
        RowRefused: NaN or infinite, outside 0..255, or another shape than the contract's.
    """
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    if tuple(pixels.shape) != contract.shape:
        raise RowRefused(f"wrong shape: {tuple(pixels.shape)}, wanted {contract.shape}")
    if pixels.dtype == np.uint8:
        return pixels
    if not np.issubdtype(pixels.dtype, np.number):
        raise RowRefused(f"wrong type: {pixels.dtype}, wanted uint8")
    if not np.isfinite(pixels).all():
        raise RowRefused("NaN or infinite pixel")
    if pixels.min() < 0 or pixels.max() > 255:
        raise RowRefused(f"out of range: pixels from {pixels.min():g} to {pixels.max():g}")
    rounded: Pixels = np.rint(pixels).astype(np.uint8)
    return rounded


def row_digest(pixels: Pixels) -> bytes:
    """SHA-256 over an image's shape and pixels: what decides its split and its identity."""
    head = ",".join(map(str, pixels.shape)).encode()
    return hashlib.sha256(head + b":" + np.ascontiguousarray(pixels).tobytes()).digest()


def choose_split(digest: bytes, given: str, val_share: float, test_share: float) -> str:
    """The split of a row, from its content alone, so that it never moves when data is added.

    Args:
        digest: The row's content digest; its first 8 bytes are read as a number in [0, 1).
        given: Split the source names, `train` or `test`, or empty. A given test row stays in the
            test split, and a given training row goes to `train` or `val`.
        val_share: Share of rows for validation.
        test_share: Share of rows for the test split where none is given.
    """
    if given == "test":
        return "test"
    position = int.from_bytes(digest[:8], "big") / 2**64
    if position < val_share:
        return "val"
    return "test" if not given and position < val_share + test_share else "train"
