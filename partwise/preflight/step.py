"""Real forward and backward passes on the weights and the longest rows of the run; nothing is changed.

In: a Context. Out: Findings: the loss is finite and the model's own, gradients reach every trainable tensor
and no other, none runs through a frozen tower, and each part gives the dtype of the weights. Whether the
loss is a good one is for loss.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch.nn.functional import cross_entropy

from partwise.data.collate import collate
from partwise.preflight.boundary import Crossings, watched
from partwise.preflight.context import Context
from partwise.preflight.probe import (
    examples_at,
    first_examples,
    num_searched_steps,
    probe_batches,
    reached_by_images,
    usable_rows,
)
from partwise.records import IGNORE_INDEX, Batch, Example, Finding, PartPlan
from partwise.training.job import Job
from partwise.training.probe import measuring, untouched
from partwise.training.step import batch_loss_sum, model_inputs

# How far our loss may be from the one computed from the model's own logits, relative, by weight type.
LOSS_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
# How many rows of a pack are compared with each of them alone.
NUM_PACKED = 3


@dataclass
class Gradients:
    """What the backward passes of all probes left: names of tensors with a gradient, and of faulty ones."""

    reached: set[str] = field(default_factory=set)
    nonzero: set[str] = field(default_factory=set)
    broken: dict[str, str] = field(default_factory=dict)


def check_step(context: Context) -> list[Finding]:
    """One real step on the longest rows: the loss is the model's own, gradients reach exactly what trains.

    Where rows are mixed, also on a micro-batch of text and one with images.

    Raises:
        DataError: no row can be used.
    """
    batches = probe_batches(context)
    try:
        return list(step_findings(context, batches))
    except torch.OutOfMemoryError:
        batch = batches[0]
        text = f"the longest micro-batch, {tuple(batch.input_ids.shape)} tokens, does not fit in memory"
        fix = "Lower train.micro_batch_size or data.max_seq_len, or set train.gradient_checkpointing: true."
        return [Finding("step", "error", text, batch_rows(batch), fix)]


def step_findings(context: Context, batches: Sequence[Batch]) -> Iterator[Finding]:
    """Raises: torch.OutOfMemoryError."""
    job, model = context.job, context.loaded.model
    own_loss = list(check_own_loss(job, model, reference_examples(context)))
    yield from own_loss
    if any(finding.level == "error" for finding in own_loss):
        return
    gradients, crossings = run_probes(job, model, batches)
    yield from check_gradients(job, gradients, batches)
    yield from check_crossings(job, crossings, model.dtype, batches[0])


def reference_examples(context: Context) -> list[Example]:
    """The shortest row, with an image where one has any: whole logits of a long one may not fit in memory.

    Where rows are packed, also the next ones: they must not see each other.
    """
    rows, usable, packs = context.train_scan.rows, usable_rows(context), context.job.packs
    usable.sort(key=lambda i: (not rows[i].image_sizes, rows[i].num_tokens))
    size = 1 if packs is None else min(NUM_PACKED, context.config.train.global_batch_size)
    return examples_at(context, usable[:size]) or first_examples(context.job)[:size]


def run_probes(job: Job, model: torch.nn.Module, batches: Sequence[Batch]) -> tuple[Gradients, Crossings]:
    """One backward pass per batch, as training makes it."""
    gradients = Gradients()
    with untouched(model), watched(model, job.plan) as crossings:
        for batch in batches:
            loss = batch_loss_sum(model, batch, job.device) / batch.num_target_tokens
            # Text-only rows have no graph when only the vision side trains.
            if loss.requires_grad:
                loss.backward()
            for name, parameter in model.named_parameters():
                if parameter.grad is None:
                    continue
                gradients.reached.add(name)
                if not parameter.grad.isfinite().all():
                    gradients.broken.setdefault(name, batch_rows(batch))
                elif parameter.grad.any():
                    gradients.nonzero.add(name)
            model.zero_grad(set_to_none=True)
    return gradients, crossings


def check_own_loss(job: Job, model: torch.nn.Module, examples: Sequence[Example]) -> Iterator[Finding]:
    """The loss is finite, and equal to cross-entropy on the logits that the model itself returns of each row
    alone, under its own mask."""
    batch = collate(examples, job.pad_token_id, job.packs)
    alone = [collate([example], job.pad_token_id) for example in examples]
    with measuring(model):
        ours = batch_loss_sum(model, batch, job.device).item() / batch.num_target_tokens
        sums = [reference_loss_sum(model, row, job.device) for row in alone]
    reference = sum(sums) / batch.num_target_tokens
    rows = batch_rows(batch)
    if not math.isfinite(ours):
        fix = "Try model.dtype=float32; check the weights."
        yield Finding("step", "error", f"the first loss is {ours}", rows, fix)
        return
    tolerance = LOSS_TOLERANCE[model.dtype]
    if abs(ours - reference) > tolerance * max(1.0, abs(reference)):
        text = (
            f"the loss from hidden states is {ours:.4f} but the model's own logits give {reference:.4f}: "
            f"{type(model).__name__} changes its logits in a way that Partwise does not know"
        )
        yield Finding("step", "error", text, rows, "This model class cannot be trained with this version.")
        return
    text = f"the loss is the model's own: {ours:.3f} on {batch.num_target_tokens} target tokens"
    yield Finding("step", "info", text, rows, values={"loss": ours, "reference_loss": reference})


def reference_loss_sum(model: torch.nn.Module, batch: Batch, device: torch.device) -> float:
    """Summed loss of the batch from the logits of the model's whole forward."""
    logits = model(**model_inputs(model, batch, device)).logits[:, :-1].float()
    labels = batch.labels[:, 1:].to(device)
    return cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
    ).item()


