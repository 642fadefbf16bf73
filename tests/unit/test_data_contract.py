"""Every row that breaks the contract is refused with its reason; good rows and their split stay."""

import io
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from rayloop.data import contract as contract_module
from rayloop.data.contract import (
    RowContract,
    RowRefused,
    as_pixels,
    check_pixels,
    choose_split,
    decode,
    row_digest,
)
from rayloop.data.sources import read_content

GREY = RowContract(shape=(4, 6, 1), class_names=("cat", "dog"))
COLOUR = RowContract(shape=(4, 6, 3), class_names=("cat", "dog"))


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    """An image as a file's bytes."""
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def noise(*shape: int) -> npt.NDArray[np.uint8]:
    """Random pixels."""
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def npy(values: npt.NDArray[Any]) -> bytes:
    """An array as a `.npy` file's bytes."""
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("label", "index"),
    [("cat", 0), ("dog", 1), (b"dog", 1), (0, 0), (1.0, 1), (np.int64(1), 1), ("1", None),
     ("Cat", None), (b"\xff", None), (2, None), (-1, None), (0.5, None), (None, None),
     (float("nan"), None), (float("inf"), None), ([0], None)],
)  # fmt: skip
def test_labels_by_index_or_by_name(label: Any, index: int | None) -> None:
    assert GREY.label_index(label) == index


@pytest.mark.parametrize("keep_bytes", [0, 1, 40, 0.9])
def test_a_truncated_png_is_undecodable(keep_bytes: float) -> None:
    whole = encoded(Image.fromarray(noise(40, 60)))
    cut = whole[: int(keep_bytes * len(whole)) if keep_bytes < 1 else int(keep_bytes)]
    with pytest.raises(RowRefused, match=r"^undecodable: "):
        read_content(cut)


@pytest.mark.parametrize("content", [b"no image at all", b"\x93NUMPY\x01\x00broken", None])
def test_what_is_no_image_is_undecodable(content: bytes | None) -> None:
    with pytest.raises(RowRefused, match=r"^undecodable: "):
        read_content(content)


def test_an_absurdly_large_image_is_refused_before_it_is_decoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(contract_module, "MAX_PIXELS", 23)
    with pytest.raises(RowRefused, match="undecodable: 6x4 pixels"):
        decode(encoded(Image.fromarray(noise(4, 6))))


def test_npy_content_is_read_as_an_array() -> None:
    assert np.array_equal(read_content(npy(noise(4, 6))), noise(4, 6))


@pytest.mark.parametrize("kind", ["PNG", "BMP"])
def test_files_that_lose_nothing_give_their_pixels(kind: str) -> None:
    for contract, image in ((GREY, noise(4, 6)), (COLOUR, noise(4, 6, 3))):
        pixels = as_pixels(decode(encoded(Image.fromarray(image), kind)), contract)
        assert pixels.shape == contract.shape
        assert np.array_equal(pixels.squeeze(), image)


@pytest.mark.parametrize(
    ("mode", "contract"),
    [("RGB", GREY), ("L", COLOUR), ("I;16", GREY), ("F", GREY), ("CMYK", COLOUR)],
)
def test_another_colour_mode_is_refused(mode: str, contract: RowContract) -> None:
    with pytest.raises(RowRefused, match=f"^wrong mode: {mode}, wanted "):
        as_pixels(Image.new(mode, (6, 4)), contract)


@pytest.mark.parametrize(
    ("mode", "shape"), [("RGB", (4, 6, 1)), ("L", (4, 6, 3)), ("CMYK", (4, 6, 3))]
)
def test_colour_modes_are_converted_where_the_contract_says_so(
    mode: str, shape: tuple[int, int, int]
) -> None:
    contract = RowContract(shape=shape, class_names=("a",), convert=True)
    assert as_pixels(Image.new(mode, (6, 4)), contract).shape == shape


@pytest.mark.parametrize("mode", ["P", "1", "RGBA", "LA"])
@pytest.mark.parametrize("contract", [GREY, COLOUR])
def test_palettes_and_transparency_are_converted(mode: str, contract: RowContract) -> None:
    assert as_pixels(Image.new(mode, (6, 4)), contract).shape == contract.shape


@pytest.mark.parametrize("size", [(6, 4), (3, 9), (30, 5), (1, 1)])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_resizing_covers_and_crops_to_the_contract(size: tuple[int, int], mode: str) -> None:
    contract = RowContract(shape=(4, 6, 3), class_names=("a",), resize=True)
    pixels = as_pixels(Image.new(mode, size, 255 if mode == "L" else (255, 255, 255)), contract)
    assert pixels.shape == contract.shape
    assert (pixels == 255).all()


