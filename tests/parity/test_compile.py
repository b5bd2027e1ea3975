"""Compiled layers: the same step as the layers give as they are written, in few graphs.

The graphs are captured and differentiated as for a GPU, but run by torch's own operators: on a CPU the
compiler's kernels take minutes to build.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from plain_kernel import register_plain_kernel
from torch._dynamo.utils import counters

from partwise.data.collate import micro_batches
from partwise.data.packing import PackFormat
from partwise.families import IMAGE_RUN_FIELDS
from partwise.model import attention
from partwise.model.attention import use_packed_attention
from partwise.model.compile import compile_layers, uncompiled
from partwise.model.memory import enable_gradient_checkpointing
from partwise.model.positions import grid_positions
from partwise.records import StepData
from partwise.training.fault import FoundError, stopping_hooks
from partwise.training.step import accumulate_loss, batch_loss_sum

CPU = torch.device("cpu")
LORA = {"language_model": {"mode": "lora", "lora_rank": 4}}
FULL = {"vision_tower": "full", "projector": "full", "language_model": "full"}


@pytest.fixture
def open_packed(open_tiny, monkeypatch) -> Callable:
    """A model with packed attention by the operator that a GPU uses, and steps of one pack each."""
    register_plain_kernel()
    monkeypatch.setattr(attention, "suits_flash", lambda query: True)
    torch._dynamo.reset()
    counters.clear()

    def open_model(family, parts):
        tiny = open_tiny(family, (1, 0, 2, 0, 1, 0))
        plan, _ = tiny.plan(parts)
        with torch.no_grad():
            for name, parameter in tiny.model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.02)
        use_packed_attention(tiny.model)
        has_axes = hasattr(tiny.model.base_model, "get_rope_index")
        packs = PackFormat(
            10_000,
            IMAGE_RUN_FIELDS.get(tiny.model.config.model_type),
            partial(grid_positions, tiny.model) if has_axes else None,
        )
        groups = (tiny.examples[:2], tiny.examples[1:2], tiny.examples[2:], tiny.examples[:5])
        return tiny, plan, [StepData(0, micro_batches(group, 0, 1, packs)) for group in groups]

    return open_model


@pytest.mark.parametrize(
    ("family", "parts", "checkpointing"),
    [("gemma3", LORA, False), ("gemma3", FULL, True), ("qwen2.5-vl", LORA, True)],
)
def test_a_compiled_step_is_the_step(family, parts, checkpointing, open_packed, take_gradients):
    tiny, plan, steps = open_packed(family, parts)
    if checkpointing:
        enable_gradient_checkpointing(tiny.model, plan)
    expected = [(accumulate_loss(tiny.model, step, CPU), take_gradients(tiny.model)) for step in steps]

    compile_layers(tiny.model, backend="aot_eager")
    num_graphs = []
    for step, (loss, gradients) in zip(steps, expected, strict=True):
        torch.testing.assert_close(accumulate_loss(tiny.model, step, CPU), loss, rtol=1e-6, atol=0)
        for name, gradient in take_gradients(tiny.model).items():
            error = (gradient - gradients.pop(name)).norm() / gradient.norm()
            assert error < 1e-4, name
        assert not gradients
        num_graphs.append(counters["stats"]["unique_graphs"])

    assert not counters["graph_break"]
    # The second and third step brought other lengths, text alone and other numbers of images.
    assert num_graphs[-1] == num_graphs[-2] <= 6, num_graphs


def test_what_looks_inside_layers_still_sees_them(open_packed):
    tiny, plan, steps = open_packed("gemma3", LORA)
    compile_layers(tiny.model, backend="aot_eager")
    accumulate_loss(tiny.model, steps[0], CPU)
    layer = tiny.model.get_decoder().layers[1]
    with torch.no_grad():
        layer.mlp.up_proj.base_layer.weight[0, 0] = torch.inf
    with (
        pytest.raises(FoundError, match=r"layers\.1\.mlp\.up_proj"),
        uncompiled(),
        stopping_hooks(tiny.model, plan),
    ):
        batch_loss_sum(tiny.model, steps[0].batches[0], CPU)
