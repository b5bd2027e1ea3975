"""Conversation -> Example: the model's own chat template, tokens, and the label mask.

In: a Conversation. Out: its ids, labels, other per-token fields and image inputs, made by one call of the
model's processor, or a Dropped with its reason. Only answers are labels: never a prompt, an image or the
first token. Padding is collate.py's.

A token is a label if it holds any character of a trained answer: " red" after "ASSISTANT:" is one.
"""

from __future__ import annotations

import bisect
import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from transformers import BatchFeature

from partwise.data.features import FeatureStore, StoredImage, run_stored
from partwise.data.images import Picture, decode_picture
from partwise.data.pixels import PIXELS, find_pixel_table, processor_options, to_bytes
from partwise.data.rows import row_name
from partwise.data.template import chat_template, render, render_answers, special_tokens, tokenizer_of
from partwise.data.tokens import check_control_tokens, control_pattern, run_processor
from partwise.errors import ConfigError, DataError
from partwise.records import IGNORE_INDEX, Conversation, Dropped, Example, Span

DROP_REASONS = ("too long", "image would be cut", "no target token")

Overlong = Literal["truncate", "drop", "error"]
Rendered = tuple[str, list[Span]]


@dataclass(frozen=True)
class Encoded:
    """A whole conversation in tokens, before max_seq_len. `images_end` is one past the last image token."""

    example: Example
    images_end: int


class ChatFormat:
    """Turns Conversations into Examples of at most `max_seq_len` tokens. May be sent to other processes.

    `media_token_ids` stand for media in the ids and are never labels. With `features`, an example has those
    of its images, which are not even decoded.

    Raises:
        ConfigError: the model has no chat template, or its tokenizer cannot tell where its tokens stand.
    """

    needs_template = True
    splits = False  # whether a row that is too long becomes several examples

    def __init__(
        self,
        processor: Any,
        media_token_ids: frozenset[int],
        max_seq_len: int,
        overlong: Overlong,
        features: FeatureStore | None = None,
    ) -> None:
        if self.needs_template:
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
        self.features = features
        self.control = control_pattern(processor)
        self.special_tokens = special_tokens(processor)
        self.pixels = find_pixel_table(processor)

    @property
    def with_pixels(self) -> ChatFormat:
        """The same, of whose examples a whole model can be asked."""
        other = copy.copy(self)
        other.features = None
        return other

    def __call__(self, conversation: Conversation) -> Example | Dropped:
        """The example, or why the row gives none.

        Raises:
            DataError: the row cannot be used; or it is too long and `overlong` is "error".
        """
        return self.fit(self.encode(conversation))

    def examples(self, conversation: Conversation) -> list[Example] | Dropped:
        """All examples that the conversation gives. Raises: DataError as when it is called."""
        result = self(conversation)
        return result if isinstance(result, Dropped) else [result]

    def encode(self, conversation: Conversation) -> Encoded:
        """All tokens of the conversation, however long.

        Raises:
            DataError: an image cannot be read, the chat template or the processor refuses the row, or a text
                holds one of the model's control tokens.
        """
        return self.encode_rendered(conversation, self.render(conversation), self.read_images(conversation))

    def read_images(self, conversation: Conversation) -> Sequence[Picture] | Sequence[StoredImage]:
        """The conversation's images, decoded, or what is kept of them.

        Raises:
            DataError: one is missing, broken or too large, or nothing is kept of it.
        """
        if self.features is None:
            return read_pictures(conversation)
        row = row_name(conversation.source, conversation.row)
        return [self.features.get(image, row) for image in conversation.images]

    def render(self, conversation: Conversation) -> Rendered:
        """The conversation as text, and the spans of its answers.

        Raises:
            DataError: the chat template refuses the row, or a text holds one of the model's control tokens.
        """
        row = row_name(conversation.source, conversation.row)
        check_control_tokens(conversation, self.control, row)
        return render_answers(self.processor, conversation.messages, row, self.special_tokens)

    def encode_rendered(
        self,
        conversation: Conversation,
        rendered: Rendered,
        images: Sequence[Picture] | Sequence[StoredImage],
    ) -> Encoded:
        """What `encode` returns, from the steps before it.

        Raises:
            DataError: the processor refuses the row.
        """
        text, answers = rendered
        row = row_name(conversation.source, conversation.row)
        inputs = self._run(text, images, row)
        offsets = inputs.pop("offset_mapping")[0]
        replacements = [r for sample in inputs.pop("text_replacement_offsets", []) for r in sample]
        input_ids = inputs.pop("input_ids")[0]
        inputs.pop("attention_mask", None)
        is_media = torch.isin(input_ids, torch.tensor(sorted(self.media_token_ids), dtype=input_ids.dtype))
        for replacement in replacements:
            is_media[tokens_of(replacement["new_span"], offsets)] = True
        is_answer = torch.zeros_like(is_media)
        for span in answers:
            is_answer[tokens_of(expanded_span(span, replacements), offsets)] = True
        is_answer &= ~is_media
        is_answer[:1] = False
        num_tokens = len(input_ids)
        fields = {k: v for k, v in inputs.items() if tuple(v.shape) == (1, num_tokens)}
        media = {k: v for k, v in inputs.items() if k not in fields}
        pixels = self.pixels if PIXELS in media and self.features is None else None
        example = Example(
            input_ids=input_ids,
            labels=input_ids.where(is_answer, IGNORE_INDEX),
            token_fields={k: v[0] for k, v in fields.items()},
            media=media if pixels is None else to_bytes(media, pixels.has_padding),
            num_target_tokens=int(is_answer.sum()),
            source=conversation.source,
            row=conversation.row,
            pixels=pixels,
            side=conversation.side,
        )
        media_positions = is_media.nonzero()
        return Encoded(example, images_end=int(media_positions[-1]) + 1 if len(media_positions) else 0)

    def _run(self, text: str, images: Sequence[Picture] | Sequence[StoredImage], row: str) -> dict[str, Any]:
        stored = [image for image in images if isinstance(image, StoredImage)]
        if self.features is not None:
            return run_stored(self.processor, text, stored, row)
        pictures = [image.pixels for image in images if isinstance(image, Picture)]
        options = {} if self.pixels is None else processor_options(self.pixels.has_padding)
        return run_processor(self.processor, text, pictures, row, options)

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


