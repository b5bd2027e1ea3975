"""Pixels in 8 bits from the processor to the device, and there the numbers that the model is given.

An image processor resizes an image in 8 bits and then maps each of the 256 values of a channel to a number.
That takes most of its time, and makes of one byte four to be copied between processes and to the device. So
the processor stops before it, and the device looks the numbers up: they are the processor's own, bit by bit.
Whether this is how a processor works is found by trying it; where it is not, its own numbers stay.

Letters: K channels, R real tiles.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from partwise.records import Batch, Example, PixelTable

Rows = TypeVar("Rows", Example, Batch)

PIXELS = "pixel_values"
# Which of an image's tiles are no padding, (images, tiles): beside pixels that have some, not for a model.
REAL_TILES = "real_tiles"

STOP_BEFORE = {"do_rescale": False, "do_normalize": False}
# Adds 1 to each value: what is 0 then was put there as padding.
ADD_ONE = {"do_rescale": False, "do_normalize": True, "image_mean": (-1.0,) * 3, "image_std": (1.0,) * 3}

# The pictures on which a processor is tried: all values, in squares that even a small picture keeps.
NUM_PICTURES, SQUARES_PER_SIDE, SIDE = 4, 8, 512


def holds_pixels(tensor: Tensor) -> bool:
    """Of the image inputs of an example, pixels alone are bytes or no whole numbers."""
    return tensor.is_floating_point() or tensor.dtype == torch.uint8


def find_pixel_table(processor: Any) -> PixelTable | None:
    """How the processor's numbers follow from 8-bit pixels; None where that is not so, or cannot be tried."""
    image_processor = getattr(processor, "image_processor", None)
    if image_processor is None:
        return None
    pictures = trial_pictures()
    try:
        wanted = image_processor(images=pictures, return_tensors="pt")
        for has_padding in (False, True):
            options = processor_options(has_padding)
            made = to_bytes(image_processor(images=pictures, return_tensors="pt", **options), has_padding)
            if (table := read_table(made, wanted, has_padding)) is not None:
                return table
    except Exception:  # of a processor that takes no such options, or no such pictures, whatever it raises
        return None
    return None


def processor_options(has_padding: bool) -> dict[str, Any]:
    """What the image processor is called with to have its pixels in 8 bits."""
    return ADD_ONE if has_padding else STOP_BEFORE


def trial_pictures() -> list[Image.Image]:
    """Squares of all values, others in each channel; and wide noise, which may bring padding."""
    values = np.arange(256, dtype=np.uint8).reshape(NUM_PICTURES, SQUARES_PER_SIDE, SQUARES_PER_SIDE)
    channels = np.stack([values, np.roll(values, 1, axis=0), values.transpose(0, 2, 1)], axis=-1)
    size = SIDE // SQUARES_PER_SIDE
    pictures = [Image.fromarray(c.repeat(size, 0).repeat(size, 1)) for c in channels]
    noise = np.random.default_rng(0).integers(0, 200, (SIDE // 4, SIDE, 3), dtype=np.uint8)
    return [*pictures, Image.fromarray(noise)]


def to_bytes(media: Mapping[str, Tensor], has_padding: bool) -> dict[str, Tensor]:
    """What the processor made with `processor_options`, its pixels in 8 bits.

    Raises:
        ValueError: they are no 8-bit pixels in tiles of (K, height, width).
    """
    pixels = media[PIXELS]
    if not has_padding:
        if pixels.dtype != torch.uint8 or pixels.ndim < 4:
            raise ValueError(f"{PIXELS} are {pixels.dtype} of {pixels.ndim} axes, not 8-bit tiles")
        return dict(media)
    is_real = (pixels != 0).flatten(-3).any(-1)
    bytes_ = torch.where(is_real[..., None, None, None], pixels - 1, 0).to(torch.uint8)
    if pixels.ndim != 5 or not torch.equal(bytes_ + is_real[..., None, None, None].float(), pixels):
        raise ValueError(f"{PIXELS} are not 8-bit tiles of images")
    return {**media, PIXELS: bytes_, REAL_TILES: is_real}


def read_table(
    made: Mapping[str, Tensor], wanted: Mapping[str, Tensor], has_padding: bool
) -> PixelTable | None:
    """The table that gives all of `wanted` from `made`; None where none does, or not all values came up."""
    pixels, numbers = made[PIXELS], wanted[PIXELS]
    if made.keys() - {REAL_TILES} != wanted.keys() or pixels.shape != numbers.shape:
        return None
    if not all(torch.equal(made[name], wanted[name]) for name in wanted.keys() - {PIXELS}):
        return None
    is_real = made.get(REAL_TILES, torch.ones(pixels.shape[:-3], dtype=torch.bool))
    real_RKhw, numbers_RKhw = pixels[is_real], numbers[is_real]
    if any((channel.flatten().bincount(minlength=256) == 0).any() for channel in real_RKhw.unbind(1)):
        return None
    values = torch.zeros(pixels.shape[-3], 256, dtype=numbers.dtype)
    for of_channel, channel, those in zip(values, real_RKhw.unbind(1), numbers_RKhw.unbind(1), strict=True):
        of_channel[channel.flatten().long()] = those.flatten()
    table = PixelTable(tuple(map(tuple, values.tolist())), has_padding)
    restored = restore_pixels(made, table, numbers.dtype)[PIXELS]
    return table if torch.equal(restored, numbers) else None


def restore_pixels(media: Mapping[str, Tensor], table: PixelTable, dtype: torch.dtype) -> dict[str, Tensor]:
    """The image inputs as the model takes them, on the device where they lie, pixels in `dtype`."""
    pixels = media[PIXELS]
    restored = torch.empty_like(pixels, dtype=dtype)
    for channel, values in enumerate(lookup_table(table, pixels.device, dtype)):
        of_channel = pixels.select(-3, channel)
        looked_up = values.index_select(0, of_channel.flatten().int())
        restored.select(-3, channel).copy_(looked_up.view(of_channel.shape))
    if table.has_padding:
        restored.masked_fill_(~media[REAL_TILES][..., None, None, None], 0)
    return {name: tensor for name, tensor in media.items() if name != REAL_TILES} | {PIXELS: restored}


@lru_cache(maxsize=8)
def lookup_table(table: PixelTable, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(K, 256). Kept: to copy it anew would make the host wait in every micro-batch."""
    return torch.tensor(table.values, dtype=torch.float32).to(device, dtype)


def with_own_pixels(rows: Rows) -> Rows:
    """The example or batch with the processor's own pixels, for what changes them as numbers."""
    if rows.pixels is None:
        return rows
    return replace(rows, media=restore_pixels(rows.media, rows.pixels, torch.float32), pixels=None)
