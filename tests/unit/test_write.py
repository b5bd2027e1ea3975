"""Rows that are written are the rows that were read, in the shape that they had."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from partwise.data.sources import open_rows
from partwise.data.write import write_conversations

SHAPES = {
    "chats": {
        "messages": [
            {"role": "user", "content": "<image>Which?"},
            {"role": "assistant", "content": "red", "train": False},
            {"role": "user", "content": "Sure?"},
            {"role": "assistant", "content": "yes"},
        ],
        "images": ["a.png"],
    },
    "texts": {"text": "one <image> two <image>", "images": ["a.png", "a.png"]},
    "pairs": {"prompt": "<image>Which?", "chosen": "red", "rejected": "blue", "images": ["a.png"]},
    "labels": {"prompt": "<image>Which?", "completion": "red", "label": False, "images": ["a.png"]},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_written_rows_are_read_alike(shape, tmp_path, make_image) -> None:
    make_image((8, 8), "red").save(tmp_path / "a.png")
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(SHAPES[shape])}\n" * 2)
    read = list(open_rows([tmp_path / "rows.jsonl"], shape))
    write_conversations(tmp_path / "again", read)
    again = list(open_rows([tmp_path / "again/rows.jsonl"], shape))
    assert len(again) == len(read) == (4 if shape == "pairs" else 2)
    assert [plain(conversation) for conversation in again] == [plain(conversation) for conversation in read]
    images = [conversation.images for conversation in read[:: 2 if shape == "pairs" else 1]]
    assert len(list((tmp_path / "again/images").iterdir())) == sum(map(len, images))


def plain(conversation):
    """Without the file that it came from; images by their bytes."""

    def content(part):
        return part.text if hasattr(part, "text") else Path(part.source).read_bytes()

    messages = tuple(
        replace(message, contents=tuple(map(content, message.contents))) for message in conversation.messages
    )
    return messages, conversation.row, conversation.side
