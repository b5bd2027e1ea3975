"""Text and images -> the tensors that the model's own processor makes of them, in one call.

In: the text that the chat template wrote, and the row's decoded pictures. Out: ids with their offsets in
the text, and the image inputs. What would make the ids mean something else than the row is
refused: control tokens in a text, placeholders without an image, a second BOS. No labels are made here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from PIL import Image as PILImage

from partwise.data.rows import count_images
from partwise.data.template import special_tokens, tokenizer_of
from partwise.errors import ConfigError, DataError
from partwise.records import Conversation, Text


def control_pattern(processor: Any) -> re.Pattern[str]:
    """Matches every string that the tokenizer or the processor reads as a control token."""
    tokens = {*special_tokens(processor), *getattr(processor, "all_special_multimodal_tokens", ())}
    longest_first = sorted(tokens, key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def check_control_tokens(conversation: Conversation, control: re.Pattern[str], row: str) -> None:
    """Raises: DataError where a text of the row would be read as something other than text."""
    for i, message in enumerate(conversation.messages):
        for content in message.contents:
            match = control.search(content.text) if isinstance(content, Text) else None
            if match:
                at, around = match.start(), match.string[max(0, match.start() - 20) : match.end() + 20]
                raise DataError(
                    f'{row}: the text of message {i} ({message.role}) contains "{match.group()}" at '
                    f"character {at} ({around!r}), a control token of this model: it would be read as the "
                    "end of a turn or as an image, not as text. Rewrite it, with a space inside for "
                    "instance, or remove the row."
                )


def run_processor(
    processor: Any,
    text: str,
    pictures: list[PILImage.Image],
    row: str,
    image_options: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any]:
    """What the processor or tokenizer makes of the text and the pictures: tensors with one row, and offsets.

    BOS comes from the template where it writes one, otherwise from the tokenizer if it adds one.
    `image_options` are for the image processor.
    """
    tokenizer = tokenizer_of(processor)
    bos = tokenizer.bos_token
    options = {
        "add_special_tokens": not (bos and text.startswith(bos)),
        "return_offsets_mapping": True,
        "return_tensors": "pt",
    }
    check_bos(tokenizer, text, row)
    if tokenizer is processor:
        if pictures:
            raise DataError(f"{row}: the row has images, but the model is a text model. Drop the images.")
        return dict(tokenizer([text], **options))
    check_placeholders(processor, text, pictures, row)
    try:
        inputs = processor(
            text=[text],
            images=[pictures] if pictures else None,
            return_text_replacement_offsets=True,
            **options,
            **(image_options if pictures else {}),
        )
    except ValueError as error:
        raise DataError(
            f"{row}: the model's processor refuses the row: {error}. Change or remove it."
        ) from error
    if pictures and not inputs.get("text_replacement_offsets"):
        raise ConfigError(
            f"model.path: {type(processor).__name__} does not tell where its image tokens stand, so the "
            "answers cannot be found in rows with images. Use a model whose processor does."
        )
    return dict(inputs)


def check_placeholders(processor: Any, text: str, pictures: Sequence[PILImage.Image], row: str) -> None:
    """Raises: DataError where the template did not write one placeholder for each image."""
    token = getattr(processor, "image_token", None)
    if token is not None and (num_written := text.count(token)) != len(pictures):
        raise DataError(
            f'{row}: the chat template wrote {num_written} "{token}", the row has '
            f"{count_images(len(pictures))}. Name a template in model.chat_template that writes them "
            "in every role."
        )


def check_bos(tokenizer: Any, text: str, row: str) -> None:
    """Raises: DataError where the ids would begin with two BOS, or hold one that the template wrote later."""
    bos = tokenizer.bos_token
    if not bos or bos == tokenizer.eos_token:
        return
    if text.startswith(2 * bos):
        raise DataError(f"{row}: the text begins with two {bos}. Remove one from model.chat_template.")
    if bos in text and not text.startswith(bos):
        raise DataError(
            f"{row}: the chat template writes {bos}, but not first. Move it in model.chat_template."
        )
