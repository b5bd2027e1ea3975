"""One row of a data file -> Conversation.

In: a row as JSON or parquet gives it, in one of the formats of docs/data.md. Out: messages whose image
placeholders are filled in order. Images are named here and decoded later, by images.py. Nothing is guessed:
a row that could be read in two ways is an error that names it.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image as PILImage

from partwise.errors import DataError
from partwise.records import Conversation, Image, Message, Text

PLACEHOLDER = "<image>"
ROLES = ("system", "user", "assistant")
SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "user": "user",
    "assistant": "assistant",
    "system": "system",
}
PAYLOAD_KEYS = ("image", "path", "url", "bytes", "image_url")
FORMATS = 'A row needs "messages" (a list of role and content), or "prompt" and "completion".'

Part = Text | Image | None  # None is a placeholder that waits for an image of the row
Turn = tuple[str, list[Part], bool]  # role, parts, whether it is trained


class RowError(Exception):
    """What is wrong with a row, without its name."""


def row_name(source: str, row: int) -> str:
    """How errors name a row: "file:line", counted from 1, for .jsonl; otherwise "file row N", from 0."""
    return f"{source}:{row + 1}" if source.endswith(".jsonl") else f"{source} row {row}"


def count_images(number: int) -> str:
    return "1 image" if number == 1 else f"{number} images"


def read_conversation(row: Any, source: str, number: int) -> Conversation:
    """The conversation of one row.

    Raises:
        DataError: the row has neither format, a message is malformed, or images and placeholders differ.
    """
    with naming_row(source, number):
        require_object(row)
        refuse_others(row)
        folder = Path(source).absolute().parent
        turns = read_turns(row, folder)
        check_turns(turns)
        messages = fill_placeholders(turns, row_images(row, folder))
        return Conversation(tuple(messages), source, number)


@contextmanager
def naming_row(source: str, number: int) -> Iterator[None]:
    """A block whose RowError becomes a DataError that names the row."""
    try:
        yield
    except RowError as fault:
        raise DataError(f"{row_name(source, number)}: {fault}") from None


def require_object(row: Any, formats: str = FORMATS) -> None:
    if not isinstance(row, dict):
        raise RowError(f"the row is a {type(row).__name__}, not an object. {formats}")


def refuse_others(row: dict[str, Any]) -> None:
    """Raises: RowError for rows of another objective, which would be learned wrongly, or not at all."""
    if row.get("chosen") is not None or row.get("rejected") is not None:
        raise RowError(
            'the row has "chosen" or "rejected", so it is a pair of answers, which objective.loss sft does '
            "not read. Set objective.loss: dpo (or orpo, simpo), or give rows of one answer."
        )
    if isinstance(row.get("label"), bool):
        raise RowError(
            'the row has "label": true or false, so it says whether its answer is good, which objective.loss '
            "sft does not read. Set objective.loss: kto, or remove the key."
        )
    if isinstance(row.get("text"), str) and not any(
        key in row for key in ("messages", "conversations", "prompt")
    ):
        raise RowError(
            'the row is raw text ("text"), which objective.loss sft does not read. Set objective.loss: text, '
            f"or give chats. {FORMATS}"
        )


def read_turns(row: dict[str, Any], folder: Path) -> list[Turn]:
    """The turns of a row of messages, of ShareGPT's conversations, or of prompt and completion."""
    row = {key: value for key, value in row.items() if value is not None}
    if row.get("tools"):
        raise RowError(
            '"tools" are not supported and would be left out. Remove the key, or write them as text.'
        )
    if "messages" in row:
        return [
            read_message(m, f"messages[{i}]", folder) for i, m in enumerate(require_list(row, "messages"))
        ]
    if "conversations" in row:
        return [
            read_message(from_sharegpt(m, f"conversations[{i}]"), f"conversations[{i}]", folder)
            for i, m in enumerate(require_list(row, "conversations"))
        ]
    if "prompt" in row and "completion" in row:
        prompt = [(role, parts, False) for role, parts, _ in read_side(row, "prompt", "user", folder)]
        return prompt + read_side(row, "completion", "assistant", folder)
    raise RowError(f"the keys are {', '.join(map(str, row)) or 'none'}. {FORMATS}")