def check_gradients(job: Job, gradients: Gradients, batches: Sequence[Batch]) -> Iterator[Finding]:
    """Every trainable tensor has a finite gradient, and no frozen one has any."""
    for part in job.plan.parts:
        yield from part_findings(job, part, gradients, batches)
    trainable = set(job.plan.trainable)
    if leaked := sorted(gradients.reached - trainable):
        yield Finding("step", "error", f"{len(leaked)} frozen tensors got a gradient: {shorten(leaked)}")
    tokens = batches[0].input_ids.shape
    text = (
        f"gradients reach {len(gradients.reached & trainable)} of {len(trainable)} trainable tensors; "
        f"the longest micro-batch is {tokens[0]} x {tokens[1]} tokens"
    )
    yield Finding("step", "info", text, batch_rows(batches[0]))


def part_findings(
    job: Job, part: PartPlan, gradients: Gradients, batches: Sequence[Batch]
) -> Iterator[Finding]:
    rows = ", ".join(batch_rows(batch) for batch in batches)
    missing = [name for name in part.trainable if name not in gradients.reached]
    if missing and reached_by_images(part) and not any(batch.media for batch in batches):
        num_rows = min(num_searched_steps(job) * job.config.train.global_batch_size, len(job.rows))
        text = (
            f"{part.part} is set to train, but none of the {num_rows} rows that the run reads first has "
            "an image that can be used, so no gradient can reach it"
        )
        fix = f"Give rows with images, or set parts.{part.part} to frozen."
        yield Finding("step", "error", text, rows, fix)
        return
    if missing and all(".experts." in name for name in missing):
        text = f"{len(missing)} expert tensors of {part.part} got no token of these rows: {shorten(missing)}"
        yield Finding("step", "warning", text, rows, "A first step that gives them none stops the run.")
    elif missing:
        text = (
            f"no gradient reaches {len(missing)} of the {len(part.trainable)} tensors of {part.part} "
            f"that the plan trains: {shorten(missing)}"
        )
        fix = "Freeze them with a layer range, or report the model family."
        yield Finding("step", "error", text, rows, fix)
    broken = [name for name in part.trainable if name in gradients.broken]
    if broken:
        text = f"the gradient of {shorten(broken)} is not finite"
        yield Finding("step", "error", text, gradients.broken[broken[0]], "Use model.dtype=float32.")
    elif part.trainable and not missing and not gradients.nonzero.intersection(part.trainable):
        # An adapter's B is zero at the start, so A's gradient is; B's own is not.
        text = f"every gradient of {part.part} is exactly zero: what it computes does not change the loss"
        yield Finding(
            "step", "warning", text, rows, f"Look at the weights, or set parts.{part.part} to frozen."
        )


def check_crossings(job: Job, crossings: Crossings, dtype: torch.dtype, batch: Batch) -> Iterator[Finding]:
    """No graph in a frozen tower, and each part's output in the dtype of the model's weights."""
    for part, names in crossings.backward.items():
        text = (
            f"{part} is frozen, but the backward pass runs through {len(names)} of its modules "
            f"({shorten(sorted(names))}): memory and time for gradients that nothing uses"
        )
        fix = "Something makes the tower's inputs require gradients; remove that hook or model code."
        yield Finding("step", "warning", text, batch_rows(batch), fix)
    for part, found in crossings.dtypes.items():
        if other := sorted(str(d).removeprefix("torch.") for d in found - {dtype}):
            text = f"{part} gives {', '.join(other)}, but the weights are {str(dtype).removeprefix('torch.')}"
            fix = "The model's code casts there: expect more memory than the weights' type suggests."
            yield Finding("step", "warning", text, job.config.where("model.dtype"), fix)


def batch_rows(batch: Batch) -> str:
    more = len(batch.rows) - 1
    return batch.rows[0] + (f" and {more} more rows" if more else "")


def shorten(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
