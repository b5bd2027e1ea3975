"""Conversations -> a data file with its images: rows.py, documents.py and preferences.py backwards."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

from partwise.records import Conversation, Image, Message


def write_conversations(folder: Path, conversations: Iterable[Conversation]) -> None:
    """rows.jsonl and images/ in `folder`. The answers of one row must stand together.

    Raises:
        OSError: the disk refuses.
    """
    (folder / "images").mkdir(parents=True)
    rows = groupby(conversations, key=lambda conversation: (conversation.source, conversation.row))
    with (folder / "rows.jsonl").open("w") as file:
        for number, (_, answers) in enumerate(rows, start=1):
            row = RowWriter(folder, f"{number:03d}").row(list(answers))
            file.write(json.dumps(row) + "\n")


class RowWriter:
    """One row; its images are written to folder/images as they come, under its name."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self.num_images = 0

    def row(self, answers: list[Conversation]) -> dict[str, Any]:
        """In the shape that the conversations were read from: a chat, a text, a pair or a labelled answer."""
        first = answers[0]
        if not first.side:
            is_text = len(first.messages) == 1
            return self.text(first) if is_text else {"messages": self.messages(first.messages)}
        prompt = {"prompt": self.messages(message for message in first.messages if not message.train)}
        given: dict[str, Any] = {
            answer.side: self.messages(m for m in answer.messages if m.train) for answer in answers
        }
        if len(given) == 1:
            return {**prompt, "completion": given[first.side], "label": first.side == "chosen"}
        return {**prompt, **given}

    def text(self, document: Conversation) -> dict[str, Any]:
        (message,) = document.messages
        parts = [self.content(part) for part in message.contents]
        images = [part["image"] for part in parts if "image" in part]
        return {"text": "".join(part.get("text", "<image>") for part in parts), "images": images}

    def messages(self, messages: Iterable[Message]) -> list[dict[str, Any]]:
        return [self.message(message) for message in messages]

    def message(self, message: Message) -> dict[str, Any]:
        trained = {"train": message.train} if message.role == "assistant" else {}
        return {
            "role": message.role,
            "content": [self.content(part) for part in message.contents],
            **trained,
        }

    def content(self, content: Any) -> dict[str, str]:
        if not isinstance(content, Image):
            return {"type": "text", "text": content.text}
        self.num_images += 1
        name = write_image(content, self.folder / "images" / f"{self.name}-{self.num_images}")
        return {"type": "image", "image": f"images/{name}"}


def write_image(image: Image, path: Path) -> str:
    """The image's own bytes, or a PIL image as PNG; the file's name."""
    if isinstance(image.source, str):
        path = path.with_suffix(Path(image.source).suffix)
        shutil.copyfile(image.source, path)
    elif isinstance(image.source, bytes):
        path.write_bytes(image.source)
    else:
        path = path.with_suffix(".png")
        image.source.save(path)
    return path.name
