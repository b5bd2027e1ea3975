"""Rows -> Scan: how long they are, what trains in them, which are dropped, and every row that is broken.

In: rows and the ChatFormat of the run. Out: counts for `check`. Nothing is judged here: what is an error or
a warning is for preflight to say.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from partwise.data.chat import ChatFormat
from partwise.data.loader import in_order
from partwise.data.template import tokenizer_of
from partwise.errors import DataError
from partwise.records import IGNORE_INDEX, Conversation, Dropped, Example


@dataclass(frozen=True)
class Scan:
    """What a pass over rows found.

    `lengths` are the tokens of each readable row before max_seq_len; `images_ends` (same rows) is the least
    max_seq_len that keeps a row's images. `num_open_answers` counts examples whose last token is a label but
    not a special token: they do not teach the model to stop. `errors` are the texts of unusable rows.
    """

    num_rows: int
    num_images: int
    num_target_tokens: int
    num_open_answers: int
    lengths: np.ndarray
    images_ends: np.ndarray
    dropped: Counter[str]
    errors: tuple[str, ...]

    @property
    def num_examples(self) -> int:
        return len(self.lengths) - self.dropped.total()


@dataclass(frozen=True)
class ScannedRow:
    num_tokens: int
    images_end: int
    num_images: int
    num_target_tokens: int
    is_open: bool
    dropped: str | None


def scan_rows(
    rows: Sequence[Conversation], chat_format: ChatFormat, limit: int | None = None, num_workers: int = 0
) -> Scan:
    """Read and tokenise all rows, or `limit` of them spread evenly over the files, and count.

    No DataError is raised: each is a text in `errors`.
    """
    indices: Sequence[int] = range(len(rows))
    if limit is not None and limit < len(rows):
        indices = np.linspace(0, len(rows) - 1, limit).astype(int).tolist()
    found = list(in_order(RowScan(rows, chat_format), indices, num_workers))
    read = [result for result in found if isinstance(result, ScannedRow)]
    return Scan(
        num_rows=len(found),
        num_images=sum(row.num_images for row in read),
        num_target_tokens=sum(row.num_target_tokens for row in read),
        num_open_answers=sum(row.is_open for row in read),
        lengths=np.array([row.num_tokens for row in read], dtype=np.int64),
        images_ends=np.array([row.images_end for row in read], dtype=np.int64),
        dropped=Counter(row.dropped for row in read if row.dropped),
        errors=tuple(result for result in found if isinstance(result, str)),
    )


class RowScan:
    """index -> ScannedRow, or the text of the row's DataError."""

    def __init__(self, rows: Sequence[Conversation], chat_format: ChatFormat) -> None:
        self.rows = rows
        self.chat_format = chat_format
        tokenizer = tokenizer_of(chat_format.processor)
        self.special_ids = frozenset(tokenizer.convert_tokens_to_ids(list(chat_format.special_tokens)))

    def __call__(self, index: int) -> ScannedRow | str:
        try:
            conversation = self.rows[index]
            encoded = self.chat_format.encode(conversation)
            result = self.chat_format.fit(encoded)
        except DataError as error:
            return str(error)
        dropped = result.reason if isinstance(result, Dropped) else None
        is_open = isinstance(result, Example) and self._is_open(result, len(encoded.example.input_ids))
        return ScannedRow(
            num_tokens=len(encoded.example.input_ids),
            images_end=encoded.images_end,
            num_images=len(conversation.images),
            num_target_tokens=result.num_target_tokens if isinstance(result, Example) else 0,
            is_open=is_open,
            dropped=dropped,
        )

    def _is_open(self, example: Example, num_tokens: int) -> bool:
        """Whether no answer of an uncut example ends in a special token."""
        if len(example.input_ids) < num_tokens:
            return False
        last_label = int(example.labels[example.labels != IGNORE_INDEX][-1])
        return last_label not in self.special_ids
