"""One real step before training: what it finds on broken models, and that it leaves everything as it was."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from partwise.config import load_config
from partwise.preflight import Context
from partwise.preflight.probe import probe_batches
from partwise.preflight.step import Gradients, check_step, part_findings
from partwise.preflight.time import check_time
from partwise.training.job import Job

FAMILIES = ("gemma3", "gemma3-text", "llava", "llava-next", "qwen2-vl", "qwen2.5-vl", "llama")
WORDS = ("red", "a red disc on white", "it is a red disc in the middle of a white square")
PARTS = {
    "projector": {"projector": "full"},
    "lora": {"language_model": {"mode": "lora", "lora_rank": 2}, "projector": "full"},
    "tower": {"vision_tower": "full"},
    "text": {"language_model": "full"},
}
MakeContext = Callable[..., Context]


@pytest.fixture
def make_context(tmp_path: Path, tiny_folder: Callable[[str], Path], make_image: Callable) -> MakeContext:
    """A context of a family with rows of growing length; `kinds` says for each whether it has an image."""
    make_image().save(tmp_path / "disc.png")

    def make(
        family: str, parts: str, kinds: str = "tiiti", packing: bool | None = None, **model: object
    ) -> Context:
        lines = []
        for i, kind in enumerate(kinds):
            has_image = kind == "i" and family not in ("llama", "gemma3-text")
            row = {"prompt": "which colour?", "completion": WORDS[i % len(WORDS)]}
            if has_image:
                row = {**row, "prompt": "<image>which colour?", "image": "disc.png"}
            lines.append(json.dumps(row))
        (tmp_path / "rows.jsonl").write_text("\n".join(lines))
        config = {
            "model": {"path": str(tiny_folder(family)), "dtype": "float32", **model},
            "parts": PARTS[parts],
            "data": {
                "train": str(tmp_path / "rows.jsonl"),
                "max_seq_len": 256,
                "num_workers": 0,
                "packing": packing,
            },
            "train": {"steps": 4, "global_batch_size": 2, "micro_batch_size": 2},
            "output": str(tmp_path / "run"),
        }
        (tmp_path / "config.yaml").write_text(json.dumps(config))
        return Context(Job(load_config(tmp_path / "config.yaml")), max_rows=32)

    return make


def problems(context: Context) -> list[str]:
    return [finding.message for finding in check_step(context) if finding.level != "info"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_passes_in_silence(make_context: MakeContext, family: str, dtype: str) -> None:
    parts = "text" if family in ("llama", "gemma3-text") else "lora"
    assert problems(make_context(family, parts, dtype=dtype)) == []


def test_the_longest_rows_come_first_and_mixed_rows_both_ways(make_context: MakeContext) -> None:
    context = make_context("gemma3", "text", packing=False)
    longest, other = probe_batches(context)
    limit = max(row.num_tokens for row in context.train_scan.rows)
    assert longest.input_ids.shape == (2, limit) and longest.media
    assert not other.media and len(other.rows) == 2
    assert len(probe_batches(make_context("gemma3", "text", "ttt"))) == 1
    assert len(probe_batches(make_context("gemma3", "text", "iii"))) == 1


def state(context: Context) -> dict[str, object]:
    model = context.loaded.model
    return {
        "tensors": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "buffers": {name: tensor.clone() for name, tensor in model.named_buffers()},
        "gradients": {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()},
        "flags": {n: p.requires_grad for n, p in model.named_parameters()},
        "modes": {n: m.training for n, m in model.named_modules()},
        "hooks": {n: (len(m._forward_hooks), len(m._backward_hooks)) for n, m in model.named_modules()},
        "order": context.job.loader.step_rows(0) + context.job.loader.step_rows(3),
        "random": (torch.get_rng_state(), random.getstate(), np.random.get_state()[1]),
    }


def assert_same(before: object, after: object) -> None:
    if isinstance(before, (torch.Tensor, np.ndarray)):
        assert np.array_equal(np.asarray(before), np.asarray(after))
    elif isinstance(before, dict):
        assert before.keys() == after.keys()
        for key in before:
            assert_same(before[key], after[key])
    elif isinstance(before, tuple):
        for one, other in zip(before, after, strict=True):
            assert_same(one, other)
    else:
        assert before == after


def count_noise(module: torch.nn.Module, *_: object) -> None:
    """As a norm's running mean would: a buffer that each forward pass changes, and random numbers drawn."""
    module.seen.add_(torch.rand(()) + random.random() + np.random.rand())


@pytest.mark.parametrize("family", ["gemma3", "qwen2-vl"])
def test_the_probe_leaves_no_trace(make_context: MakeContext, family: str) -> None:
    context = make_context(family, "lora")
    model = context.loaded.model
    trained = model.get_parameter(context.job.plan.trainable[0])
    trained.grad = torch.ones_like(trained)
    decoder = model.get_decoder()
    decoder.register_buffer("seen", torch.zeros(()), persistent=False)
    decoder.register_forward_hook(count_noise)
    decoder.layers[0].eval()
    before = state(context)
    assert problems(context) == []
    assert_same(before, state(context))


