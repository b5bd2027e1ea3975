"""Conversation -> Example: the model's own chat template, tokens, and the label mask.

In: a Conversation. Out: its ids, labels, other per-token fields and image inputs, made by one call of the
model's processor, or a Dropped with its reason. Only answers are labels: never a prompt, an image or the
first token. Padding is collate.py's.

A token is a label if it holds any character of a trained answer: " red" after "ASSISTANT:" is one.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from PIL import Image as PILImage
from transformers import BatchFeature

from partwise.data.images import decode_image
from partwise.data.rows import count_images, row_name
from partwise.data.template import Span, chat_template, render, render_answers, special_tokens, tokenizer_of
from partwise.errors import ConfigError, DataError
from partwise.records import IGNORE_INDEX, Conversation, Dropped, Example, Text

DROP_REASONS = ("too long", "image would be cut", "no target token")

Overlong = Literal["truncate", "drop", "error"]


@dataclass(frozen=True)
class Encoded:
    """A whole conversation in tokens, before max_seq_len. `images_end` is one past the last image token."""

    example: Example
    images_end: int


class ChatFormat:
    """Turns Conversations into Examples of at most `max_seq_len` tokens. May be sent to other processes.

    `media_token_ids` stand for media in the ids and are never labels.

    Raises:
        ConfigError: the model has no chat template, or its tokenizer cannot tell where its tokens stand.
    """

    def __init__(
        self, processor: Any, media_token_ids: frozenset[int], max_seq_len: int, overlong: Overlong
    ) -> None:
        chat_template(processor)
        if not tokenizer_of(processor).is_fast:
            raise ConfigError(
                "model.path: the model has only a slow tokenizer, which cannot tell where its tokens "
                "stand in the text. Add its tokenizer.json to the model folder."
            )
        self.processor = processor
        self.media_token_ids = media_token_ids
        self.max_seq_len = max_seq_len
        self.overlong = overlong
        self.control = control_pattern(processor)
        self.special_tokens = special_tokens(processor)

    def __call__(self, conversation: Conversation) -> Example | Dropped:
        """The example, or why the row gives none.

        Raises:
            DataError: the row cannot be used; or it is too long and `overlong` is "error".
        """
        return self.fit(self.encode(conversation))

    def encode(self, conversation: Conversation) -> Encoded:
        """All tokens of the conversation, however long.

        Raises:
            DataError: an image cannot be read, the chat template or the processor refuses the row, or a text
                holds one of the model's control tokens.
        """
        row = row_name(conversation.source, conversation.row)
        check_control_tokens(conversation, self.control, row)
        text, answers = render_answers(self.processor, conversation.messages, row, self.special_tokens)
        inputs = run_processor(self.processor, text, conversation, row)
        offsets = inputs.pop("offset_mapping")[0]
        replacements = [r for sample in inputs.pop("text_replacement_offsets", []) for r in sample]
        input_ids = inputs.pop("input_ids")[0]
        inputs.pop("attention_mask", None)
        images = [overlap(offsets, r["new_span"]) for r in replacements]
        is_image = torch.stack(images).any(0) if images else torch.zeros_like(input_ids, dtype=torch.bool)
        is_answer = torch.zeros_like(is_image)
        for span in answers:
            is_answer |= overlap(offsets, expanded_span(span, replacements))
        is_media = torch.isin(input_ids, torch.tensor(sorted(self.media_token_ids), dtype=input_ids.dtype))
        is_answer &= ~(is_image | is_media)
        is_answer[:1] = False
        num_tokens = len(input_ids)
        fields = {k: v for k, v in inputs.items() if tuple(v.shape) == (1, num_tokens)}
        example = Example(
            input_ids=input_ids,
            labels=input_ids.where(is_answer, IGNORE_INDEX),
            token_fields={k: v[0] for k, v in fields.items()},
            media={k: v for k, v in inputs.items() if k not in fields},
            num_target_tokens=int(is_answer.sum()),
            source=conversation.source,
            row=conversation.row,
        )
        taken = (is_image | is_media).nonzero()
        return Encoded(example, images_end=int(taken[-1]) + 1 if len(taken) else 0)

    def fit(self, encoded: Encoded) -> Example | Dropped:
        """The example within max_seq_len: cut on the right, but never inside or before an image.

        Raises:
            DataError: it is too long and `overlong` is "error".
        """
        example = encoded.example
        num_tokens = len(example.input_ids)
        if num_tokens > self.max_seq_len:
            if self.overlong == "error":
                raise DataError(
                    f"{row_name(example.source, example.row)}: the row has {num_tokens} tokens, "
                    f"data.max_seq_len is {self.max_seq_len}. Shorten the row, raise the limit, or set "
                    "data.overlong to truncate or drop."
                )
            if self.overlong == "drop":
                return Dropped("too long", example.source, example.row)
            if encoded.images_end > self.max_seq_len:
                return Dropped("image would be cut", example.source, example.row)
            example = truncate(example, self.max_seq_len)
        if example.num_target_tokens == 0:
            return Dropped("no target token", example.source, example.row)
        return example


def prompt_inputs(processor: Any, conversation: Conversation) -> BatchFeature:
    """The model's inputs for the next answer: tensors of one row, (1, T), and image inputs.

    Raises:
        DataError: as for an example; the row is named by the conversation's source and row.
    """
    row = row_name(conversation.source, conversation.row)
    check_control_tokens(conversation, control_pattern(processor), row)
    text = render(processor, conversation.messages, row, add_generation_prompt=True)
    inputs = run_processor(processor, text, conversation, row)
    return BatchFeature(
        {k: v for k, v in inputs.items() if k not in ("offset_mapping", "text_replacement_offsets")}
    )


def control_pattern(processor: Any) -> re.Pattern[str]:
    """Matches every string that the tokenizer or the processor reads as a control token."""
    tokens = {*special_tokens(processor), *getattr(processor, "all_special_multimodal_tokens", ())}
    longest_first = sorted(tokens, key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def check_control_tokens(conversation: Conversation, control: re.Pattern[str], row: str) -> None:
    for i, message in enumerate(conversation.messages):
        for content in message.contents:
            match = control.search(content.text) if isinstance(content, Text) else None
            if match:
                raise DataError(
                    f'{row}: the text of message {i} contains "{match.group()}", a control token of this '
                    "model: it would be read as the end of a turn or as an image, not as text. Rewrite it."
                )


def run_processor(processor: Any, text: str, conversation: Conversation, row: str) -> dict[str, Any]:
    """What the processor or tokenizer makes of the text and the images: tensors with one row, and offsets.

    BOS comes from the template where it writes one, otherwise from the tokenizer if it adds one.
    """
    tokenizer = tokenizer_of(processor)
    bos = tokenizer.bos_token
    options = {
        "add_special_tokens": not (bos and text.startswith(bos)),
        "return_offsets_mapping": True,
        "return_tensors": "pt",
    }
    pictures = [decode_image(image, row) for image in conversation.images]
    if tokenizer is processor:
        if pictures:
            raise DataError(f"{row}: the row has images, but the model is a text model. Drop the images.")
        return checked_bos(tokenizer, dict(tokenizer([text], **options)), row)
    check_placeholders(processor, text, pictures, row)
    try:
        inputs = processor(
            text=[text],
            images=[pictures] if pictures else None,
            return_text_replacement_offsets=True,
            **options,
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
    return checked_bos(tokenizer, dict(inputs), row)


def check_placeholders(processor: Any, text: str, pictures: Sequence[PILImage.Image], row: str) -> None:
    """Raises: DataError where the template did not write one placeholder for each image."""
    num_written = text.count(processor.image_token)
    if num_written != len(pictures):
        raise DataError(
            f'{row}: the chat template wrote {num_written} "{processor.image_token}", the row has '
            f"{count_images(len(pictures))}. Name a template in model.chat_template that writes them "
            "in every role."
        )


def checked_bos(tokenizer: Any, inputs: dict[str, Any], row: str) -> dict[str, Any]:
    bos = tokenizer.bos_token_id
    if bos is not None and inputs["input_ids"][0, :2].tolist() == [bos, bos]:
        raise DataError(
            f"{row}: the text begins with two {tokenizer.bos_token}. Remove one from model.chat_template."
        )
    return inputs


def expanded_span(span: Span, replacements: Sequence[dict[str, Any]]) -> Span:
    """The span after placeholders before it grew.

    A placeholder at characters (2, 9) that became (2, 30) moves the span (12, 15) to (33, 36).
    """
    ends = [r["span"][1] for r in replacements]
    gained = [0] + [r["new_span"][1] - r["span"][1] for r in replacements]
    start, end = (char + gained[bisect.bisect_right(ends, char)] for char in span)
    return start, end


def overlap(offsets: torch.Tensor, span: Span) -> torch.Tensor:
    """Which tokens hold any character of the span: (T,) bool from offsets (T, 2). Empty tokens hold none."""
    start, end = span
    return (offsets[:, 0] < end) & (offsets[:, 1] > start) & (offsets[:, 1] > offsets[:, 0])


def truncate(example: Example, num_tokens: int) -> Example:
    labels = example.labels[:num_tokens]
    return replace(
        example,
        input_ids=example.input_ids[:num_tokens],
        labels=labels,
        token_fields={k: v[:num_tokens] for k, v in example.token_fields.items()},
        num_target_tokens=int((labels != IGNORE_INDEX).sum()),
    )
