"""What a frozen vision tower makes of images, kept on disk: a file an image, known by the image's bytes.

In: images, and what their features depend on beside them. Out: the features with all else that the processor
made of an image, so that a row becomes tokens without its images being decoded. A folder holds what one tower
makes behind one processor; others have folders beside it. A file appears whole or not at all, and one that
is not what was written counts as missing. Which images are needed is training/fill.py's business.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image as PILImage
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from transformers import BatchFeature

from partwise.data.collate import concatenate
from partwise.data.images import decode_picture
from partwise.data.pixels import PIXELS
from partwise.data.tokens import run_processor
from partwise.errors import DataError, TrainingError
from partwise.records import Image

FORMAT = 1
DIGEST_BYTES = 20
# A temporary file of a process that was killed is swept after this; one that is being written is younger.
STALE_SECONDS = 3600


@dataclass(frozen=True)
class StoredImage:
    """One image as a model without tower takes it.

    `features` stand where pixels were: as many axes, and the last three are (1, patches, width). `shape` is
    that of the pixels, `facts` are what else the image processor made.
    """

    features: Tensor
    shape: tuple[int, ...]
    facts: dict[str, Tensor]

    def to_bytes(self) -> bytes:
        facts = {f"facts/{name}": tensor for name, tensor in self.facts.items()}
        return save({"features": self.features, "shape": torch.tensor(self.shape), **facts})

    @classmethod
    def from_bytes(cls, content: bytes) -> StoredImage:
        tensors = load(content)
        features, shape = tensors.pop("features"), tensors.pop("shape")
        facts = {name.removeprefix("facts/"): tensor for name, tensor in tensors.items()}
        return cls(features, tuple(shape.tolist()), facts)


class FeatureStore:
    """The features that what `made_by` describes makes of images, in a folder of their own below `root`.

    May be sent to other processes; several may write at once.
    """

    def __init__(self, root: Path, made_by: dict[str, Any]) -> None:
        self.made_by = {"format": FORMAT, **made_by}
        self.folder = root / digest_of(json.dumps(self.made_by, sort_keys=True, default=str).encode())[:16]

    def path(self, key: str) -> Path:
        return self.folder / key[:2] / key[2:]

    def get(self, image: Image, row: str) -> StoredImage:
        """What is kept of a row's image.

        Raises:
            DataError: nothing that can be used; `row` names the row.
        """
        key, _ = known_image(image, row)
        stored = self.read(key)
        if stored is None:
            state = "are damaged" if self.path(key).exists() else "are missing: it is new, or has changed"
            raise DataError(
                f'{row}: the features of image "{image.where}" in {self.folder} {state}. '
                "Make them with: partwise cache CONFIG"
            )
        return stored

    def read(self, key: str) -> StoredImage | None:
        """None where there is no file, or another than was written under this key."""
        try:
            content = self.path(key).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise TrainingError(f"{self.path(key)} cannot be read: {error}.") from error
        digest, payload = content[:DIGEST_BYTES].hex(), content[DIGEST_BYTES:]
        if digest != digest_of(key.encode(), payload):
            return None
        with suppress(SafetensorError, KeyError):
            return StoredImage.from_bytes(payload)
        return None

    def write(self, key: str, stored: StoredImage) -> int:
        """The bytes that it takes on disk. Raises: TrainingError: the disk refuses; earlier files stay."""
        payload = stored.to_bytes()
        content = bytes.fromhex(digest_of(key.encode(), payload)) + payload
        self._put(self.path(key), content)
        return len(content)

    def describe(self, num_images: int, data: str) -> None:
        """Say in manifest.json what the folder is, and that all images of `data` are in it.

        Raises: TrainingError: the disk refuses.
        """
        told = {**self.made_by, "num_images": num_images}
        self._put(self.folder / "manifest.json", (json.dumps(told, indent=2, default=str) + "\n").encode())
        self._put(self._mark(data), f"{num_images}\n".encode())

    def has_all(self, data: str) -> bool:
        """Whether all images of `data`, a fingerprint of data files, were there once."""
        return self._mark(data).is_file()

    def _mark(self, data: str) -> Path:
        return self.folder / f"complete-{data[:16]}"

    def _put(self, path: Path, content: bytes) -> None:
        """The file at once or not at all, also beside other processes that write the same."""
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(content)
            partial.replace(path)
        except OSError as error:
            with suppress(OSError):
                partial.unlink()
            raise TrainingError(
                f"data.feature_cache: cannot write {path}: {error}. What is there already is whole: free "
                "space, and start again; it goes on from there."
            ) from error

    def sweep(self) -> None:
        """Delete what killed processes left behind."""
        for partial in self.folder.glob("**/.*.partial"):
            with suppress(OSError):
                if time.time() - partial.stat().st_mtime > STALE_SECONDS:
                    partial.unlink()


def digest_of(*blocks: bytes) -> str:
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for block in blocks:
        digest.update(block)
    return digest.hexdigest()


def known_image(image: Image, row: str) -> tuple[str, Image]:
    """The key of an image, and the image of exactly the bytes, or pixels, that the key is of.

    Raises:
        DataError: it is missing or broken.
    """
    if isinstance(image.source, str):
        try:
            image = replace(image, source=Path(image.source).read_bytes())
        except OSError:
            decode_picture(image, row)  # says what is wrong
            raise
    if isinstance(image.source, bytes):
        return digest_of(image.source), image
    pixels = decode_picture(image, row).pixels
    return digest_of(f"pixels {pixels.size}".encode(), pixels.tobytes()), replace(image, source=pixels)


class _Recorder:
    """An image processor that keeps what it last made."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.made: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        made = self.inner(*arguments, **options)
        self.made = dict(made)
        return made


class _Player(_Recorder):
    """An image processor that has seen its images before: what it is given does not count."""

    def __init__(self, inner: Any, stored: Sequence[StoredImage]) -> None:
        super().__init__(inner)
        self.stored = stored

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        firsts, *others = zip(*(image.shape for image in self.stored), strict=True)
        # The processor reads the shape of the pixels, not the pixels: here they take no memory.
        pixels = torch.zeros(()).expand(sum(firsts), *map(max, others))
        facts = [image.facts for image in self.stored]
        return BatchFeature({PIXELS: pixels, **{n: torch.cat([f[n] for f in facts]) for n in facts[0]}})


def seen_by(processor: Any, image_processor: Any) -> Any:
    """The processor with another image processor in it; both share the tokenizer."""
    other = copy.copy(processor)
    other.image_processor = image_processor
    return other


def process_image(processor: Any, picture: PILImage.Image, row: str) -> dict[str, Tensor]:
    """All that the image processor makes of one image when the processor calls it.

    Raises:
        DataError: the processor refuses it.
    """
    recorder = _Recorder(processor.image_processor)
    run_processor(seen_by(processor, recorder), processor.image_token, [picture], row)
    return {name: torch.as_tensor(value) for name, value in recorder.made.items()}


def run_stored(processor: Any, text: str, stored: Sequence[StoredImage], row: str) -> dict[str, Any]:
    """What `run_processor` makes of the text and the images, with features where pixels would be.

    Raises:
        DataError: as it does.
    """
    if not stored:
        return run_processor(processor, text, [], row)
    blank = PILImage.new("RGB", (1, 1))
    player = _Player(processor.image_processor, stored)
    inputs = run_processor(seen_by(processor, player), text, [blank] * len(stored), row)
    return {**inputs, PIXELS: concatenate([image.features for image in stored])}
