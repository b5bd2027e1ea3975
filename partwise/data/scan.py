"""Rows -> Scan: how long they are, what trains in them, which are dropped, and every row that is broken.

In: rows and the ChatFormat of the run. Out: facts for `check`, from one pass. Nothing is judged here: what is
an error or a warning is for preflight to say.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from partwise.data.chat import ChatFormat, Encoded, read_pictures
from partwise.data.images import Picture
from partwise.data.loader import in_order
from partwise.data.rows import row_name
from partwise.data.template import tokenizer_of
from partwise.errors import DataError
from partwise.records import IGNORE_INDEX, Conversation, Dropped, Example, Side

# Where a row failed: read from its file, written by the chat template, its images decoded, made tokens.
Stage = Literal["format", "template", "images", "tokens"]


@dataclass(frozen=True)
class RowFault:
    """Why a row cannot be used; `text` names the row."""

    stage: Stage
    text: str


@dataclass(frozen=True)
class ScannedRow:
    """One readable row. Lengths are in tokens, before max_seq_len; `dropped` is the reason, if any.

    `images_end` is the least max_seq_len that keeps the images. `is_open`: no answer of the uncut row ends
    in a special token. `num_image_tokens` are those of the images' own id, without marks around them;
    `num_announced_tokens` is what the processor says it makes of such images, None where it cannot tell.
    `digest` is equal for rows whose tokens, labels and image inputs are equal.
    """

    name: str
    digest: bytes
    num_tokens: int
    images_end: int
    num_target_tokens: int
    num_bos: int
    num_image_tokens: int
    num_announced_tokens: int | None
    image_sizes: tuple[tuple[int, int], ...]
    num_turned_images: int
    is_open: bool
    is_cut: bool
    dropped: str | None
    side: Side = ""


@dataclass(frozen=True)
class Scan:
    """What a pass over rows found: the readable rows in their order, and the faults of the others."""

    rows: tuple[ScannedRow, ...]
    faults: tuple[RowFault, ...]

    @property
    def num_rows(self) -> int:
        """Rows that were read, whether they can be used or not."""
        return len(self.rows) + len(self.faults)

    @property
    def num_examples(self) -> int:
        return len(self.rows) - self.dropped.total()

    @property
    def num_images(self) -> int:
        return sum(len(row.image_sizes) for row in self.rows)

    @property
    def num_target_tokens(self) -> int:
        return sum(row.num_target_tokens for row in self.rows)

    @property
    def num_open_answers(self) -> int:
        return sum(row.is_open for row in self.rows)

    @property
    def lengths(self) -> np.ndarray:
        return np.array([row.num_tokens for row in self.rows], dtype=np.int64)

    @property
    def images_ends(self) -> np.ndarray:
        return np.array([row.images_end for row in self.rows], dtype=np.int64)

    @property
    def dropped(self) -> Counter[str]:
        return Counter(row.dropped for row in self.rows if row.dropped)

    @property
    def errors(self) -> tuple[str, ...]:
        return tuple(fault.text for fault in self.faults)

    def faults_at(self, stage: Stage) -> list[str]:
        """Each once: both answers of a pair may have the same fault."""
        return list(dict.fromkeys(fault.text for fault in self.faults if fault.stage == stage))


def scan_rows(
    rows: Sequence[Conversation], chat_format: ChatFormat, limit: int | None = None, num_workers: int = 0
) -> Scan:
    """Read and tokenise all rows, or `limit` of them spread evenly over the files.

    No DataError is raised: each is a fault of the scan.
    """
    indices = scanned_indices(len(rows), limit, getattr(rows, "per_row", 1))
    found = list(in_order(RowScan(rows, chat_format), indices, num_workers))
    return Scan(
        rows=tuple(result for result in found if isinstance(result, ScannedRow)),
        faults=tuple(result for result in found if isinstance(result, RowFault)),
    )


def scanned_indices(num_rows: int, limit: int | None, per_row: int = 1) -> Sequence[int]:
    """All rows, or `limit` of them spread evenly; the order of a scan. `per_row` neighbours come together."""
    if limit is None or limit >= num_rows:
        return range(num_rows)
    firsts = np.linspace(0, num_rows // per_row - 1, max(1, limit // per_row)).astype(int)
    return [int(first) * per_row + i for first in firsts for i in range(per_row)]


class RowScan:
    """index -> ScannedRow, or the RowFault that says why there is none."""

    def __init__(self, rows: Sequence[Conversation], chat_format: ChatFormat) -> None:
        self.rows = rows
        self.chat_format = chat_format
        tokenizer = tokenizer_of(chat_format.processor)
        self.bos_token_id = tokenizer.bos_token_id
        self.special_ids = frozenset(tokenizer.convert_tokens_to_ids(list(chat_format.special_tokens)))

    def __call__(self, index: int) -> ScannedRow | RowFault:
        stage: Stage = "format"
        try:
            conversation = self.rows[index]
            stage = "template"
            rendered = self.chat_format.render(conversation)
            stage = "images"
            pictures = read_pictures(conversation)
            stage = "tokens"
            encoded = self.chat_format.encode_rendered(conversation, rendered, pictures)
            result = self.chat_format.fit(encoded)
        except DataError as error:
            return RowFault(stage, str(error))
        return self._facts(encoded, result, pictures)

    def _facts(self, encoded: Encoded, result: Example | Dropped, pictures: list[Picture]) -> ScannedRow:
        whole = encoded.example
        kept = result if isinstance(result, Example) else None
        if kept is not None and self.chat_format.splits:
            kept = whole  # it is all trained, in pieces
        is_cut = kept is not None and len(kept.input_ids) < len(whole.input_ids)
        sizes = tuple(picture.pixels.size for picture in pictures)
        return ScannedRow(
            name=row_name(whole.source, whole.row),
            digest=example_digest(whole),
            num_tokens=len(whole.input_ids),
            images_end=encoded.images_end,
            num_target_tokens=kept.num_target_tokens if kept else 0,
            num_bos=int((whole.input_ids == self.bos_token_id).sum()) if self.bos_token_id is not None else 0,
            num_image_tokens=self._num_image_tokens(whole) if sizes else 0,
            num_announced_tokens=num_announced_tokens(self.chat_format.processor, sizes),
            image_sizes=sizes,
            num_turned_images=sum(picture.is_turned for picture in pictures),
            is_open=kept is not None and not is_cut and self._is_open(kept),
            is_cut=is_cut,
            dropped=result.reason if isinstance(result, Dropped) else None,
            side=whole.side,
        )

    def _num_image_tokens(self, example: Example) -> int:
        """How often the commonest media id stands in the row: marks around images are rarer."""
        ids = Counter(example.input_ids.tolist())
        return max((ids[token] for token in self.chat_format.media_token_ids), default=0)

    def _is_open(self, example: Example) -> bool:
        last_label = int(example.labels[example.labels != IGNORE_INDEX][-1])
        return last_label not in self.special_ids


def example_digest(example: Example) -> bytes:
    """16 bytes, equal for examples with the same tokens, labels and image inputs."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in (
        ("ids", example.input_ids),
        ("labels", example.labels),
        *sorted(example.media.items()),
    ):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.digest()


def num_announced_tokens(processor: Any, sizes: Sequence[tuple[int, int]]) -> int | None:
    """The image tokens that the processor says it makes of images of these (width, height).

    None where there are no images, or where the processor has no such number.
    """
    count = getattr(processor, "_get_num_multimodal_tokens", None)
    if count is None or not sizes:
        return None
    try:
        numbers = count(image_sizes=[(height, width) for width, height in sizes])["num_image_tokens"]
    except (AttributeError, KeyError, NotImplementedError, TypeError, ValueError):
        return None
    return sum(numbers) if numbers else None