def read_pictures(conversation: Conversation) -> list[Picture]:
    """The conversation's images, decoded. Raises: DataError where one is missing, broken or too large."""
    row = row_name(conversation.source, conversation.row)
    return [decode_picture(image, row) for image in conversation.images]


def prompt_inputs(
    processor: Any, conversation: Conversation, features: FeatureStore | None = None
) -> BatchFeature:
    """The model's inputs for the next answer: tensors of one row, (1, T), and image inputs or `features`.

    Raises:
        DataError: as for an example; the row is named by the conversation's source and row.
    """
    row = row_name(conversation.source, conversation.row)
    check_control_tokens(conversation, control_pattern(processor), row)
    text = render(processor, conversation.messages, row, add_generation_prompt=True)
    if features is None:
        pictures = [picture.pixels for picture in read_pictures(conversation)]
        inputs = run_processor(processor, text, pictures, row)
    else:
        stored = [features.get(image, row) for image in conversation.images]
        inputs = run_stored(processor, text, stored, row)
    return BatchFeature(
        {k: v for k, v in inputs.items() if k not in ("offset_mapping", "text_replacement_offsets")}
    )


def expanded_span(span: Span, replacements: Sequence[dict[str, Any]]) -> Span:
    """The span after placeholders before it grew.

    A placeholder at characters (2, 9) that became (2, 30) moves the span (12, 15) to (33, 36).
    """
    ends = [r["span"][1] for r in replacements]
    gained = [0] + [r["new_span"][1] - r["span"][1] for r in replacements]
    start, end = (char + gained[bisect.bisect_right(ends, char)] for char in span)
    return start, end


def tokens_of(span: Span, offsets: torch.Tensor) -> slice:
    """From the first to the last token that holds any character of the span; offsets are (T, 2).

    Tokens between them count, whatever their offsets: some tokenizers give white space none.
    """
    start, end = span
    held = ((offsets[:, 0] < end) & (offsets[:, 1] > start) & (offsets[:, 1] > offsets[:, 0])).nonzero()
    return slice(int(held[0]), int(held[-1]) + 1) if len(held) else slice(0, 0)


def truncate(example: Example, num_tokens: int) -> Example:
    labels = example.labels[:num_tokens]
    return replace(
        example,
        input_ids=example.input_ids[:num_tokens],
        labels=labels,
        token_fields={k: v[:num_tokens] for k, v in example.token_fields.items()},
        num_target_tokens=int((labels != IGNORE_INDEX).sum()),
    )
