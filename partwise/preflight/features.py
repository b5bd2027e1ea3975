"""Is what the frozen vision tower makes of images in the feature cache, and does the rest fit on the disk?

In: a Context. Out: one finding, of images of the rows that were read. Nothing is made or written here.
"""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

import torch

from partwise.data.features import FeatureStore, known_image
from partwise.data.rows import count_images, row_name
from partwise.data.scan import scanned_indices
from partwise.errors import DataError
from partwise.model.tower import Cut
from partwise.preflight.context import Context
from partwise.preflight.memory import image_tiles
from partwise.preflight.output import nearest_existing
from partwise.records import Finding
from partwise.tables import format_bytes
from partwise.training.job import Job


def check_features(context: Context) -> list[Finding]:
    """How many images are in the feature cache, and how much the others will take.

    Raises:
        ConfigError: the features of this model type cannot be kept.
        DataError: a data file is missing or broken.
    """
    job, config = context.job, context.config
    if job.store is None or job.cut is None:
        return []
    where = config.where("data.feature_cache")
    kept, missing = count_kept(context, job.store)
    num_read = kept + missing
    folder = str(job.store.folder)
    if num_read == 0:
        return [Finding("features", "info", "none of the rows that were read has an image to keep", where)]
    text = f"{folder} has {kept:,} of {count_images(num_read)} of the rows that were read"
    values = {"num_kept": kept, "num_read": num_read}
    if not missing:
        told = "; no step runs the vision tower" if job.features else "; training looks for the others first"
        return [Finding("features", "info", text + told, where, values=values)]
    rows = [job.rows, *([job.eval_rows] if job.eval_rows else [])]
    num_scanned = sum(min(len(some), context.max_rows or len(some)) for some in rows)
    scale = sum(map(len, rows)) / num_scanned
    needed = int(missing * scale * bytes_per_image(context, job.cut))
    free = shutil.disk_usage(nearest_existing(Path(folder))).free
    text += (
        f"; training makes the others first, about {format_bytes(needed)} for all rows; "
        f"{format_bytes(free)} are free"
    )
    values |= {"missing_bytes": needed, "free_bytes": free}
    if needed < free:
        return [Finding("features", "info", text, where, values=values)]
    fix = "Free space, name a folder on another disk, or train without data.feature_cache."
    return [Finding("features", "error", text, where, fix, values)]


def count_kept(context: Context, store: FeatureStore) -> tuple[int, int]:
    """Images of the rows that were read: how many different ones are in the cache, and how many are not."""
    job, found = context.job, {}
    for rows in filter(None, (job.rows, job.eval_rows)):
        for index in scanned_indices(len(rows), context.max_rows):
            with suppress(DataError):  # another check says so
                conversation = rows[index]
                row = row_name(conversation.source, conversation.row)
                for image in conversation.images:
                    key, _ = known_image(image, row)
                    found[key] = store.path(key).is_file()
    kept = sum(found.values())
    return kept, len(found) - kept


def bytes_per_image(context: Context, cut: Cut) -> float:
    """The mean over the images of the rows that were read, from shapes alone."""
    job = context.job
    scans = filter(None, (context.train_scan, context.eval_scan))
    sizes = [size for scan in scans for row in scan.rows for size in row.image_sizes]
    of_size = {size: image_tiles(job.processor, size) for size in set(sizes)}
    tile_bytes = {shape: bytes_of_tile(job, cut, shape) for shape, _ in of_size.values()}
    total = sum(tile_bytes[of_size[size][0]] * of_size[size][1] for size in sizes)
    return total / len(sizes) if sizes else 0.0


def bytes_of_tile(job: Job, cut: Cut, shape: tuple[int, ...]) -> int:
    """Of a tile of (channels, height, width)."""
    tower = job.empty_model.get_submodule(cut.path)
    pixels = torch.empty(1, *shape, device="meta")
    features = cut.features(tower(pixel_values=pixels, output_hidden_states=True))
    dtype: torch.dtype = getattr(torch, job.config.model.dtype)
    return features.numel() * dtype.itemsize
