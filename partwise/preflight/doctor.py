"""Why is the first loss of a trained model far too high? The usual causes, each tried on the same rows.

In: a Patient. Out: the trials that explain the loss, best first, with the loss before and after. A cause is
named only if undoing it makes the loss clearly lower; the model is as before after each trial.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from partwise.model.tower import attention_setting
from partwise.preflight.measure import (
    Patient,
    change_pixels,
    keep_tokens,
    mean_loss,
    training_loss,
    with_labels,
)
from partwise.records import IGNORE_INDEX, Example

# Undoing a cause must win this much: in nats, and as a part of the loss before.
LEAST_GAIN = 0.5
LEAST_GAIN_FRACTION = 0.2


@dataclass(frozen=True)
class Trial:
    """`before` and `after` are losses on the same target tokens, unless the cause lies in which those are."""

    cause: str
    before: float
    after: float
    fix: str

    @property
    def explains(self) -> bool:
        if not math.isfinite(self.after):
            return False
        gain = self.before - self.after
        return not math.isfinite(self.before) or gain > max(LEAST_GAIN, LEAST_GAIN_FRACTION * self.before)


def diagnose(patient: Patient, before: float, causes: Sequence[Cause] | None = None) -> list[Trial]:
    """The trials that explain the loss `before`, the lowest loss first."""
    tried = [trial for cause in causes or CAUSES for trial in cause(patient, before)]
    return sorted((trial for trial in tried if trial.explains), key=lambda trial: trial.after)


def try_bos(patient: Patient, before: float) -> Iterator[Trial]:
    """BOS once, where rows begin with none or two."""
    bos = patient.bos_token_id
    if bos is None:
        return
    counts = [leading(example.input_ids, bos) for example in patient.examples]
    fix = "Change how model.chat_template or the tokenizer writes BOS."
    if all(count == 0 for count in counts):
        after = mean_loss(patient, [put_first(example, bos) for example in patient.examples])
        yield Trial("the rows begin without BOS", before, after, fix)
    elif any(count > 1 for count in counts):
        examples = [
            keep_tokens(e, torch.arange(len(e.input_ids)) >= max(count - 1, 0))
            for e, count in zip(patient.examples, counts, strict=True)
        ]
        yield Trial("the rows begin with more than one BOS", before, mean_loss(patient, examples), fix)


def leading(ids: Tensor, token: int) -> int:
    """How often the token stands at the beginning."""
    return int((ids == token).long().cumprod(0).sum())


def put_first(example: Example, token: int) -> Example:
    def longer(values: Tensor, first: int) -> Tensor:
        return torch.cat([values.new_tensor([first]), values])

    return replace(
        example,
        input_ids=longer(example.input_ids, token),
        labels=longer(example.labels, IGNORE_INDEX),
        token_fields={name: longer(values, 0) for name, values in example.token_fields.items()},
    )


def try_other_rows(patient: Patient, before: float) -> Iterator[Trial]:
    """The same rows made in other ways, such as by the model's own chat template."""
    for words, examples in patient.others.items():
        fix = "Leave model.chat_template out, or give the one that the model was trained with."
        cause = f"the rows are not written as the model knows them; with {words} it knows them better"
        yield Trial(cause, before, mean_loss(patient, examples), fix)


def try_without_control(patient: Patient, before: float) -> Iterator[Trial]:
    """Prompt and answer without the template's control tokens, judged on the words of the answers."""
    marks = patient.special_ids - patient.media_ids - {patient.bos_token_id}
    if not marks:
        return
    is_mark = [torch.isin(e.input_ids, torch.tensor(sorted(marks))) for e in patient.examples]
    words = [
        with_labels(e, e.labels.masked_fill(mark, IGNORE_INDEX))
        for e, mark in zip(patient.examples, is_mark, strict=True)
    ]
    bare = [keep_tokens(e, ~mark) for e, mark in zip(words, is_mark, strict=True)]
    if any(mark.any() for mark in is_mark):
        fix = "A base model knows no chat: use the instruction-tuned one, or train the new tokens first."
        cause = "the model does not know the chat template's control tokens"
        yield Trial(cause, mean_loss(patient, words), mean_loss(patient, bare), fix)


def try_unshifted_labels(patient: Patient, before: float) -> Iterator[Trial]:
    """Labels at their own tokens, where they were shifted already."""
    shifted = [restored_labels(e, by) for by in (1, -1) for e in patient.examples]
    half = len(patient.examples)
    for rows in (shifted[:half], shifted[half:]):
        examples = [e for e in rows if e is not None]
        if len(examples) == half:
            fix = "Give labels[t] = input_ids[t]: the loss makes the shift itself."
            yield Trial("the labels are shifted already", before, mean_loss(patient, examples), fix)


def restored_labels(example: Example, by: int) -> Example | None:
    """The example with its labels moved `by` tokens, where they then match its ids and now they do not."""
    moved = torch.full_like(example.labels, IGNORE_INDEX)
    if by > 0:
        moved[by:] = example.labels[:-by]
    else:
        moved[:by] = example.labels[-by:]
    moved[:1] = IGNORE_INDEX
    matches = [label_matches(example.input_ids, labels) for labels in (example.labels, moved)]
    return with_labels(example, moved) if matches[0] < 0.99 <= matches[1] else None


def label_matches(ids: Tensor, labels: Tensor) -> float:
    """The fraction of the labels that are their own token."""
    is_label = labels != IGNORE_INDEX
    return float((labels == ids)[is_label].float().mean()) if bool(is_label.any()) else 0.0


