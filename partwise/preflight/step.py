"""One real forward and backward pass, on the weights and rows of the run; nothing is changed by it.

It proves that the loss is finite, that it is the model's own loss, and that gradients reach every trainable
tensor and no other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch.nn.functional import cross_entropy

from partwise.preflight.context import Context
from partwise.records import IGNORE_INDEX, Batch, Finding, PartPlan
from partwise.training.engine import restored_rng
from partwise.training.job import Job
from partwise.training.step import batch_loss_sum, model_inputs

# How far our loss may be from the one computed from the model's own logits, relative, by weight type.
LOSS_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}

# How many rows of text alone may come before the first image, where a part learns from images only.
SEARCHED_ROWS = 10_000


def check_step(context: Context) -> list[Finding]:
    """Findings of one forward and backward pass; weights, gradients and random numbers are as before.

    Raises:
        DataError: no row of the first step can be used.
    """
    job, model = context.job, context.loaded.model
    with restored_rng():
        batch = first_batch(job)
        findings = [*check_loss(job, model, batch)]
        if not any(finding.level == "error" for finding in findings):
            findings += check_gradients(job, model, batch)
        model.zero_grad(set_to_none=True)
    return findings


def first_batch(job: Job) -> Batch:
    """The first micro-batch that holds an image, or else the first one.

    Where only images reach a part that trains, it may be of a later step: rows with images may be rare.
    """
    num_steps = num_searched_steps(job) if any(reached_by_images(part) for part in job.plan.parts) else 1
    return next(image_batches(job, num_steps), None) or job.loader.load_step(0).batches[0]


def image_batches(job: Job, num_steps: int) -> Iterator[Batch]:
    """The micro-batches with images in the first steps; steps of text rows are read, but not prepared."""
    for step in range(num_steps):
        if any(job.rows[row].images for row in job.loader.step_rows(step)):
            yield from (batch for batch in job.loader.load_step(step).batches if batch.media)


def num_searched_steps(job: Job) -> int:
    """How many steps are searched for an image: at most the run, one epoch, or SEARCHED_ROWS."""
    steps = math.ceil(SEARCHED_ROWS / job.config.train.global_batch_size)
    return min(steps, job.num_steps, job.loader.steps_per_epoch)


def reached_by_images(part: PartPlan) -> bool:
    """Whether the part trains, and text alone gives it no gradient."""
    return bool(part.trainable) and part.part != "language_model"


def check_loss(job: Job, model: torch.nn.Module, batch: Batch) -> Iterator[Finding]:
    """The loss is finite, and equal to cross-entropy on the logits that the model itself returns."""
    with torch.no_grad():
        ours = batch_loss_sum(model, batch, job.device).item() / batch.num_target_tokens
        reference = reference_loss(model, batch, job.device)
    rows = f"{batch.rows[0]} and {len(batch.rows) - 1} more rows" if len(batch.rows) > 1 else batch.rows[0]
    if not math.isfinite(ours):
        yield Finding(
            "step", "error", f"the first loss is {ours}", rows, "Try model.dtype=float32; check the weights."
        )
        return
    tolerance = LOSS_TOLERANCE[next(model.parameters()).dtype]
    if abs(ours - reference) > tolerance * max(1.0, abs(reference)):
        yield Finding(
            "step",
            "error",
            f"the loss from hidden states is {ours:.4f} but the model's own logits give {reference:.4f}: "
            f"{type(model).__name__} changes its logits in a way that Partwise does not know",
            rows,
            "This model class cannot be trained with this version.",
        )
        return
    yield Finding(
        "step",
        "info",
        f"first loss {ours:.3f} on {batch.num_target_tokens} target tokens "
        f"(a uniform guess is {math.log(model.get_output_embeddings().weight.shape[0]):.3f})",
        rows,
        values={"loss": ours, "reference_loss": reference},
    )


def reference_loss(model: torch.nn.Module, batch: Batch, device: torch.device) -> float:
    """Mean loss of the batch from the logits of the model's whole forward."""
    logits = model(**model_inputs(model, batch, device)).logits[:, :-1].float()
    labels = batch.labels[:, 1:].to(device)
    total = cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
    return total.item() / batch.num_target_tokens


def check_gradients(job: Job, model: torch.nn.Module, batch: Batch) -> Iterator[Finding]:
    """Every trainable tensor has a finite gradient, and no frozen one has any."""
    model.zero_grad(set_to_none=True)
    loss = batch_loss_sum(model, batch, job.device) / batch.num_target_tokens
    if loss.requires_grad:
        loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    for part in job.plan.parts:
        missing = [name for name in part.trainable if gradients.get(name) is None]
        if missing and reached_by_images(part) and not batch.media:
            num_rows = min(num_searched_steps(job) * job.config.train.global_batch_size, len(job.rows))
            yield Finding(
                "step",
                "error",
                f"{part.part} is set to train, but none of the {num_rows} rows that the run reads first has "
                "an image that can be used, so no gradient can reach it",
                batch.rows[0],
                f"Give rows with images, or set parts.{part.part} to frozen.",
            )
        elif missing:
            yield Finding(
                "step",
                "error",
                f"no gradient reaches {len(missing)} of the {len(part.trainable)} tensors of {part.part} "
                f"that the plan trains: {', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}",
                batch.rows[0],
                "Freeze them with a layer range, or report the model family.",
            )
        broken = [
            n for n in part.trainable if gradients.get(n) is not None and not gradients[n].isfinite().all()
        ]
        if broken:
            yield Finding(
                "step", "error", f"the gradient of {broken[0]} is not finite", batch.rows[0], "Use float32."
            )
    trainable = set(job.plan.trainable)
    leaked = [name for name, gradient in gradients.items() if gradient is not None and name not in trainable]
    if leaked:
        yield Finding(
            "step", "error", f"{len(leaked)} frozen tensors got a gradient: {', '.join(leaked[:3])}"
        )
    reached = sum(gradients.get(name) is not None for name in trainable)
    yield Finding("step", "info", f"gradients reach {reached} of {len(trainable)} trainable tensors")
