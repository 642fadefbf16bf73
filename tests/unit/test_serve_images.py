"""Image files become pixels, or a refusal that says why."""

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from rayloop.serve.images import decode_image
from rayloop.serve.multipart import file_field
from rayloop.serve.protocol.error import ProtocolError

GREY, COLOUR = (6, 5, 1), (6, 5, 3)
RNG = np.random.default_rng(0)
GREY_PIXELS = RNG.integers(0, 256, (6, 5), dtype=np.uint8)
COLOUR_PIXELS = RNG.integers(0, 256, (6, 5, 3), dtype=np.uint8)


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def status_of(content: bytes, shape: tuple[int, int, int]) -> int:
    with pytest.raises(ProtocolError) as caught:
        decode_image(content, shape)
    return caught.value.status


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_lossless_formats_keep_every_pixel(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    colour = encode(Image.fromarray(COLOUR_PIXELS), kind, **options)
    np.testing.assert_array_equal(decode_image(colour, COLOUR), COLOUR_PIXELS)
    grey = encode(Image.fromarray(GREY_PIXELS), kind, **options)
    np.testing.assert_array_equal(decode_image(grey, GREY)[..., 0], GREY_PIXELS)


def test_jpeg_is_decoded_as_pillow_does() -> None:
    content = encode(Image.fromarray(COLOUR_PIXELS), "JPEG", quality=95)
    expected = np.asarray(Image.open(io.BytesIO(content)))
    np.testing.assert_array_equal(decode_image(content, COLOUR), expected)


def test_conversions_that_lose_nothing_are_made() -> None:
    grey = Image.fromarray(GREY_PIXELS)
    np.testing.assert_array_equal(
        decode_image(encode(grey), COLOUR), np.repeat(GREY_PIXELS[..., None], 3, 2)
    )
    for mode in ("RGB", "RGBA", "LA"):
        content = encode(grey.convert(mode))
        np.testing.assert_array_equal(decode_image(content, GREY)[..., 0], GREY_PIXELS)
    palette = Image.fromarray(COLOUR_PIXELS // 128 * 255).quantize(8, dither=Image.Dither.NONE)
    np.testing.assert_array_equal(
        decode_image(encode(palette), COLOUR), np.asarray(palette.convert("RGB"))
    )
    black_and_white = Image.fromarray(GREY_PIXELS).convert("1")
    assert set(np.unique(decode_image(encode(black_and_white), GREY))) <= {0, 255}


def test_what_would_lose_information_is_refused() -> None:
    assert status_of(encode(Image.fromarray(COLOUR_PIXELS)), GREY) == 422
    transparent = np.concatenate([COLOUR_PIXELS, GREY_PIXELS[..., None]], 2)
    assert status_of(encode(Image.fromarray(transparent)), COLOUR) == 422
    deep = Image.fromarray(GREY_PIXELS.astype(np.uint16) * 257)
    assert status_of(encode(deep), GREY) == 422
    cmyk = Image.fromarray(COLOUR_PIXELS).convert("CMYK")
    assert status_of(encode(cmyk, "JPEG"), COLOUR) == 422
    frames = [Image.fromarray(COLOUR_PIXELS), Image.fromarray(COLOUR_PIXELS[::-1].copy())]
    moving = encode(frames[0], "WEBP", save_all=True, append_images=frames[1:])
    assert status_of(moving, COLOUR) == 422


def test_another_size_is_refused_with_the_size_to_send() -> None:
    content = encode(Image.fromarray(COLOUR_PIXELS[:5]))
    with pytest.raises(ProtocolError, match="5x5 pixels.*takes 5x6") as caught:
        decode_image(content, COLOUR)
    assert caught.value.status == 422


def test_other_formats_and_garbage_are_unsupported_media() -> None:
    assert status_of(b"", GREY) == 400
    assert status_of(b"hello", GREY) == 415
    for kind in ("GIF", "BMP", "TIFF"):
        assert status_of(encode(Image.fromarray(GREY_PIXELS), kind), GREY) == 415


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_file_cut_short_is_malformed(kind: str) -> None:
    large = RNG.integers(0, 256, (60, 50, 3), dtype=np.uint8)
    content = encode(Image.fromarray(large), kind)
    for end in (13, 30, len(content) // 2):
        assert status_of(content[:end], (60, 50, 3)) == 400


def chunk(kind: bytes, content: bytes) -> bytes:
    body = kind + content
    return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))


def test_a_decompression_bomb_is_refused_by_its_header() -> None:
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(10)))
    assert status_of(bomb, COLOUR) == 422


@settings(max_examples=200)
@given(
    kind=st.sampled_from(["PNG", "JPEG", "WEBP"]),
    place=st.integers(0, 400),
    byte=st.integers(0, 255),
)
def test_a_damaged_byte_never_breaks_the_decoder(kind: str, place: int, byte: int) -> None:
    content = bytearray(encode(Image.fromarray(COLOUR_PIXELS), kind))
    content[place % len(content)] = byte
    try:
        assert decode_image(bytes(content), COLOUR).shape == COLOUR
    except ProtocolError as error:
        assert error.status in (400, 415, 422)


def form(*parts: tuple[str, bytes], boundary: str = "xyz", end: bool = True) -> bytes:
    body = b"".join(
        f"--{boundary}\r\n".encode()
        + f'Content-Disposition: form-data; name="{name}"; filename="f"\r\n\r\n'.encode()
        + content
        + b"\r\n"
        for name, content in parts
    )
    return body + (f"--{boundary}--\r\n".encode() if end else b"")


def test_the_field_called_file_is_found() -> None:
    content = bytes(range(256)) * 3
    body = form(("other", b"1"), ("file", content))
    assert file_field('multipart/form-data; boundary="xyz"', body) == content


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("multipart/form-data", form(("file", b"1"))),
        ("multipart/form-data; boundary=abc", form(("file", b"1"))),
        ("multipart/form-data; boundary=xyz", form(("picture", b"1"))),
        ("multipart/form-data; boundary=xyz", form(("file", b"1"), ("file", b"2"))),
        ("multipart/form-data; boundary=xyz", form(("file", b"1"), end=False)),
        ("multipart/form-data; boundary=xyz", b"garbage"),
        ("multipart/form-data; boundary=xyz", b""),
    ],
)
def test_a_broken_form_is_malformed(content_type: str, body: bytes) -> None:
    with pytest.raises(ProtocolError) as caught:
        file_field(content_type, body)
    assert caught.value.status == 400