def try_answers_alone(patient: Patient, before: float) -> Iterator[Trial]:
    """No label on image tokens, and none outside the answers."""
    media = torch.tensor(sorted(patient.media_ids), dtype=torch.long)
    is_media = [torch.isin(e.labels, media) for e in patient.examples]
    if any(found.any() for found in is_media):
        examples = mask_labels(patient, is_media)
        yield Trial("image tokens are labels", before, mean_loss(patient, examples), "Mask them.")
    if patient.answers is None:
        return
    others = [~answer for answer in patient.answers]
    pairs = zip(patient.examples, others, is_media, strict=True)
    if any(bool(((e.labels != IGNORE_INDEX) & other & ~found).any()) for e, other, found in pairs):
        after = mean_loss(patient, mask_labels(patient, others))
        yield Trial("tokens of the prompts are labels", before, after, "Train the answers alone.")


def mask_labels(patient: Patient, masks: list[Tensor]) -> list[Example]:
    return [
        with_labels(e, e.labels.masked_fill(mask, IGNORE_INDEX))
        for e, mask in zip(patient.examples, masks, strict=True)
    ]


def try_scale(patient: Patient, before: float) -> Iterator[Trial]:
    """The mean over target tokens, where a training step reports a multiple of it."""
    number = len(patient.micro_batches)
    if number < 2 or not before > 0:
        return
    reported = training_loss(patient)
    if abs(reported / before - number) < 0.02 * number:
        cause = f"a training step multiplies the loss by its {number} micro-batches"
        yield Trial(cause, reported, before, "Divide the sum by the target tokens of the whole step.")


def try_attention(patient: Patient, before: float) -> Iterator[Trial]:
    """Another attention implementation."""
    used = patient.model.config._attn_implementation
    other = "sdpa" if used == "eager" else "eager"
    try:
        with attention(patient.model, other):
            after = mean_loss(patient)
    except ValueError:  # transformers' answer where the model's class has no such attention
        return
    yield Trial(
        f"attention by {used} is not what {other} gives", before, after, f"Set model.attention: {other}."
    )


@contextmanager
def attention(model: Any, implementation: str) -> Iterator[None]:
    """A block in which the whole model attends by `implementation`."""
    used = {"": model.config._attn_implementation}
    for name in model.config.sub_configs:
        if (part := getattr(model.config, name, None)) is not None:
            used[name] = part._attn_implementation
    try:
        model.set_attn_implementation(attention_setting(model, implementation))
        yield
    finally:
        model.set_attn_implementation(used)


def try_pixels(patient: Patient, before: float) -> Iterator[Trial]:
    """Pixels scaled and normalised in other ways."""
    if patient.pixel_stats is None or not any(example.media for example in patient.examples):
        return
    mean, std = patient.pixel_stats
    changes: dict[str, Callable[[Tensor], Tensor]] = {
        "divided by 255": lambda x: x / 255,
        "multiplied by 255": lambda x: x * 255,
        "normalised once more": lambda x: (x - mean) / std,
        "normalised once less": lambda x: x * std + mean,
        "divided by 255 and normalised": lambda x: (x / 255 - mean) / std,
    }
    for words, change in changes.items():
        after = mean_loss(patient, [change_pixels(example, change) for example in patient.examples])
        fix = "Restore the model's own preprocessor_config.json."
        yield Trial(f"the pixels are not as the model knows them; {words} they are", before, after, fix)


def try_tied_head(patient: Patient, before: float) -> Iterator[Trial]:
    """The token embeddings as output head, where the head has weights of its own."""
    head = patient.model.get_output_embeddings()
    weight = patient.model.get_input_embeddings().weight
    if head.weight.shape != weight.shape or head.weight.data_ptr() == weight.data_ptr():
        return
    tied = nn.Linear(*reversed(weight.shape), bias=False, device="meta")
    tied.weight = weight
    fix = "Set tie_word_embeddings: true in the model's config.json, or copy the head's weights again."
    cause = "the output head is not the one that was trained: the embeddings in its place do better"
    yield Trial(cause, before, mean_loss(patient, head=tied), fix)


def try_float32(patient: Patient, before: float) -> Iterator[Trial]:
    """The same weights computed in float32."""
    if patient.model.dtype == torch.float32 or not fits_in_float32(patient):
        return
    used = str(patient.model.dtype).removeprefix("torch.")
    with float32_weights(patient.model):
        after = mean_loss(patient)
    yield Trial(
        f"{used} is too coarse or too narrow for this model", before, after, "Set model.dtype: float32."
    )


def fits_in_float32(patient: Patient) -> bool:
    if patient.device.type != "cuda":
        return True
    free, _ = torch.cuda.mem_get_info(patient.device)
    return free > 4 * sum(p.numel() for p in patient.model.parameters())


@contextmanager
def float32_weights(model: Any) -> Iterator[None]:
    """A block in which all parameters but packed ones are float32; narrower floats come back bit for bit."""
    dtypes = {
        name: p.dtype
        for name, p in model.named_parameters()
        if p.is_floating_point() and p.dtype != torch.float32
    }
    for name in dtypes:
        model.get_parameter(name).data = model.get_parameter(name).data.float()
    try:
        yield
    finally:
        for name, dtype in dtypes.items():
            model.get_parameter(name).data = model.get_parameter(name).data.to(dtype)


Cause = Callable[[Patient, float], Iterator[Trial]]
CAUSES: list[Cause] = [
    try_bos,
    try_other_rows,
    try_without_control,
    try_unshifted_labels,
    try_answers_alone,
    try_scale,
    try_attention,
    try_pixels,
    try_tied_head,
    try_float32,
]
