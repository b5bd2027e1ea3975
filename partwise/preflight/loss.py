"""Is the first loss one that this model should have, and does it depend on the images?

In: a Context. Out: Findings: the loss beside what a uniform guess and the labels' own frequencies would cost;
for a trained model whose loss is far too high, the cause that doctor.py finds; and the loss with the right,
another and a blank image. A model with random weights cannot be judged, and is only said to be one.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

from partwise.model.tower import lacks_tower
from partwise.preflight.context import Context
from partwise.preflight.doctor import CAUSES, diagnose, try_other_rows, try_scale
from partwise.preflight.measure import (
    Patient,
    change_pixels,
    has_learned,
    kind_losses,
    mean_loss,
    row_losses,
    unigram_entropy,
)
from partwise.preflight.patient import make_patient
from partwise.preflight.probe import examples_at, spread, usable_rows
from partwise.records import IGNORE_INDEX, Example, Finding

# Rows whose labels are counted, rows whose loss is computed, and images that are exchanged.
NUM_COUNTED = 32
NUM_ROWS = 8
NUM_IMAGES = 4
# A loss above this, or this far above the labels' entropy, asks for the doctor.
HIGH = 2.5
HIGH_BY = 0.5
# Within this of a uniform guess, or above it, a loss is no better than one.
LIKE_UNIFORM = 1.0
# A loss this far below the entropy was learned; images that move no row's loss by more do nothing.
LEARNED_BY = 0.5
UNMOVED = 0.02


def check_loss(context: Context) -> list[Finding]:
    """The first loss beside what a guess costs; the cause where it is too high; whether images change it.

    Raises:
        DataError: a row has changed since it was scanned.
    """
    usable = usable_rows(context)
    if not usable:
        return []
    places = spread(usable, NUM_COUNTED)
    entropy = unigram_entropy(examples_at(context, places))
    patient = make_patient(context, spread(places, NUM_ROWS))
    findings = judge_loss(patient, entropy)
    return findings + judge_images(patient, entropy, learned=has_learned(patient.model))


def judge_loss(patient: Patient, entropy: float) -> list[Finding]:
    """The loss in one line, and where it is clearly off the cause, or that none was found."""
    loss = mean_loss(patient)
    uniform = math.log(patient.model.get_output_embeddings().weight.shape[0])
    where = f"{len(patient.examples)} rows"
    values: dict[str, Any] = {"loss": loss, "uniform": uniform, "unigram_entropy": entropy}
    text = (
        f"the first loss is {loss:.3f} (a uniform guess costs {uniform:.3f}, knowing only how often each "
        f"label comes {entropy:.3f})"
    )
    if not has_learned(patient.model):
        text = f"the model starts from random weights: {text}"
        return [Finding("loss", "info", text, where, values=values)]
    is_high = not loss <= min(entropy + HIGH_BY, HIGH)
    values["by_token"] = kind_losses(patient)
    if is_high:
        kinds = ", ".join(f"{kind} {value:.2f}" for kind, value in values["by_token"].items())
        text = f"{text}; by kind of token: {kinds}"
    causes = CAUSES if is_high else [try_other_rows, try_scale]
    if trials := diagnose(patient, loss, causes):
        best = trials[0]
        named = (
            f"{text}. Likely cause: {best.cause}: {best.before:.3f} became {best.after:.3f} with that undone"
        )
        return [Finding("loss", "warning", named, where, best.fix, values | {"loss_after": best.after})]
    if not is_high:
        return [Finding("loss", "info", text, where, values=values)]
    if not math.isfinite(loss) or loss > uniform - LIKE_UNIFORM:
        text = f"{text}: the model is trained, but does no better here than a random one"
        fix = "Look at `partwise preview`; check that weights and tokenizer belong together."
        return [Finding("loss", "warning", text, where, fix, values)]
    text = f"{text}; none of the usual mistakes explains it: the rows may be new to the model"
    return [Finding("loss", "info", text, where, values=values)]


def judge_images(patient: Patient, entropy: float, learned: bool) -> list[Finding]:
    """The loss of rows with images: with their own, another row's and a blank one."""
    rows = [example for example in patient.examples if example.media][:NUM_IMAGES]
    if not rows:
        return []
    blank = "blank features" if lacks_tower(patient.model) else "blank images"
    tried = {blank: [change_pixels(example, torch.zeros_like) for example in rows]}
    swapped = [with_other_image(example, rows) for example in rows]
    if all(example is not None for example in swapped):
        tried["other rows' images"] = [example for example in swapped if example is not None]
    num_targets = [int((example.labels[1:] != IGNORE_INDEX).sum()) for example in rows]
    own = row_losses(patient, rows)
    losses = {words: row_losses(patient, examples) for words, examples in tried.items()}
    mean = sum(own) / sum(num_targets)
    moved = max(
        abs(a - b) / n for other in losses.values() for a, b, n in zip(own, other, num_targets, strict=True)
    )
    others = ", ".join(f"{sum(other) / sum(num_targets):.3f} with {words}" for words, other in losses.items())
    text = f"the loss is {mean:.3f} with the rows' own images, {others}"
    values = {"loss": mean, **{words: sum(other) / sum(num_targets) for words, other in losses.items()}}
    where = f"{len(rows)} rows with images"
    if learned and len(losses) > 1 and mean < entropy - LEARNED_BY and moved < UNMOVED:
        text = f"the model does not look at the images: {text}"
        fix = "Are the answers to be known without them? If not, look at projector and image inputs."
        return [Finding("loss", "warning", text, where, fix, values)]
    return [Finding("loss", "info", text, where, values=values)]


def with_other_image(example: Example, rows: list[Example]) -> Example | None:
    """The example with the pixels of the first row whose images are of the same shape and not the same."""
    for other in rows:
        if other.media.keys() == example.media.keys() and is_other_image(example, other):
            media = {n: other.media[n] if t.is_floating_point() else t for n, t in example.media.items()}
            return replace(example, media=media)
    return None


def is_other_image(example: Example, other: Example) -> bool:
    pairs = [(tensor, other.media[name]) for name, tensor in example.media.items()]
    if any(a.shape != b.shape for a, b in pairs):
        return False
    return all(torch.equal(a, b) for a, b in pairs if not a.is_floating_point()) and any(
        not torch.equal(a, b) for a, b in pairs if a.is_floating_point()
    )
