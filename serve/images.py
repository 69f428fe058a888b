"""Pictures that clients send, decoded so that a hostile one costs no more than a plain refusal.

H × W pixels.
"""

from __future__ import annotations

import base64
import binascii
import io
import re
import warnings

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from serve.schema import RequestError

PARAM = "input_reference"
FORMATS = ("PNG", "JPEG", "WEBP")
#: Two frames in one JPEG are no animation: so cameras store a preview. The first is the picture.
_STILL_WITH_MORE = "MPO"
#: What is longer would be scaled up to many times the video's size before it is cut.
MAX_ASPECT = 8
MIN_SIDE = 8
_DATA_URL = re.compile(r"data:(?P<type>[\w.+-]+/[\w.+-]+)?(?:;[\w.+-]+=[\w.+-]+)*(?P<base64>;base64)?,", re.ASCII)


def read_image(data: bytes, max_pixels: int) -> NDArray[np.uint8]:
    """A PNG, JPEG or WebP as RGB [H, W, 3], upright, transparent parts on white.

    The size is read from the header before anything is decoded. Blocks (a second for 30 million pixels): call it from a
    thread. Raises RequestError: another format, animated, damaged, too large, too small or too long.
    """
    if not data:
        raise _refused("the picture is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own, weaker, limit of pixels
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            _check_header(image, max_pixels)
            image.load()
            return np.ascontiguousarray(_rgb(image))
    except RequestError:
        raise
    except Image.DecompressionBombError:
        raise _refused(f"the picture has more than {max_pixels} pixels", code="image_too_large") from None
    except Image.UnidentifiedImageError:
        raise _refused("not a picture that can be read: send a PNG, JPEG or WebP file") from None
    except Exception:
        # decoders meet hostile bytes with errors of many types: OSError, SyntaxError, struct.error, zlib.error, …
        raise _refused("the picture is damaged or cut off") from None


def image_of_url(url: str, max_bytes: int, max_pixels: int) -> NDArray[np.uint8]:
    """The picture of a data: address with base64. Nothing is ever fetched. Raises RequestError as `read_image` does."""
    if not url.startswith("data:"):
        message = "only data: addresses are taken (data:image/png;base64,…); the server fetches nothing"
        raise _refused(message, code="unsupported_image_url")
    head = _DATA_URL.match(url, 0, 256)
    if head is None or head["base64"] is None:
        raise _refused("not a data: address with base64: expected data:image/png;base64,…")
    if (len(url) - head.end()) * 3 // 4 > max_bytes:
        raise _refused(f"the picture is larger than {max_bytes} bytes", code="image_too_large")
    try:
        data = base64.b64decode(url[head.end() :], validate=True)
    except (binascii.Error, ValueError):
        raise _refused("the data: address is not valid base64") from None
    return read_image(data, max_pixels)


def _check_header(image: Image.Image, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        message = f"the picture has {width}×{height} pixels, at most {max_pixels} are taken"
        raise _refused(message, code="image_too_large")
    if min(width, height) < MIN_SIDE or max(width, height) > MAX_ASPECT * min(width, height):
        raise _refused(
            f"the picture has {width}×{height} pixels: expected at least {MIN_SIDE} a side, and no side longer than "
            f"{MAX_ASPECT} times the other"
        )
    if getattr(image, "n_frames", 1) > 1 and image.format != _STILL_WITH_MORE:
        raise _refused("the picture is animated: send a still one")


def _rgb(image: Image.Image) -> NDArray[np.uint8]:
    """[H, W, 3] of a decoded picture of any mode."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow would clip to 8
        grey = (np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(ground, image)
    return np.asarray(image.convert("RGB"))


def _refused(message: str, code: str = "invalid_image") -> RequestError:
    return RequestError(message, param=PARAM, code=code)