def require_list(row: dict[str, Any], key: str) -> list[Any]:
    value = row[key]
    if not isinstance(value, list):
        raise RowError(f'"{key}" is a {type(value).__name__}, not a list of messages. {FORMATS}')
    if not value:
        raise RowError(f'"{key}" is empty. Add a user and an assistant message, or remove the row.')
    return value


def read_side(row: dict[str, Any], key: str, role: str, folder: Path) -> list[Turn]:
    """Messages of "prompt" or "completion": a string is one message of that side's role."""
    if isinstance(row[key], str):
        return [read_message({"role": role, "content": row[key]}, key, folder)]
    messages = [read_message(m, f"{key}[{i}]", folder) for i, m in enumerate(require_list(row, key))]
    if key == "completion" and any(role != "assistant" for role, _, _ in messages):
        raise RowError(
            '"completion" has a message that is not an answer. Only assistant messages may stand in it.'
        )
    return messages


def from_sharegpt(message: Any, where: str) -> Any:
    if not isinstance(message, dict) or "from" not in message:
        raise RowError(f'{where} has no "from" and "value". {FORMATS}')
    role = message["from"]
    if not isinstance(role, str) or role not in SHAREGPT_ROLES:
        raise RowError(f"{where}: role {role!r:.80} is not one of {', '.join(SHAREGPT_ROLES)}.")
    rest = {key: value for key, value in message.items() if key not in ("from", "value")}
    return {"role": SHAREGPT_ROLES[role], "content": message.get("value"), **rest}


def read_message(message: Any, where: str, folder: Path) -> Turn:
    """(role, parts, whether it is trained) of one message."""
    if not isinstance(message, dict):
        raise RowError(f"{where} is a {type(message).__name__}, not an object with role and content.")
    message = {key: value for key, value in message.items() if value is not None}
    unknown = [key for key in message if key not in ("role", "content", "train")]
    if unknown:
        raise RowError(
            f"{where}: key {unknown[0]!r} is not known and would be left out. Use role, content, train."
        )
    role = message.get("role")
    if role not in ROLES:
        raise RowError(f"{where}: role {role!r} is not one of {', '.join(ROLES)}.")
    train = message.get("train", role == "assistant")
    if not isinstance(train, bool) or (train and role != "assistant"):
        raise RowError(
            f"{where}: train is {train!r}, but only an assistant message may have train: true or false."
        )
    return role, _parts(message.get("content"), where, folder), train


def _parts(content: Any, where: str, folder: Path) -> list[Part]:
    if isinstance(content, str):
        return split_text(content)
    if not isinstance(content, list):
        raise RowError(f"{where}: content is {content!r}, not a string or a list of parts.")
    parts: list[Part] = []
    for i, part in enumerate(content):
        place = f"{where}.content[{i}]"
        if not isinstance(part, dict):
            raise RowError(
                f'{place} is a {type(part).__name__}, not an object such as {{"type": "text", ...}}.'
            )
        kind = part.get("type")
        if kind == "text" and isinstance(part.get("text"), str):
            parts.extend(split_text(part["text"]))
        elif kind in ("image", "image_url"):
            parts.append(_image_part(part, place, folder))
        else:
            raise RowError(f"{place}: type {kind!r} is not text with a text, or image.")
    return parts


def split_text(text: str) -> list[Part]:
    """Text and placeholders in order.

    One line break on each side of a placeholder is dropped, so that "<image>\\nWhy?" is the same as an image
    part and a text part: chat templates set their own line breaks around an image.
    """
    pieces = text.split(PLACEHOLDER)
    parts: list[Part] = []
    for i, piece in enumerate(pieces):
        if i > 0:
            parts.append(None)
            piece = piece.removeprefix("\n")
        if i < len(pieces) - 1:
            piece = piece.removesuffix("\n")
        if piece:
            parts.append(Text(piece))
    return parts


def _image_part(part: dict[str, Any], where: str, folder: Path) -> Image | None:
    payloads = [part[key] for key in PAYLOAD_KEYS if part.get(key) is not None]
    if len(payloads) > 1:
        raise RowError(f"{where} names {len(payloads)} images. Keep one of {', '.join(PAYLOAD_KEYS)}.")
    if not payloads:
        return None
    payload = payloads[0]
    if isinstance(payload, dict) and "url" in payload:
        payload = payload["url"]
    return _image(payload, where, folder)


