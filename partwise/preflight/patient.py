"""The Patient of a run: a few of its rows with its model, and what is known of how the rows were made.

In: a Context and places of its scan. Out: a Patient for loss.py and doctor.py. Nothing is computed on the
model, and nothing is judged here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from partwise.data.chat import ChatFormat
from partwise.data.collate import collate, group_rows
from partwise.data.packing import PackFormat
from partwise.data.pixels import with_own_pixels
from partwise.data.template import tokenizer_of
from partwise.errors import UserError
from partwise.model.load import load_processor
from partwise.preflight.context import Context
from partwise.preflight.measure import Patient
from partwise.preflight.probe import conversation_at, examples_at
from partwise.records import IGNORE_INDEX, Batch, Example, Message, Span, Text


def make_patient(context: Context, places: list[int]) -> Patient:
    job = context.job
    examples = [with_own_pixels(example) for example in examples_at(context, places)]
    tokenizer = tokenizer_of(job.processor)
    special = tokenizer.convert_tokens_to_ids(list(job.chat_format.special_tokens))
    bos = tokenizer.bos_token_id
    return Patient(
        model=context.loaded.model,
        examples=tuple(examples),
        device=job.device,
        pad_token_id=job.pad_token_id,
        bos_token_id=None if bos == tokenizer.eos_token_id else bos,
        special_ids=frozenset(special),
        media_ids=job.chat_format.media_token_ids,
        answers=tuple(answer_masks(context, places)),
        micro_batches=micro_batches(examples, job.config.train.micro_batch_size, job.pad_token_id, job.packs),
        others=other_rows(context, places),
        pixel_stats=None if job.features else pixel_stats(job.processor),
    )


def answer_masks(context: Context, places: list[int]) -> Iterator[Tensor]:
    """Which tokens hold the words of a trained answer or the control token after it, however the chat
    template marks its generations: the examples with only those as labels, where they give one."""
    job = context.job
    for place in places:
        conversation = conversation_at(context, place)
        if not isinstance(example := job.chat_format(conversation), Example):
            continue
        text, spans = job.chat_format.render(conversation)
        answers = [m for m in conversation.messages if m.role == "assistant" and m.train]
        words = [
            span_of_words(text, span, message, job.chat_format.special_tokens)
            for span, message in zip(spans, answers, strict=True)
        ]
        images = job.chat_format.read_images(conversation)
        whole = job.chat_format.encode_rendered(conversation, (text, words), images).example
        yield whole.labels[: len(example.labels)] != IGNORE_INDEX


def span_of_words(text: str, span: Span, message: Message, special: Sequence[str]) -> Span:
    """Within the span: from the first word of the message to its last, and the control token that follows."""
    words = [c.text.strip() for c in message.contents if isinstance(c, Text) and c.text.strip()]
    if not words:
        return span
    start, end = text.index(words[0], span[0]), text.rindex(words[-1], span[0], span[1]) + len(words[-1])
    rest = text[end : span[1]]
    mark = next((mark for mark in special if rest.lstrip().startswith(mark)), "")
    return start, end + (rest.index(mark) + len(mark) if mark else 0)


def micro_batches(
    examples: Sequence[Example], size: int, pad_token_id: int, packs: PackFormat | None = None
) -> tuple[Batch, ...]:
    """The examples as a step of at least two micro-batches, padded or packed as the loader makes them."""
    groups = group_rows([len(example.input_ids) for example in examples], min(size, -(-len(examples) // 2)))
    return tuple(collate([examples[i] for i in group], pad_token_id, packs) for group in groups)


def other_rows(context: Context, places: list[int]) -> dict[str, tuple[Example, ...]]:
    """The rows as the model folder's own chat template writes them, where the config names another."""
    job, model, data = context.job, context.config.model, context.config.data
    if model.chat_template is None:
        return {}
    try:
        processor = load_processor(model.path, model.trust_remote_code)
        ids = job.chat_format.media_token_ids
        own = ChatFormat(processor, ids, data.max_seq_len, data.overlong, job.features)
        results = [own(conversation_at(context, place)) for place in places]
    except UserError:  # the folder has no template, or it refuses the rows: nothing to compare with
        return {}
    examples = tuple(with_own_pixels(result) for result in results if isinstance(result, Example))
    return {"the chat template of the model folder": examples} if examples else {}


def pixel_stats(processor: Any) -> tuple[float, float] | None:
    """Mean and deviation of the image processor, over the channels."""
    image_processor = getattr(processor, "image_processor", None)
    mean, std = getattr(image_processor, "image_mean", None), getattr(image_processor, "image_std", None)
    return (float(np.mean(mean)), float(np.mean(std))) if mean and std else None
