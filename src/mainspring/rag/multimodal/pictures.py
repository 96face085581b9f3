"""Pictures as arrays: decoded under a limit, transparency on white, fitted into the square that an encoder reads."""

from __future__ import annotations

import io
import warnings

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from mainspring.errors import DocumentError

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".gif", ".webp", ".bmp", ".tif", ".tiff"})
MAX_PIXELS = 50_000_000  # a small file may unfold to any size
_FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF")


def open_picture(data: bytes, name: str) -> Image.Image:
    """The (first) picture in a file's bytes as RGB, what is transparent in white.

    Raises DocumentError if it is none, damaged, or has more than MAX_PIXELS.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit here is ours
            picture = Image.open(io.BytesIO(data), formats=_FORMATS)
        if picture.width * picture.height > MAX_PIXELS:
            raise DocumentError(
                f"{name} has {picture.width} x {picture.height} pixels; at most {MAX_PIXELS} are read: scale it down"
            )
        layered = picture.convert("RGBA")
    except DocumentError:
        raise
    except UnidentifiedImageError as error:  # Pillow's message names a buffer
        kinds = ", ".join(_FORMATS)
        raise DocumentError(f"{name} is not a picture that can be read: it is none of {kinds}") from error
    except Exception as error:  # Pillow's plugins raise bare exceptions on damaged files
        raise DocumentError(f"{name} is not a picture that can be read: {error}") from error
    white = Image.new("RGBA", layered.size, "white")
    return Image.alpha_composite(white, layered).convert("RGB")


def fit_square(picture: Image.Image, size: int) -> npt.NDArray[np.uint8]:
    """The whole picture, its sides in proportion, in the middle of a white square: [size, size, 3]."""
    scale = size / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    small = picture.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3.0)
    square = Image.new("RGB", (size, size), "white")
    square.paste(small, ((size - width) // 2, (size - height) // 2))
    return np.asarray(square)