def row_images(row: dict[str, Any], folder: Path) -> list[Image]:
    values = row.get("images")
    single = row.get("image")
    if values is not None and single is not None:
        raise RowError('both "image" and "images" are given. Keep one of them.')
    if single is not None:
        values = [single]
    elif values is None:
        values = []
    elif not isinstance(values, list):
        raise RowError(f'"images" is a {type(values).__name__}, not a list.')
    return [_image(value, f"images[{i}]", folder) for i, value in enumerate(values)]


def parse_image(payload: Any, folder: Path, where: str) -> Image:
    """The image of a path, a data URL, bytes, a {"bytes", "path"} struct, or a PIL image.

    Raises:
        DataError: the payload is none of these, or a web address. `where` names it in the text.
    """
    try:
        return _image(payload, where, folder)
    except RowError as fault:
        raise DataError(str(fault)) from None


def _image(payload: Any, where: str, folder: Path) -> Image:
    if isinstance(payload, dict) and ("bytes" in payload or "path" in payload):
        payload = payload.get("bytes") or payload.get("path")
    if isinstance(payload, bytes | PILImage.Image):
        return Image(payload, where)
    if not isinstance(payload, str) or not payload:
        raise RowError(f"{where} is {payload!r:.80}, not a path, bytes or a data: URL.")
    if payload.startswith(("http://", "https://")):
        raise RowError(f"{where} is the web address {payload}. Download the image first and give its path.")
    if payload.startswith("data:"):
        return Image(_data_url_bytes(payload, where), where)
    return Image(str(folder / payload.removeprefix("file://")), payload)


def _data_url_bytes(url: str, where: str) -> bytes:
    header, _, data = url.partition(",")
    if not header.endswith(";base64"):
        raise RowError(f"{where}: the data: URL is not base64. Write data:image/png;base64,... instead.")
    try:
        return base64.b64decode(data, validate=True)
    except ValueError as error:  # binascii.Error, and letters beyond ASCII
        raise RowError(f"{where}: the data: URL is broken: {error}. Encode the image again.") from None


def check_turns(messages: list[Turn]) -> None:
    roles = [role for role, _, _ in messages]
    if "assistant" not in roles:
        raise RowError("no assistant message, so nothing to learn. Add the answer, or remove the row.")
    if "user" not in roles[: roles.index("assistant")]:
        raise RowError("the first answer has no user message before it. Add the prompt.")
    if "system" in roles[1:]:
        raise RowError("a system message may only be the first message.")
    for i, (role, parts, _) in enumerate(messages):
        if not parts:
            raise RowError(f"message {i} ({role}) is empty. Give it a text, or remove the row.")


def fill_placeholders(messages: list[Turn], images: list[Image]) -> list[Message]:
    num_slots = sum(part is None for _, parts, _ in messages for part in parts)
    if images and not num_slots:
        raise RowError(
            f"{count_images(len(images))} given, no placeholder in the messages. Add {PLACEHOLDER} "
            "where it belongs."
        )
    if len(images) < num_slots:
        raise RowError(
            f"{count_images(len(images))} given, {num_slots} {PLACEHOLDER} in the messages. Add an "
            "image or drop one."
        )
    if len(images) > num_slots:
        word = "placeholder" if num_slots == 1 else "placeholders"
        raise RowError(
            f"{count_images(len(images))} given, {num_slots} {word} in the messages. Add a "
            "placeholder or drop an image."
        )
    waiting = iter(images)
    return [Message(role, tuple(_filled(parts, waiting)), train) for role, parts, train in messages]


def _filled(parts: list[Part], images: Iterator[Image]) -> list[Text | Image]:
    """Parts with their images; neighbouring texts are joined."""
    filled: list[Text | Image] = []
    for part in parts:
        part = next(images) if part is None else part
        if isinstance(part, Text) and filled and isinstance(filled[-1], Text):
            filled[-1] = Text(filled[-1].text + part.text)
        else:
            filled.append(part)
    return filled
