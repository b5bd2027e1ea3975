"""A row that stands in for an image changes neither the loss nor a gradient, and reaches the vision side."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from partwise.data.align import align_batches
from partwise.data.collate import collate, filler_batch
from partwise.records import Batch
from partwise.training.step import batch_loss_sum

CPU = torch.device("cpu")
PAD = 0
FAMILIES = ("gemma3", "llava", "llava-next", "qwen2.5-vl")


@pytest.fixture(params=FAMILIES)
def tiny(request, open_tiny):
    """Rows: four of text alone, one of an image, one of two."""
    return open_tiny(request.param, (0, 0, 0, 0, 1, 2))


def fillers(tiny):
    """Short rows without and with an image, as the loop has them."""
    return tiny.examples[0], tiny.examples[4]


def loss_sum(tiny, batches) -> float:
    """Over all micro-batches, with gradients."""
    losses = [batch_loss_sum(tiny.model, batch, CPU) for batch in batches]
    for loss in losses:
        loss.backward()
    return sum(loss.item() for loss in losses)


def vision_names(tiny) -> set[str]:
    parts = tiny.plan({"vision_tower": "full", "projector": "full", "language_model": "full"})[0].parts
    return {name for part in parts if part.part != "language_model" for name in part.trainable}


def assert_same(gradients, expected) -> None:
    scale = max(gradient.abs().max() for gradient in expected.values())
    for name in expected:
        error = (gradients[name] - expected[name]).abs().max() / scale
        assert error < 1e-6, f"{name}: {error}"


@pytest.mark.parametrize("first", [0, 4], ids=["text", "images"])
def test_fillers_change_no_gradient(tiny, first, take_gradients) -> None:
    """Text alone gets an image; a micro-batch that is missing is all filler."""
    vision = vision_names(tiny)
    batch = collate(tiny.examples[first : first + 2], PAD)
    expected_loss = loss_sum(tiny, [batch])
    expected = take_gradients(tiny.model)
    aligned = align_batches([batch], [True, True, False], *fillers(tiny), PAD)
    assert loss_sum(tiny, aligned) == pytest.approx(expected_loss, rel=1e-6)
    gradients = take_gradients(tiny.model)
    assert_same(gradients, expected)
    assert vision <= gradients.keys() and len(vision) > 4
    if first == 0:
        assert not vision & expected.keys()
        assert all(not gradients[name].any() for name in vision)
    else:
        assert any(gradients[name].any() for name in vision)


def test_a_filler_that_had_labels_would_be_seen(tiny, take_gradients) -> None:
    """What the test above compares is not blind."""
    batch = collate(tiny.examples[:2], PAD)
    loss_sum(tiny, [batch])
    expected = take_gradients(tiny.model)
    (aligned,) = align_batches([batch], [True], *fillers(tiny), PAD)
    loss_sum(tiny, [with_labels(aligned)])
    gradients = take_gradients(tiny.model)
    with pytest.raises(AssertionError):
        assert_same(gradients, expected)
    assert any(gradients[name].any() for name in vision_names(tiny))


def with_labels(batch: Batch) -> Batch:
    return replace(batch, labels=batch.input_ids)


def test_a_filler_alone_has_no_loss_and_gradients_of_zero(tiny, take_gradients) -> None:
    assert loss_sum(tiny, [filler_batch(example, PAD) for example in fillers(tiny)]) == 0.0
    gradients = take_gradients(tiny.model)
    assert vision_names(tiny) <= gradients.keys()
    assert all(not gradient.any() for gradient in gradients.values())
