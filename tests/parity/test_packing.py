"""Packs: the same loss and gradients as padded rows, and documents that do not see each other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

from partwise.data.align import align_batches
from partwise.data.collate import collate, micro_batches
from partwise.data.packing import PackFormat
from partwise.families import IMAGE_RUN_FIELDS
from partwise.model.attention import grid_positions, packing_obstacle, use_packed_attention
from partwise.records import Batch, StepData
from partwise.training.step import accumulate_loss, model_inputs

CPU, PAD = torch.device("cpu"), 0
FAMILIES = ("gemma3", "llava", "llava-next", "qwen2-vl", "qwen2.5-vl")
TEXT_FAMILIES = ("gemma3-text", "llama")
ROWS = (0, 1, 2, 0, 3, 0, 0, 1)


def pack_format(model, max_tokens: int) -> PackFormat:
    positions = None
    if hasattr(model.base_model, "get_rope_index"):
        from functools import partial

        positions = partial(grid_positions, model)
    return PackFormat(max_tokens, IMAGE_RUN_FIELDS.get(model.config.model_type), positions)


@pytest.fixture(params=[*FAMILIES, *TEXT_FAMILIES])
def tiny(request, open_tiny):
    """Rows of no to three images, in fp64 but for norms and positions; where a layer has a window, it is smaller than an image."""
    tiny = open_tiny(request.param, (0,) * 8 if request.param in TEXT_FAMILIES else ROWS)
    tiny.model.double()
    use_packed_attention(tiny.model)
    assert packing_obstacle(tiny.model.config, "sdpa") == ""
    for layer in tiny.model.get_decoder().layers:
        if getattr(layer.self_attn, "sliding_window", None):
            tiny.model.config.get_text_config().sliding_window = layer.self_attn.sliding_window = 7
    return tiny


def step_gradients(tiny, batches, take_gradients) -> tuple[float, dict[str, Tensor]]:
    loss = accumulate_loss(tiny.model, StepData(0, tuple(batches)), CPU)
    return loss.item(), take_gradients(tiny.model)


def assert_same(ours: tuple[float, dict[str, Tensor]], theirs: tuple[float, dict[str, Tensor]]) -> None:
    assert ours[0] == pytest.approx(theirs[0], rel=1e-9)
    assert ours[1].keys() == theirs[1].keys()
    scale = max(gradient.abs().max() for gradient in theirs[1].values())
    for name, gradient in ours[1].items():
        error = (gradient - theirs[1][name]).abs().max() / scale
        assert error < 1e-6, f"{name}: {error}"


@pytest.mark.parametrize("room", [1.0, 0.4], ids=["one pack", "several packs"])
def test_a_packed_step_is_the_padded_step(tiny, room, take_gradients):
    padded = step_gradients(tiny, micro_batches(tiny.examples, PAD, 3), take_gradients)
    total = sum(len(example.input_ids) for example in tiny.examples)
    packs = pack_format(tiny.model, int(room * total) + 1)
    batches = micro_batches(tiny.examples, PAD, 3, packs)
    assert len(batches) == (1 if room == 1 else 3) and all(batch.pack for batch in batches)
    assert_same(step_gradients(tiny, batches, take_gradients), padded)


def test_gradient_checkpointing_changes_nothing(tiny, take_gradients):
    batches = micro_batches(tiny.examples, PAD, 3, pack_format(tiny.model, 10_000))
    expected = step_gradients(tiny, batches, take_gradients)
    tiny.model.train()
    tiny.model.get_decoder().activation_checkpointing_enable({"use_reentrant": False})
    assert_same(step_gradients(tiny, batches, take_gradients), expected)
