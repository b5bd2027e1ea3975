"""The feature cache of a run, filled: the tower runs once over each image that is not in it.

In: a Job. Out: features of all images of its training and evaluation rows on disk. Workers read and decode;
the tower alone is on the device. What is there already is read, checked and kept, so that a fill that was
stopped goes on where it was. Ranks fill a share each.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from torch import Tensor

from partwise.data.features import PIXELS, FeatureStore, StoredImage, known_image, process_image
from partwise.data.images import decode_picture
from partwise.data.loader import in_order
from partwise.data.rows import row_name
from partwise.data.sources import Rows
from partwise.model.tower import Cut, read_tower
from partwise.records import Conversation
from partwise.tables import format_bytes, format_seconds

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from partwise.training.job import Job

# Tiles that the tower sees at once, and how far apart lines about the progress are.
NUM_TILES = 16
LINE_SECONDS = 10.0


@dataclass(frozen=True)
class NewImage:
    """An image that is not in the cache, as the processor made it."""

    key: str
    made: dict[str, Tensor]


@dataclass
class Filled:
    """What a rank found and made. `tower_seconds` are those of the tower, for `num_made` images."""

    num_images: int = 0
    num_made: int = 0
    num_bytes: int = 0
    tower_seconds: float = 0.0


class RowImages:
    """Row -> its images: the key of each that is in the cache, a NewImage of each that is not."""

    def __init__(self, rows: Sequence[Conversation], store: FeatureStore, processor: Any) -> None:
        self.rows = rows
        self.store = store
        self.processor = processor

    def __call__(self, index: int) -> list[str | NewImage]:
        conversation = self.rows[index]
        row = row_name(conversation.source, conversation.row)
        found: list[str | NewImage] = []
        for image in conversation.images:
            key, image = known_image(image, row)
            if self.store.read(key) is not None:
                found.append(key)
            else:
                picture = decode_picture(image, row).pixels
                found.append(NewImage(key, process_image(self.processor, picture, row)))
        return found


class TowerRun:
    """The tower, opened for the first image, and the store that what it makes goes to."""

    def __init__(self, job: Job, cut: Cut, store: FeatureStore, filled: Filled) -> None:
        self.job = job
        self.cut = cut
        self.store = store
        self.filled = filled
        self.waiting: list[NewImage] = []
        self.num_tiles = 0

    @cached_property
    def tower(self) -> PreTrainedModel:
        job, settings = self.job, self.job.config.model
        dtype = getattr(torch, settings.dtype)
        tower = read_tower(job.model_folder, job.empty_model, self.cut, dtype, settings.attention)
        return tower.to(job.device)

    def add(self, image: NewImage) -> None:
        """Raises: TrainingError: the disk refuses."""
        self.waiting.append(image)
        self.num_tiles += tiles_of(image).shape[0]
        if self.num_tiles >= NUM_TILES:
            self.flush()

    def flush(self) -> None:
        """Make and keep the features of all images that wait. Raises: TrainingError: the disk refuses."""
        start = time.monotonic()
        tiles = [tiles_of(image) for image in self.waiting]
        made = [self._features(some) for some in torch.cat(tiles).split(NUM_TILES)] if tiles else []
        features = torch.cat(made).split([len(some) for some in tiles]) if made else ()
        self.filled.tower_seconds += time.monotonic() - start
        for image, own in zip(self.waiting, features, strict=True):
            shape = tuple(image.made[PIXELS].shape)
            facts = {name: tensor for name, tensor in image.made.items() if name != PIXELS}
            stored = StoredImage(own.reshape(*shape[:-3], *own.shape[1:]), shape, facts)
            self.filled.num_bytes += self.store.write(image.key, stored)
            self.filled.num_made += 1
        self.waiting, self.num_tiles = [], 0

    @torch.no_grad()
    def _features(self, tiles: Tensor) -> Tensor:
        pixels = tiles.to(self.tower.device, self.tower.dtype)
        return self.cut.features(self.tower(pixel_values=pixels, output_hidden_states=True)).cpu()


def tiles_of(image: NewImage) -> Tensor:
    """(N, channels, height, width)."""
    return image.made[PIXELS].flatten(0, -4)


def fill_cache(job: Job, console: Console, again: bool = False) -> None:
    """Fill the run's cache with what is missing. All ranks must call it.

    Nothing is looked at where all images of these data files were there once, except with `again`.

    Raises:
        ConfigError: the model's tower cannot be kept apart.
        DataError: a row or an image cannot be used.
        TrainingError: the disk refuses.
    """
    store, cut = job.store, job.cut
    if store is None or cut is None:
        return
    if not again and job.ranks.from_first(store.has_all(job.data_fingerprint)):
        return
    start = time.monotonic()
    store.sweep()
    console.print(f"features of the images of {len(all_rows(job)):,} rows, in {store.folder}")
    shares = job.ranks.gather(fill_share(job, store, cut, console))
    if job.ranks.is_first:
        num_images = len(set().union(*(keys for keys, _ in shares)))
        store.describe(num_images, job.data_fingerprint)
        tell_end(job, num_images, [filled for _, filled in shares], time.monotonic() - start, console)
    job.ranks.barrier()


def fill_share(job: Job, store: FeatureStore, cut: Cut, console: Console) -> tuple[set[str], Filled]:
    """Make what is missing of this rank's rows; the keys of their images, and what was made."""
    rows, filled, keys = all_rows(job), Filled(), set[str]()
    run = TowerRun(job, cut, store, filled)
    mine = range(job.ranks.rank, len(rows), job.ranks.size)
    images = in_order(RowImages(rows, store, job.processor), mine, job.config.data.num_workers)
    for found in told(images, len(mine), filled, console):
        for image in found:
            if isinstance(image, NewImage) and image.key not in keys:
                run.add(image)
            keys.add(image.key if isinstance(image, NewImage) else image)
        filled.num_images = len(keys)
    run.flush()
    return keys, filled


def all_rows(job: Job) -> Rows:
    """The training rows and the evaluation rows after them."""
    return Rows([*job.rows.files, *(job.eval_rows.files if job.eval_rows else ())])


def told(
    images: Iterator[list[str | NewImage]], num_rows: int, filled: Filled, console: Console
) -> Iterator[list[str | NewImage]]:
    """The same, with a line now and then about how far it is."""
    start = last = time.monotonic()
    for done, found in enumerate(images, start=1):
        yield found
        now = time.monotonic()
        if now - last > LINE_SECONDS:
            last, left = now, (now - start) / done * (num_rows - done)
            console.print(
                f"row {done:,}/{num_rows:,}  {filled.num_made:,} of {filled.num_images:,} images made  "
                f"{filled.num_made / (now - start):.1f} images/s  left {format_seconds(left)}"
            )


def tell_end(job: Job, num_images: int, filled: list[Filled], seconds: float, console: Console) -> None:
    num_made, num_bytes = sum(f.num_made for f in filled), sum(f.num_bytes for f in filled)
    text = f"features of {num_images:,} images are in the cache; {num_made:,} were made"
    if num_made:
        each = sum(f.tower_seconds for f in filled) / num_made
        rows = job.config.train.global_batch_size / job.ranks.size
        step = each * rows * num_images / len(all_rows(job))
        text += (
            f" in {format_seconds(seconds)}, {format_bytes(num_bytes)}; the tower took "
            f"{format_seconds(each)} for an image, which spares a step about {format_seconds(step)}"
        )
    console.print(text)