def test_dropout_is_no_difference_of_the_loss(make_context: MakeContext) -> None:
    context = make_context("llama", "text")
    for layer in context.loaded.model.get_decoder().layers:
        layer.self_attn.attention_dropout = 0.5
    assert problems(context) == []


def test_a_graph_in_a_frozen_tower_is_named(make_context: MakeContext) -> None:
    context = make_context("llava", "projector")
    tower = context.loaded.model.get_encoder("image")
    handle = tower.get_input_embeddings().register_forward_hook(lambda m, a, out: out.requires_grad_(True))
    found = problems(context)
    assert len(found) == 1 and "vision_tower is frozen, but the backward pass runs through" in found[0]
    handle.remove()
    assert problems(context) == []


def test_features_cut_from_the_graph_leave_the_tower_without_gradients(make_context: MakeContext) -> None:
    context = make_context("llava", "tower")
    tower = context.loaded.model.get_encoder("image")
    for layer in tower.modules():
        layer.register_forward_hook(lambda m, a, out: out.detach() if torch.is_tensor(out) else None)
    (found,) = problems(context)
    assert "no gradient reaches" in found and "of vision_tower" in found


def test_features_times_zero_are_told(make_context: MakeContext) -> None:
    context = make_context("llava", "projector")
    projector = context.loaded.model.model.multi_modal_projector
    projector.register_forward_hook(lambda m, a, out: out * 0)
    (found,) = problems(context)
    assert "every gradient of projector is exactly zero" in found


def test_another_dtype_between_the_parts_is_told(make_context: MakeContext) -> None:
    context = make_context("llava", "text", dtype="bfloat16")
    tower = context.loaded.model.get_encoder("image")
    assert problems(context) == []

    def to_float(module: object, arguments: object, output: dict) -> object:
        output["last_hidden_state"] = output.last_hidden_state.to(torch.float32)
        return output

    tower.register_forward_hook(to_float)
    found = problems(context)
    assert any("vision_tower gives float32, but the weights are bfloat16" in text for text in found), found


def test_a_gradient_that_is_not_finite_is_an_error(make_context: MakeContext) -> None:
    context = make_context("llama", "text")
    name = context.job.plan.trainable[-1]
    parameter = context.loaded.model.get_parameter(name)
    parameter.register_hook(lambda gradient: gradient * float("nan"))
    (found,) = problems(context)
    assert name in found and "is not finite" in found


def test_an_open_frozen_tensor_is_an_error(make_context: MakeContext) -> None:
    context = make_context("llava", "projector")
    model = context.loaded.model
    frozen = model.get_decoder().layers[0].mlp.up_proj.weight
    frozen.requires_grad_(True)
    (found,) = problems(context)
    assert "1 frozen tensors got a gradient" in found and "up_proj" in found


def test_a_micro_batch_that_does_not_fit_is_an_error_with_a_way_out(make_context: MakeContext) -> None:
    context = make_context("llama", "text", packing=False)
    longest = probe_batches(context)[0].input_ids.shape

    def allocate(module: object, inputs: tuple, *_: object) -> None:
        if len(inputs[0]) == 2:  # the reference is one row, and fits
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    context.loaded.model.get_input_embeddings().register_forward_hook(allocate)
    before = state(context)
    (found,) = check_step(context)
    assert found.level == "error" and f"{tuple(longest)} tokens, does not fit in memory" in found.message
    assert "train.micro_batch_size" in found.fix
    assert_same(before, state(context))
    (told,) = check_time(context)
    assert "no time can be told" in told.message


def test_experts_without_a_token_are_a_warning_and_other_tensors_an_error(make_context: MakeContext) -> None:
    context = make_context("llama", "text")
    (part,), batches = context.job.plan.parts, probe_batches(context)
    names = tuple(f"model.layers.0.mlp.experts.{i}.up_proj.weight" for i in range(4))
    part = replace(part, trainable=(*part.trainable, *names))
    gradients = Gradients(reached=set(part.trainable), nonzero=set(part.trainable))
    assert list(part_findings(context.job, part, gradients, batches)) == []
    gradients.reached -= set(names[2:])
    (warning,) = part_findings(context.job, part, gradients, batches)
    assert warning.level == "warning"
    assert f"2 expert tensors of language_model got no token of these rows: {names[2]}" in warning.message
    gradients.reached.discard(part.trainable[0])
    (error,) = part_findings(context.job, part, gradients, batches)
    assert error.level == "error" and "no gradient reaches 3 of the" in error.message


def test_a_first_loss_that_is_not_finite_is_an_error(make_context: MakeContext) -> None:
    context = make_context("llama", "text")
    context.loaded.model.get_decoder().norm.weight.data.fill_(float("inf"))
    (found,) = check_step(context)
    assert found.level == "error" and "the first loss is nan" in found.message
