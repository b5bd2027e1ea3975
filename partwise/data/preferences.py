"""One row that says which answer is better -> Conversations: one for each answer, with the same prompt.

In: a row as JSON or parquet gives it, in one of the formats of docs/objectives.md. Out: of a pair, a
Conversation that ends in the chosen answer and one that ends in the rejected one; of a labelled answer, one
that says by its side whether it is good. Only answers train. Images belong to the prompt and stand in both.
"""

from __future__ import annotations

from itertools import takewhile
from pathlib import Path
from typing import Any

from partwise.data.rows import (
    PLACEHOLDER,
    RowError,
    Turn,
    check_turns,
    fill_placeholders,
    from_sharegpt,
    naming_row,
    read_message,
    read_side,
    read_turns,
    require_object,
    row_images,
)
from partwise.records import Conversation, Message, Side

PAIR_FORMATS = (
    'A row needs "chosen" and "rejected" beside "prompt" or "messages", or as lists of messages that begin '
    "alike."
)
LABEL_FORMATS = 'A row needs "prompt", "completion" and "label": true or false.'
PROMPT_KEYS = ("prompt", "messages", "conversations")


def read_pair(row: Any, source: str, number: int) -> tuple[Conversation, Conversation]:
    """The chosen and the rejected answer of one row, each with the prompt.

    Raises:
        DataError: an answer is missing or malformed, or images and placeholders of the prompt differ.
    """
    with naming_row(source, number):
        require_object(row, PAIR_FORMATS)
        for key in ("chosen", "rejected"):
            if row.get(key) in (None, "", []):
                raise RowError(
                    f'"{key}" is missing or empty, and the objective.loss of this run compares two answers. '
                    f"{PAIR_FORMATS} For rows of one answer set objective.loss: sft."
                )
        folder = Path(source).absolute().parent
        prompt, answers = _split_pair(row, folder)
        images = row_images(row, folder)
        chosen, rejected = (_finish(prompt, answer, images) for answer in answers)
        return (
            Conversation(chosen, source, number, "chosen"),
            Conversation(rejected, source, number, "rejected"),
        )


def read_labelled(row: Any, source: str, number: int) -> Conversation:
    """The answer of one row, with its prompt; on the side that its label says.

    Raises:
        DataError: the label is missing or neither true nor false, or the row is malformed.
    """
    with naming_row(source, number):
        require_object(row, LABEL_FORMATS)
        label = row.get("label")
        if not isinstance(label, bool):
            told = "is missing" if label is None else f"is {label!r:.80}, not true or false"
            raise RowError(f'"label" {told}, and objective.loss kto learns from it. {LABEL_FORMATS}')
        folder = Path(source).absolute().parent
        turns = read_turns(row, folder)
        num_answers = len(list(takewhile(lambda turn: turn[0] == "assistant", reversed(turns))))
        prompt, answer = turns[: len(turns) - num_answers], turns[len(turns) - num_answers :]
        messages = _finish(prompt, answer, row_images(row, folder))
        return Conversation(messages, source, number, "chosen" if label else "rejected")


def with_answer_of(conversation: Conversation, other: Conversation) -> Conversation:
    """The conversation's prompt with the answer of another row: what KTO compares with."""
    prompt = tuple(message for message in conversation.messages if not message.train)
    answer = tuple(message for message in other.messages if message.train)
    return Conversation(prompt + answer, conversation.source, conversation.row, "other")


def _split_pair(row: dict[str, Any], folder: Path) -> tuple[list[Turn], tuple[list[Turn], list[Turn]]]:
    """The prompt's turns, and those of either answer."""
    chosen, rejected = (_read_answer(row[key], key, folder) for key in ("chosen", "rejected"))
    given = [key for key in PROMPT_KEYS if row.get(key) is not None]
    if len(given) > 1:
        raise RowError(f"the prompt is given as {' and as '.join(given)}. Keep one of them.")
    if given:
        prompt = read_side(row, "prompt", "user", folder) if given == ["prompt"] else read_turns(row, folder)
        return prompt, (chosen, rejected)
    pairs = zip(chosen[:-1], rejected[:-1], strict=False)
    length = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
    if not length:
        raise RowError(f"there is no prompt, and the two answers do not begin alike. {PAIR_FORMATS}")
    # What both begin with may end in answers that are the same: the prompt ends with the last question.
    while length and chosen[length - 1][0] == "assistant":
        length -= 1
    return chosen[:length], (chosen[length:], rejected[length:])


def _read_answer(value: Any, key: str, folder: Path) -> list[Turn]:
    """A text, a message, or a list of messages, which may bring the prompt along."""
    if isinstance(value, str):
        return [read_message({"role": "assistant", "content": value}, key, folder)]
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise RowError(f'"{key}" is a {type(value).__name__}, not a text, a message or a list of messages.')
    return [
        read_message(
            from_sharegpt(message, f"{key}[{i}]")
            if isinstance(message, dict) and "from" in message
            else message,
            f"{key}[{i}]",
            folder,
        )
        for i, message in enumerate(value)
    ]


def _finish(prompt: list[Turn], answer: list[Turn], images: list[Any]) -> tuple[Message, ...]:
    """The messages of prompt and answer, of which only the answer's train."""
    if any(not hasattr(part, "text") for _, parts, _ in answer for part in parts):
        raise RowError(
            f"an answer holds an image or {PLACEHOLDER}, but images belong to the prompt, which both answers "
            "share. Move it there."
        )
    if not answer or answer[-1][0] != "assistant":
        raise RowError("an answer does not end in an assistant message. Add it, or remove the row.")
    asked = [(role, parts, False) for role, parts, _ in prompt]
    given = [(role, parts, role == "assistant") for role, parts, _ in answer]
    check_turns(asked + given)
    return tuple(fill_placeholders(asked + given, images))


def shown_side(side: Side) -> str:
    """How the answer is named beside its row: " (chosen)"; "" where a row has no sides."""
    return f" ({side})" if side else ""
