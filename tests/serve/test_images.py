"""Pictures of clients: what is read, and that hostile ones cost no more than a refusal."""

from __future__ import annotations

import base64
import io
import random
import struct
import time
import tracemalloc
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from serve.images import image_of_url, read_image
from serve.schema import RequestError

MOST = 10**6


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def gradient(height: int = 16, width: int = 24) -> np.ndarray:
    ramp = np.linspace(0, 255, width, dtype=np.uint8)
    return np.stack(
        [np.tile(ramp, (height, 1)), np.full((height, width), 128, np.uint8)] + [np.tile(ramp, (height, 1))], 2
    )


def refusal(data: bytes, most: int = MOST) -> RequestError:
    with pytest.raises(RequestError) as refused:
        read_image(data, most)
    assert refused.value.param == "input_reference" and refused.value.status == 400
    return refused.value


def url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


@pytest.mark.parametrize(
    ("format", "options", "off"),
    [("PNG", {}, 0), ("PNG", {"interlace": 1}, 0), ("WEBP", {"lossless": True}, 0), ("JPEG", {"quality": 95}, 6)],
)
def test_pictures_are_read_as_rgb(format: str, options: dict, off: int) -> None:
    pixels = read_image(encoded(Image.fromarray(gradient()), format, **options), MOST)
    assert (pixels.dtype, pixels.shape) == (np.uint8, (16, 24, 3))
    assert np.abs(pixels.astype(int) - gradient()).max() <= off


def test_pictures_of_other_modes_look_as_they_are_shown() -> None:
    grey = gradient()[..., 0]
    assert np.array_equal(read_image(encoded(Image.fromarray(grey), "PNG"), MOST)[..., 1], grey)
    deep = read_image(encoded(Image.fromarray(grey.astype(np.uint16) * 257), "PNG"), MOST)
    assert np.array_equal(deep, np.repeat(grey[..., None], 3, 2))
    clear = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    assert (read_image(encoded(clear, "PNG"), MOST) == 255).all()  # not the red that nobody sees
    half = Image.new("RGBA", (16, 16), (0, 0, 0, 128))
    assert (np.abs(read_image(encoded(half, "PNG"), MOST).astype(int) - 127) <= 1).all()
    palette = Image.fromarray(gradient()).quantize(8)
    assert read_image(encoded(palette, "PNG", transparency=0), MOST).shape == (16, 24, 3)
    assert read_image(encoded(Image.fromarray(gradient()).convert("CMYK"), "JPEG"), MOST).shape == (16, 24, 3)
    assert read_image(encoded(Image.new("1", (16, 16), 1), "PNG"), MOST).min() == 255


def test_a_camera_that_was_held_upright_gives_an_upright_picture() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = read_image(encoded(Image.fromarray(gradient()), "JPEG", quality=95, exif=exif), MOST)
    assert pixels.shape == (24, 16, 3) and pixels[0].mean() < pixels[-1].mean() - 50


def test_two_pictures_of_one_camera_file_are_no_animation() -> None:
    both = encoded(Image.fromarray(gradient()), "MPO", save_all=True, append_images=[Image.new("RGB", (24, 16))])
    assert read_image(both, MOST).shape == (16, 24, 3)


def test_what_is_no_picture_or_another_one_is_refused() -> None:
    picture = Image.fromarray(gradient())
    assert "PNG, JPEG or WebP" in refusal(b"hello").message
    assert "empty" in refusal(b"").message
    for format in ("GIF", "BMP", "TIFF", "ICO", "PPM", "EPS", "PDF"):
        assert "PNG, JPEG or WebP" in refusal(encoded(picture, format)).message, format
    svg = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
    assert "PNG, JPEG or WebP" in refusal(svg).message
    for format in ("PNG", "WEBP"):
        moving = encoded(picture, format, save_all=True, append_images=[Image.new("RGB", (24, 16))])
        assert "animated" in refusal(moving).message, format
    assert "at least 8 a side" in refusal(encoded(Image.new("RGB", (7, 7)), "PNG")).message
    assert "no side longer than 8 times" in refusal(encoded(Image.new("RGB", (8, 65)), "PNG")).message


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_damaged_pictures_are_refused_wherever_they_end(format: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    whole = encoded(Image.fromarray(noise), format)
    for length in range(1, len(whole) - 20, max(1, len(whole) // 60)):
        refusal(whole[:length])
    dice = random.Random(0)
    for _ in range(300):
        bad = bytearray(whole)
        for _ in range(dice.randint(1, 8)):
            bad[dice.randrange(len(bad))] = dice.randrange(256)
        try:
            assert read_image(bytes(bad), MOST).shape[2] == 3
        except RequestError as error:
            assert error.param == "input_reference"


def test_a_bomb_is_refused_before_it_is_decoded() -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    bomb = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(10**7)))
        + chunk(b"IEND", b"")
    )
    text = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 16, 16, 8, 2, 0, 0, 0))
    text += chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**8), 1)) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    tracemalloc.start()
    began = time.perf_counter()
    refused = refusal(bomb)
    assert refused.code == "image_too_large"
    refusal(text)
    assert time.perf_counter() - began < 5
    assert tracemalloc.get_traced_memory()[1] < 150e6
    tracemalloc.stop()
    assert "has 100×100 pixels, at most 9999" in refusal(encoded(Image.new("RGB", (100, 100)), "PNG"), 9999).message
    assert read_image(encoded(Image.new("RGB", (100, 100)), "PNG"), 10_000).shape == (100, 100, 3)


def test_data_addresses_are_decoded_and_nothing_is_fetched() -> None:
    data = encoded(Image.fromarray(gradient()), "PNG")
    assert np.array_equal(image_of_url(url(data), 10**5, MOST), gradient())
    assert np.array_equal(image_of_url(url(data, "image/png;charset=utf-8"), 10**5, MOST), gradient())
    assert np.array_equal(image_of_url(url(data, ""), 10**5, MOST), gradient())
    for other in (
        "http://127.0.0.1/x.png",
        "https://box.test/x",
        "file:///etc/passwd",
        "/etc/passwd",
        "ftp://a",
        "",
        "DATA",
    ):
        with pytest.raises(RequestError, match="only data: addresses") as refused:
            image_of_url(other, 10**5, MOST)
        assert refused.value.code == "unsupported_image_url"
    for bad in ("data:", "data:image/png,abc", "data:image/png;base64", "data:" + "a/" * 10**5, "data:;;base64,AA"):
        with pytest.raises(RequestError, match="not a data: address"):
            image_of_url(bad, 10**5, MOST)
    for bad in (url(data)[:-1], url(data) + "\n", url(data)[:60] + "?" + url(data)[60:], "data:image/png;base64,é"):
        with pytest.raises(RequestError, match=r"base64|damaged"):
            image_of_url(bad, 10**5, MOST)
    with pytest.raises(RequestError, match="larger than 50 bytes"):
        image_of_url(url(data), 50, MOST)