def test_numbers_beyond_8_bits_are_refused_and_not_clipped_when_resizing() -> None:
    contract = RowContract(shape=(4, 6, 1), class_names=("a",), resize=True)
    with pytest.raises(RowRefused, match=r"^wrong mode: I;16, wanted L"):
        as_pixels(Image.new("I;16", (12, 8), 40_000), contract)


def test_the_crop_takes_the_middle() -> None:
    wide = np.zeros((4, 12), np.uint8)
    wide[:, 3:9] = 200
    contract = RowContract(shape=(4, 6, 1), class_names=("a",), resize=True)
    assert (as_pixels(Image.fromarray(wide), contract) == 200).all()


@pytest.mark.parametrize(
    ("pixels", "reason"),
    [
        (noise(6, 4), "wrong shape: (6, 4, 1), wanted (4, 6, 1)"),
        (noise(4, 6, 3), "wrong shape"),
        (noise(24), "wrong shape"),
        (np.full((4, 6), np.nan), "NaN or infinite pixel"),
        (np.full((4, 6), np.inf, np.float32), "NaN or infinite pixel"),
        (np.full((4, 6), -1), "out of range: pixels from -1 to -1"),
        (np.full((4, 6), 255.5), "out of range"),
        (np.full((4, 6), 256, np.int64), "out of range"),
        (np.full((4, 6), "x"), "wrong type"),
        (np.full((4, 6), True), "wrong type: bool, wanted uint8"),
    ],
)
def test_bad_arrays_are_refused_with_their_reason(pixels: npt.NDArray[Any], reason: str) -> None:
    with pytest.raises(RowRefused) as caught:
        check_pixels(pixels, GREY)
    assert str(caught.value).startswith(reason)


def test_whole_numbers_and_floats_in_range_are_rounded() -> None:
    values = np.linspace(0, 255, 24).reshape(4, 6)
    for given_values in (values, values.astype(np.float32), np.rint(values).astype(np.int32)):
        pixels = check_pixels(given_values, GREY)
        assert pixels.dtype == np.uint8
        assert np.array_equal(pixels[:, :, 0], np.rint(values))


def test_the_digest_sees_shape_and_pixels_and_not_the_memory_layout() -> None:
    image = noise(4, 6, 3)
    assert row_digest(image) == row_digest(np.asfortranarray(image))
    assert row_digest(image) != row_digest(image.reshape(6, 4, 3))
    other = image.copy()
    other[3, 5, 2] ^= 1
    assert row_digest(image) != row_digest(other)


DIGESTS = st.binary(min_size=32, max_size=32)
SHARES = st.floats(0.0, 0.45)


@given(DIGESTS, SHARES, SHARES)
def test_a_given_split_is_kept(digest: bytes, val_share: float, test_share: float) -> None:
    assert choose_split(digest, "test", val_share, test_share) == "test"
    assert choose_split(digest, "train", val_share, test_share) in ("train", "val")


@given(DIGESTS, SHARES, SHARES, st.floats(0.0, 0.05))
def test_a_larger_share_only_moves_rows_into_it(
    digest: bytes, val_share: float, test_share: float, more: float
) -> None:
    before = choose_split(digest, "", val_share, test_share)
    after = choose_split(digest, "", val_share, test_share + more)
    assert after == before or (before, after) == ("train", "test")


def test_the_shares_are_kept_by_many_rows() -> None:
    digests = [
        row_digest(np.array([[[index >> 8], [index & 255]]], np.uint8)) for index in range(4000)
    ]
    splits = [choose_split(digest, "", 0.1, 0.2) for digest in digests]
    assert abs(splits.count("val") / 4000 - 0.1) < 0.02
    assert abs(splits.count("test") / 4000 - 0.2) < 0.03


def test_the_split_of_a_known_image_never_moves() -> None:
    digest = row_digest(np.zeros((2, 2, 1), np.uint8))
    assert digest.hex()[:16] == "9c2e42a22bffbfb5"  # 0.610 of the way from 0 to 1
    assert choose_split(digest, "", 0.6, 0.0) == "train"
    assert choose_split(digest, "", 0.6, 0.05) == "test"
    assert choose_split(digest, "train", 0.62, 0.0) == "val"
