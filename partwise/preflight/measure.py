"""The loss of a few rows, as it is and changed on purpose: numbers for loss.py and doctor.py.

In: a model and examples. Out: losses in nats. Each row is computed alone, so padding and its neighbours
cannot matter. Nothing is judged here.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from partwise.data.collate import collate
from partwise.model.head import logit_softcap, token_loss_sum
from partwise.records import IGNORE_INDEX, Batch, Example, StepData
from partwise.training.probe import measuring
from partwise.training.step import accumulate_loss, model_inputs


@dataclass(frozen=True)
class Patient:
    """A model with rows on which its loss is measured, and what is known of how the rows were made.

    `answers` says of each token of each example whether it belongs to the text of an answer.
    `micro_batches` are the same examples as training would batch them, for the loss that it would report.
    `others` are the same rows made in another way, by the words for it. `pixel_stats` are mean and deviation
    that the image processor normalises with.
    """

    model: Any
    examples: tuple[Example, ...]
    device: torch.device
    pad_token_id: int = 0
    bos_token_id: int | None = None
    special_ids: frozenset[int] = frozenset()
    media_ids: frozenset[int] = frozenset()
    answers: tuple[Tensor, ...] | None = None
    micro_batches: tuple[Batch, ...] = ()
    others: dict[str, tuple[Example, ...]] = field(default_factory=dict)
    pixel_stats: tuple[float, float] | None = None


def mean_loss(
    patient: Patient, examples: Sequence[Example] | None = None, head: nn.Module | None = None
) -> float:
    """Mean loss over the target tokens of the patient's examples, or of others in their place."""
    examples = patient.examples if examples is None else examples
    num_targets = sum(int((example.labels[1:] != IGNORE_INDEX).sum()) for example in examples)
    return sum(row_losses(patient, examples, head)) / num_targets if num_targets else math.nan


def row_losses(patient: Patient, examples: Sequence[Example], head: nn.Module | None = None) -> list[float]:
    """The loss of each example, summed over its target tokens. `head` stands in for the model's own."""
    with measuring(patient.model):
        return [
            labels_loss(patient, hidden_states(patient, example), example.labels, head)
            for example in examples
        ]


def hidden_states(patient: Patient, example: Example) -> Tensor:
    """What the decoder gives for the example alone, (1, T, D)."""
    batch = collate([example], patient.pad_token_id)
    inputs = model_inputs(patient.model, batch, patient.device)
    return patient.model.base_model(**inputs).last_hidden_state


def labels_loss(patient: Patient, hidden: Tensor, labels: Tensor, head: nn.Module | None = None) -> float:
    """The loss summed over the labels of one example, unshifted, (T,)."""
    if not bool((labels[1:] != IGNORE_INDEX).any()):
        return 0.0
    head = head or patient.model.get_output_embeddings()
    return token_loss_sum(hidden, labels[None], head, logit_softcap(patient.model)).item()


def training_loss(patient: Patient) -> float:
    """The loss that a training step over the patient's micro-batches would report, dropout aside."""
    with measuring(patient.model):
        return accumulate_loss(patient.model, StepData(0, patient.micro_batches), patient.device).item()


def kind_losses(patient: Patient) -> dict[str, float]:
    """Mean loss by kind of token, prompts included; kinds that do not come are left out."""
    sums: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    answers = patient.answers or [example.labels != IGNORE_INDEX for example in patient.examples]
    with measuring(patient.model):
        for example, answer in zip(patient.examples, answers, strict=True):
            hidden = hidden_states(patient, example)
            for kind, mask in token_kinds(patient, example, answer).items():
                labels = example.input_ids.where(mask, IGNORE_INDEX)
                sums[kind] += labels_loss(patient, hidden, labels)  # type: ignore[assignment]
                counts[kind] += int(mask[1:].sum())
    return {kind: sums[kind] / number for kind, number in counts.items() if number}


def token_kinds(patient: Patient, example: Example, answer: Tensor) -> dict[str, Tensor]:
    """Which tokens of the example are of each kind, (T,); images count only where they are labels."""
    ids = example.input_ids
    media = torch.isin(ids, torch.tensor(sorted(patient.media_ids), dtype=ids.dtype))
    special = torch.isin(ids, torch.tensor(sorted(patient.special_ids), dtype=ids.dtype)) & ~media
    word = ~special & ~media
    follows = torch.cat([answer.new_zeros(1), answer[:-1]])
    return {
        "image": media & (example.labels != IGNORE_INDEX),
        "control": special & ~answer,
        "prompt": word & ~answer,
        "first of the answer": word & answer & ~follows,
        "rest of the answer": word & answer & follows,
        "end of the answer": special & answer,
    }


def unigram_entropy(examples: Sequence[Example]) -> float:
    """Nats per target token for one who knows how often each token is a label, and nothing else."""
    counts = Counter(label for e in examples for label in e.labels[1:].tolist() if label != IGNORE_INDEX)
    total = counts.total()
    return -sum(count / total * math.log(count / total) for count in counts.values())


def has_learned(model: Any) -> bool:
    """Whether the decoder was ever trained: its norms and biases start as constants, and training moves them.

    A model without any is taken for trained: its loss then decides.
    """
    vectors = [p for name, p in model.get_decoder().named_parameters() if p.ndim == 1 and "lora_" not in name]
    return not vectors or any(bool((vector != vector[0]).any()) for vector in vectors if vector.numel())


def with_labels(example: Example, labels: Tensor) -> Example:
    return replace(example, labels=labels, num_target_tokens=int((labels != IGNORE_INDEX).sum()))


def keep_tokens(example: Example, is_kept: Tensor) -> Example:
    """The example without the other tokens."""
    shorter = replace(
        example,
        input_ids=example.input_ids[is_kept],
        token_fields={name: values[is_kept] for name, values in example.token_fields.items()},
    )
    labels = example.labels[is_kept].clone()
    labels[:1] = IGNORE_INDEX
    return with_labels(shorter, labels)


def change_pixels(example: Example, change: Any) -> Example:
    """The example with its pixels, which are the image inputs that are not whole numbers, changed."""
    media = {n: change(t) if t.is_floating_point() else t for n, t in example.media.items()}
    return replace(example, media=media)
