"""One row of raw text -> a Conversation of a single message, which is the text as it stands.

In: a row with a text, and images where it has placeholders. Out: what texts.py tokenises, without a chat
template. Every token of the text trains.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from partwise.data.rows import (
    RowError,
    fill_placeholders,
    naming_row,
    require_object,
    row_images,
    split_text,
)
from partwise.records import Conversation

DOCUMENT_FORMAT = 'A row needs "text", with <image> where an image of its "images" belongs.'
ROLE = "assistant"  # whose words train


def read_document(row: Any, source: str, number: int) -> Conversation:
    """The text of one row and its images.

    Raises:
        DataError: there is no text, or images and placeholders differ.
    """
    with naming_row(source, number):
        require_object(row, DOCUMENT_FORMAT)
        text = row.get("text")
        if not isinstance(text, str):
            keys = ", ".join(map(str, row)) or "none"
            told = f"the keys are {keys}" if text is None else f'"text" is a {type(text).__name__}'
            raise RowError(
                f"{told}, and objective.loss text learns raw text. {DOCUMENT_FORMAT} For chats set "
                "objective.loss: sft."
            )
        if not text.strip():
            raise RowError('"text" is empty. Give it words, or remove the row.')
        turn = (ROLE, split_text(text), True)
        messages = fill_placeholders([turn], row_images(row, Path(source).absolute().parent))
        return Conversation(tuple(messages), source, number)
