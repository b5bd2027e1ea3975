"""An image of a row -> a decoded RGB picture.

In: records.Image (a path, encoded bytes or a PIL image). Out: PIL RGB, upright, 8 bits per channel. No
resizing and no normalisation: the model's own processor does both. Of an animation, the first frame.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image as PILImage
from PIL import ImageOps, UnidentifiedImageError

from partwise.errors import DataError
from partwise.records import Image

EXIF_ORIENTATION = 0x0112


@dataclass(frozen=True)
class Picture:
    """A decoded image, and whether its EXIF tag had it turned."""

    pixels: PILImage.Image
    is_turned: bool


def decode_image(image: Image, row: str) -> PILImage.Image:
    """The pixels of `decode_picture`."""
    return decode_picture(image, row).pixels


def decode_picture(image: Image, row: str) -> Picture:
    """The picture as RGB: turned upright by its EXIF tag, transparency laid on white, 16 bits scaled to 8.

    Raises:
        DataError: the file is missing or broken, or the picture is too large to be decoded safely. `row`
            names the row in the text.
    """
    name = f'{row}: image "{image.where}"'
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", PILImage.DecompressionBombWarning)
            picture = _open(image, name)
            is_turned = picture.getexif().get(EXIF_ORIENTATION, 1) in range(2, 9)
            return Picture(_to_rgb(ImageOps.exif_transpose(picture)), is_turned)
    except (PILImage.DecompressionBombError, PILImage.DecompressionBombWarning):
        raise DataError(
            f"{name} has more than {PILImage.MAX_IMAGE_PIXELS} pixels. Scale it down before training."
        ) from None
    except UnidentifiedImageError:
        raise DataError(
            f"{name} is not in an image format that can be read. Save it as PNG or JPEG."
        ) from None
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(f"{name} is broken: {error}. Save it again, or remove the row.") from None


def _open(image: Image, name: str) -> PILImage.Image:
    if isinstance(image.source, PILImage.Image):
        return image.source
    if isinstance(image.source, bytes):
        return PILImage.open(io.BytesIO(image.source))
    if not Path(image.source).is_file():
        raise DataError(
            f"{name} does not exist: looked for {image.source}. Paths are relative to the data file's folder."
        )
    return PILImage.open(image.source)


def _to_rgb(picture: PILImage.Image) -> PILImage.Image:
    if picture.mode.startswith(("I", "F")):
        picture = _to_8_bits(picture)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = PILImage.new("RGBA", picture.size, "white")
        picture = PILImage.alpha_composite(white, picture)
    return picture.convert("RGB")


def _to_8_bits(picture: PILImage.Image) -> PILImage.Image:
    """Gray of 16 bits as 8 bits; Pillow's own conversion would clip at 255 instead of scaling.

    Raises:
        ValueError: the values are not those of 16 bits, so that their scale is unknown.
    """
    pixels = np.asarray(picture)
    if picture.mode == "F" or pixels.min() < 0 or pixels.max() > 65535:
        raise ValueError("its pixels are not 8 or 16 bits wide")
    return PILImage.fromarray((pixels // 257).astype(np.uint8))
