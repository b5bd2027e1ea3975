"""Rows -> questions: everything before a row's last answer, and the answers that are right.

In: Rows. Out: a Question, read when it is asked; the order to ask in; and the controls, the same question
about another row's images or about blank ones. Nothing is generated or judged here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image as PILImage

from partwise.data.images import decode_image
from partwise.data.rows import read_conversation, row_name
from partwise.data.sources import Rows
from partwise.errors import DataError
from partwise.records import Conversation, Image, Message, Text

CONTROLS = ("swapped", "blank")
ANSWERS_KEY = "answers"
# Neither black nor white, which a scan or a page may be: nothing stands out in it.
BLANK_GRAY = (128, 128, 128)
# How many rows are searched for one with other images.
NUM_PARTNERS = 64


@dataclass(frozen=True)
class Question:
    """What is asked of row `place`. `fields` is the row as its file has it, `group` its value of the key that
    tables are made by."""

    place: int
    prompt: Conversation
    references: tuple[str, ...]
    fields: dict[str, Any]
    group: str = ""

    @property
    def name(self) -> str:
        return row_name(self.prompt.source, self.prompt.row)

    @property
    def text(self) -> str:
        """The texts of the prompt; turns before the question with their roles."""
        *earlier, last = self.prompt.messages
        return "\n".join([*(f"{m.role}: {text_of(m)}" for m in earlier), text_of(last)])


def asking_order(num_rows: int, max_rows: int | None, seed: int) -> list[int]:
    """Places of the rows to ask about: shuffled by the seed, so that the first of them are a fair sample."""
    return np.random.default_rng(seed).permutation(num_rows)[:max_rows].tolist()


def read_question(rows: Rows, place: int, group_by: str | None = None) -> Question:
    """Raises: DataError where the row is broken, or its answers are."""
    path, number, row = rows.read(place)
    conversation = read_conversation(row, path, number)
    messages = conversation.messages
    last = max(i for i, message in enumerate(messages) if message.role == "assistant")
    group = "" if group_by is None else row.get(group_by)
    return Question(
        place=place,
        prompt=replace(conversation, messages=messages[:last]),
        references=read_references(row, messages[last], row_name(path, number)),
        fields=row,
        group="(none)" if group is None else str(group),
    )


def read_references(row: dict[str, Any], answer: Message, name: str) -> tuple[str, ...]:
    """The row's `answers`, or the text of its last answer. Raises: DataError where these are no texts."""
    given = row.get(ANSWERS_KEY)
    if given is None:
        if not (text := text_of(answer)):
            raise DataError(f'{name}: the last answer has no text to compare with. Add one, or "answers".')
        return (text,)
    answers = [given] if isinstance(given, str) else given
    if not isinstance(answers, list) or not answers or not all(isinstance(a, str) for a in answers):
        raise DataError(f'{name}: "answers" is {given!r:.80}, not a text or a list of texts. Correct it.')
    return tuple(answers)


def text_of(message: Message) -> str:
    return "".join(content.text for content in message.contents if isinstance(content, Text)).strip()


def swapped(rows: Rows, order: Sequence[int], at: int, question: Question) -> Conversation | None:
    """The question, which stands in `order` at `at`, about the images of the next row that has as many, other
    ones; None where there is none."""
    images = question.prompt.images
    for step in range(1, min(NUM_PARTNERS, len(order))):
        others = rows[order[(at + step) % len(order)]].images
        if len(others) == len(images) and all(
            a.source != b.source for a, b in zip(images, others, strict=True)
        ):
            return with_images(question.prompt, others)
    return None


def blank(question: Question) -> Conversation:
    """The question about gray images of the same sizes. Raises: DataError where an image cannot be read."""
    sizes = [decode_image(image, question.name).size for image in question.prompt.images]
    grays = [Image(PILImage.new("RGB", size, BLANK_GRAY), "a blank image") for size in sizes]
    return with_images(question.prompt, grays)


def with_images(conversation: Conversation, images: Sequence[Image]) -> Conversation:
    """The conversation with other images in the places of its own."""
    waiting = iter(images)
    return replace(
        conversation,
        messages=tuple(replace(m, contents=tuple(exchange(m, waiting))) for m in conversation.messages),
    )


def exchange(message: Message, images: Iterator[Image]) -> Iterator[Text | Image]:
    for content in message.contents:
        yield next(images) if isinstance(content, Image) else content
