"""Gradient checkpointing: the same gradients, and no work in a frozen tower."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from partwise.model.memory import enable_gradient_checkpointing, recompute_layers
from partwise.model.parts import apply_plan, resolve_plan

PLANS = {
    "projector only": "projector: full",
    "all in full": "vision_tower: full\nprojector: full\nlanguage_model: full",
    "adapters in tower and decoder": "vision_tower: lora\nlanguage_model: lora",
    "last decoder layer": "language_model: {mode: full, layers: '-1:'}",
}


def prepared(load_tiny, config, family, checkpointing):
    torch.manual_seed(0)
    model = load_tiny(family)
    plan = resolve_plan(model, config)
    apply_plan(model, plan)
    if checkpointing:
        enable_gradient_checkpointing(model, plan)
    return model


def gradients(model, batch):
    logits = model(**batch, use_cache=False).logits
    cross_entropy(logits[0, :-1], batch["input_ids"][0, 1:]).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("family", ["gemma3", "qwen2.5-vl", "llava"])
@pytest.mark.parametrize("parts", PLANS.values(), ids=PLANS)
def test_gradients_are_the_same(family, parts, load_tiny, image_batch, make_config):
    config = make_config(parts)
    batch = image_batch(family)
    plain = gradients(prepared(load_tiny, config, family, False), batch)
    model = prepared(load_tiny, config, family, True)
    recomputed = gradients(model, batch)
    assert plain.keys() == recomputed.keys() and all(g is not None for g in plain.values())
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-5, atol=1e-6, msg=name)


def forward_counts(model, layers, batch):
    counts = dict.fromkeys(layers, 0)

    def count(path):
        def hook(*_):
            counts[path] += 1

        return hook

    handles = [model.get_submodule(path).register_forward_pre_hook(count(path)) for path in layers]
    gradients(model, batch)
    for handle in handles:
        handle.remove()
    return counts


@pytest.mark.parametrize(
    ("parts", "tower", "decoder"),
    [("projector: full", 1, 2), ("vision_tower: full", 2, 2), ("language_model: lora", 1, 2)],
)
def test_layers_are_recomputed_where_gradient_passes(
    parts, tower, decoder, load_tiny, image_batch, make_config
):
    """A recomputed layer runs its attention twice: in the forward and again in the backward pass."""
    model = prepared(load_tiny, make_config(parts), "gemma3", True)
    counts = forward_counts(
        model,
        ["model.vision_tower.encoder.layers.0.self_attn", "model.language_model.layers.1.self_attn"],
        image_batch("gemma3"),
    )
    assert list(counts.values()) == [tower, decoder]


@pytest.mark.parametrize("share", [0, 0.5, 1])
def test_a_share_of_the_layers_is_recomputed(share, load_tiny, image_batch, make_config):
    parts = make_config("vision_tower: full\nlanguage_model: full")
    model = prepared(load_tiny, parts, "gemma3", True)
    expected = gradients(model, image_batch("gemma3"))
    assert recompute_layers(model, resolve_plan(load_tiny("gemma3"), parts), share) == (4 * share, 4)
    decoder, tower = model.get_decoder().layers, model.get_encoder("image").encoder.layers
    for layers in (decoder, tower):
        assert [layer.gradient_checkpointing for layer in layers] == [share > 0, share == 1]
    for name, gradient in gradients(model, image_batch("gemma3")).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["gemma3", "llava", "qwen2.5-vl"])
def test_frozen_tower_keeps_no_graph(family, checkpointing, load_tiny, image_batch, make_config):
    """Its outputs carry no graph, so nothing of it can run in the backward pass."""
    model = prepared(load_tiny, make_config("projector: full\nlanguage_model: lora"), family, checkpointing)
    tower = model.get_encoder("image")
    seen = []

    def look(module, args, output):
        tensor = output[0] if isinstance(output, tuple) else output
        seen.append((tensor.requires_grad, tensor.grad_fn))

    merger = getattr(tower, "merger", None)
    for name, module in tower.named_modules():
        inside_projector = merger is not None and name.startswith("merger")
        if not inside_projector and isinstance(module, torch.nn.Linear | torch.nn.LayerNorm):
            module.register_forward_hook(look)
    gradients(model, image_batch(family))
    assert len(seen) >= 10 and set(seen) == {(False, None)}


def test_frozen_embeddings_keep_no_graph(load_tiny, image_batch, make_config):
    model = prepared(load_tiny, make_config("language_model: lora"), "gemma3", True)
    outputs = []
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: outputs.append(output))
    gradients(model, image_batch("gemma3"))
    assert outputs and not any(output.requires_grad for output in outputs)
