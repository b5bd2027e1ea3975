"""What trains: modes, ranges, targets, held tensors, adapters on disk, and the errors for the rest."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForImageTextToText, SiglipVisionConfig

from partwise.errors import PlanError
from partwise.model.adapter import load_adapter
from partwise.model.parts import (
    adapter_config,
    adapter_state,
    apply_plan,
    find_parts,
    resolve_plan,
    set_train_mode,
    verify_plan,
)
from partwise.model.plan import parse_layers

IMAGE_FAMILIES = ("gemma3", "llava", "llava-next", "qwen2-vl", "qwen2.5-vl")
AFTER = "it comes after layer {}, whose output is the image features (vision_feature_layer)"


def backward(model, batch):
    logits = model(**batch).logits
    cross_entropy(logits[0, :-1].float(), batch["input_ids"][0, 1:]).backward()


def trainable_names(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def shaken(model):
    """The model with its trainable tensors moved, so that adapters and full parts differ from the base."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return model


# What trains.


def test_unnamed_parts_are_frozen_and_rates_fall_back(load_tiny, make_config):
    model = load_tiny("gemma3")
    config = make_config("projector: {mode: full, learning_rate: 1e-4, weight_decay: 0.1}")
    plan = resolve_plan(model, config)
    assert [p.mode for p in plan.parts] == ["frozen", "full", "frozen"]
    assert (plan["projector"].learning_rate, plan["projector"].weight_decay) == (1e-4, 0.1)
    assert plan["language_model"].learning_rate == config.train.learning_rate
    assert trainable_names(model) == {n for n, _ in model.named_parameters()}, (
        "resolve_plan changed the model"
    )
    apply_plan(model, plan)
    assert trainable_names(model) == set(find_parts(model)["projector"].parameter_names)


@pytest.mark.parametrize("family", ["llama", "gemma3-text", "gemma3", "qwen2-vl"])
def test_full_language_model_is_every_tensor_of_it(family, load_tiny, make_config):
    model = load_tiny(family)
    plan = resolve_plan(model, make_config("language_model: full"))
    part = plan["language_model"]
    assert part.trainable == find_parts(model)["language_model"].parameter_names and not part.held
    assert part.num_trainable == part.num_parameters


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("family", ["llava", "qwen2.5-vl", "llama"])
def test_plan_on_meta_predicts_adapters(family, dora, tiny_folder, load_tiny, make_config):
    from partwise.model.load import empty_model

    extra = (
        ""
        if family == "llama"
        else f"vision_tower: {{mode: lora, lora_rank: 2, use_dora: {str(dora).lower()}}}\n"
    )
    config = make_config(
        f"{extra}language_model: {{mode: lora, lora_rank: 4, use_dora: {str(dora).lower()}}}"
    )
    plan = resolve_plan(empty_model(tiny_folder(family)), config)
    model = load_tiny(family)
    apply_plan(model, plan)
    assert trainable_names(model) == set(plan.trainable)
    for part in plan.parts:
        sizes = [model.get_parameter(name).numel() for name in part.trainable]
        assert part.num_trainable == sum(sizes)
    ranks = {p.shape[0] for n, p in model.named_parameters() if "language_model" in n and "lora_A" in n}
    assert ranks <= {4}
    ranks = {p.shape[0] for n, p in model.named_parameters() if "model.vi" in n and "lora_A" in n}
    assert ranks <= {2}


@pytest.mark.parametrize(
    ("family", "part", "targets", "leaves"),
    [
        ("llama", "language_model", "attention", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("gemma3", "language_model", "mlp", {"gate_proj", "up_proj", "down_proj"}),
        ("gemma3", "vision_tower", "all", {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}),
        ("qwen2-vl", "vision_tower", "all", {"qkv", "proj", "fc1", "fc2"}),
        ("qwen2.5-vl", "vision_tower", "mlp", {"gate_proj", "up_proj", "down_proj"}),
        ("qwen2.5-vl", "vision_tower", "attention", {"qkv", "proj"}),
        ("qwen2.5-vl", "projector", "all", {"0", "2"}),
        ("llava", "projector", "all", {"linear_1", "linear_2"}),
    ],
)
def test_lora_targets(family, part, targets, leaves, load_tiny, make_config):
    model = load_tiny(family)
    plan = resolve_plan(model, make_config(f"{part}: {{mode: lora, lora_targets: {targets}}}"))
    assert {name.rpartition(".")[2] for name in plan[part].lora_targets} == leaves
    assert set(plan[part].lora_targets) <= {
        n.removesuffix(".weight") for n in find_parts(model)[part].parameter_names
    }


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("-12:", range(12, 24)),
        ("0:6", range(6)),
        (":-20", range(4)),
        ("-3:-1", range(21, 23)),
        (":24", range(24)),
    ],
)
def test_layer_range(text, expected):
    assert parse_layers(text, 24) == expected


@pytest.mark.parametrize(
    ("part", "path", "mode"),
    [
        ("language_model", "model.language_model.layers.1.", "full"),
        ("language_model", "model.language_model.layers.1.", "lora"),
        ("vision_tower", "model.vision_tower.encoder.layers.1.", "full"),
    ],
)
def test_only_the_layers_of_the_range_train(part, path, mode, load_tiny, make_config):
    plan = resolve_plan(load_tiny("gemma3"), make_config(f'{part}: {{mode: {mode}, layers: "-1:"}}'))
    assert plan.trainable and all(name.startswith(path) for name in plan.trainable)


def test_frozen_parts_are_in_eval_mode(load_tiny, make_config):
    model = load_tiny("qwen2-vl")
    plan = resolve_plan(model, make_config("projector: full\nlanguage_model: lora"))
    apply_plan(model, plan)
    model.eval()
    set_train_mode(model, plan)
    assert not model.model.visual.training and not model.model.visual.blocks[0].training
    assert model.model.visual.merger.mlp[0].training
    assert model.model.language_model.layers[0].training and model.lm_head.training is True


# Tensors that can never get a gradient.


def variant(tiny_folder, family, change):
    config = AutoConfig.from_pretrained(tiny_folder(family))
    change(config)
    return AutoModelForImageTextToText.from_config(config)


def feature_layer(value):
    return lambda config: setattr(config, "vision_feature_layer", value)


def pooling_head(config):
    config.vision_config.vision_use_head = True


def siglip_tower(config):
    config.vision_config = SiglipVisionConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=56,
        patch_size=14,
    )
    config.vision_feature_layer = -1
    config.vision_feature_select_strategy = "full"


@pytest.mark.parametrize(
    ("family", "change"),
    [
        *[(family, lambda config: None) for family in IMAGE_FAMILIES],
        ("gemma3", pooling_head),
        ("llava", feature_layer(-1)),
        ("llava", feature_layer(1)),
        ("llava", feature_layer([-3, -2])),
        ("llava", siglip_tower),
    ],
)
def test_held_tensors_are_those_without_gradient(family, change, tiny_folder, image_batch, make_config):
    model = variant(tiny_folder, family, change)
    plan = resolve_plan(model, make_config("vision_tower: full\nprojector: full\nlanguage_model: full"))
    held = {name: reason for part in plan.parts for name, reason in part.held.items()}
    backward(model, image_batch(family))
    assert {name for name, p in model.named_parameters() if p.grad is None} == set(held)
    apply_plan(model, plan)
    assert trainable_names(model) == {name for name, p in model.named_parameters() if p.grad is not None}


def test_held_reasons(load_tiny, make_config):
    plan = resolve_plan(load_tiny("llava"), make_config("vision_tower: full"))
    held = plan["vision_tower"].held
    assert held["model.vision_tower.encoder.layers.2.mlp.fc1.weight"] == AFTER.format(1)
    assert held["model.vision_tower.post_layernorm.bias"] == "the language model does not read its output"
    plan = resolve_plan(load_tiny("llava"), make_config("vision_tower: lora"))
    assert not any(".layers.2." in name for name in plan["vision_tower"].lora_targets)
    assert plan["vision_tower"].held["model.vision_tower.encoder.layers.2.mlp.fc1.weight"] == AFTER.format(1)


def test_bare_parameter_beside_adapters_is_held(load_tiny, make_config):
    model = load_tiny("llava-next")
    plan = resolve_plan(model, make_config("projector: full\nlanguage_model: lora"))
    assert list(plan["projector"].held) == ["model.image_newline"]
    assert "an adapter folder can only hold whole modules" in plan["projector"].held["model.image_newline"]
    plan = resolve_plan(model, make_config("projector: full\nlanguage_model: full"))
    assert "model.image_newline" in plan["projector"].trainable


# Errors.


@pytest.mark.parametrize(
    ("family", "parts", "text"),
    [
        (
            "llama",
            "projector: full",
            "run.yaml:5: parts.projector: the model has no projector. Its parts are language_model; "
            "remove the line.",
        ),
        (
            "gemma3",
            "audio_tower: full",
            "run.yaml:5: parts.audio_tower: the model has no audio_tower. Its parts are vision_tower, "
            "projector and language_model; remove the line.",
        ),
        (
            "gemma3",
            "projector: lora",
            "run.yaml:5: parts.projector.mode: lora: the projector of gemma3 has no linear layer that an "
            "adapter can wrap, only model.multi_modal_projector.mm_input_projection_weight, "
            "model.multi_modal_projector.mm_soft_emb_norm.weight. Set parts.projector.mode: full.",
        ),
        (
            "llava",
            "projector: {mode: lora, lora_targets: attention}",
            "run.yaml:5: parts.projector.lora_targets: attention matches no linear layer of projector. "
            "Set lora_targets: all, or mode: full.",
        ),
        (
            "llama",
            "language_model: {mode: full, layers: '-3:'}",
            'run.yaml:5: parts.language_model.layers: "-3:" reaches beyond its layers: language_model has 2 '
            'layers, 0 to 1. Write a range inside them: "-1:" is the upper half.',
        ),
        (
            "llama",
            "language_model: {mode: lora, layers: '1:1'}",
            'run.yaml:5: parts.language_model.layers: "1:1" is empty: language_model has 2 layers, '
            '0 to 1. Write a range inside them: "-1:" is the upper half.',
        ),
        (
            "llava",
            "projector: {mode: full, layers: '-1:'}",
            'run.yaml:5: parts.projector.layers: "-1:": projector has no layers. Remove layers.',
        ),
        (
            "llava",
            "vision_tower: {mode: full, layers: '-1:'}",
            "run.yaml:5: parts.vision_tower: nothing of vision_tower would train, because "
            + AFTER.format(1)
            + ". Open more of it, or freeze it.",
        ),
        (
            "gemma3",
            "vision_tower: lora\nlanguage_model: full",
            "run.yaml:6: parts.language_model.mode: full beside lora in vision_tower: the run would be saved "
            "as an adapter that holds the whole language model. Set parts.language_model.mode: lora, or "
            "parts.vision_tower.mode: full.",
        ),
    ],
)
def test_plan_errors(family, parts, text, load_tiny, make_config):
    with pytest.raises(PlanError) as error:
        resolve_plan(load_tiny(family), make_config(parts))
    assert str(error.value).endswith(text)


@pytest.mark.parametrize("family", ["gemma3", "llama"])
def test_nothing_trains(family, load_tiny, make_config):
    """Frozen parts are refused with the config; a plan made for a model says which parts that one has."""
    config = make_config("language_model: lora")
    frozen = config.model_copy(update={"parts": config.parts.model_copy(update={"language_model": None})})
    with pytest.raises(PlanError) as error:
        resolve_plan(load_tiny(family), frozen)
    names = {
        "gemma3": "vision_tower, projector and language_model are all frozen (",
        "llama": "language_model is frozen, and the model has no other part (",
    }
    assert str(error.value).startswith("nothing would train: " + names[family])


def test_verify_names_what_differs(load_tiny, make_config):
    model = load_tiny("gemma3")
    plan = resolve_plan(model, make_config("projector: full\nlanguage_model: lora"))
    apply_plan(model, plan)
    verify_plan(model, plan)
    model.model.language_model.norm.weight.requires_grad_(True)
    model.model.vision_tower.post_layernorm.requires_grad_(True)
    model.model.multi_modal_projector.mm_soft_emb_norm.weight.requires_grad_(False)
    with pytest.raises(PlanError) as error:
        verify_plan(model, plan, "loading")
    assert str(error.value) == (
        "vision_tower is frozen by the plan, but 2 of its tensors train after loading: "
        "model.vision_tower.post_layernorm.bias, model.vision_tower.post_layernorm.weight; "
        "projector is full by the plan, but 1 of its tensors do not train after loading: "
        "model.multi_modal_projector.mm_soft_emb_norm.weight; "
        "language_model is lora by the plan, but 1 of its tensors outside the plan train after loading: "
        "model.language_model.norm.weight. Something else changed requires_grad or the modules; do not train."
    )


def test_plan_is_applied_once(load_tiny, make_config):
    model = load_tiny("llama")
    plan = resolve_plan(model, make_config("language_model: lora"))
    apply_plan(model, plan)
    with pytest.raises(PlanError, match="already has adapters"):
        apply_plan(model, plan)


# Adapters on disk.

ADAPTERS = [
    ("gemma3", "projector: full\nlanguage_model: lora"),
    (
        "gemma3",
        "projector: full\nlanguage_model: {mode: lora, lora_rank: 4, use_rslora: true, layers: '-1:'}",
    ),
    (
        "llava",
        "vision_tower: full\nprojector: lora\nlanguage_model: {mode: lora, lora_rank: 2, lora_alpha: 8}",
    ),
    ("llava-next", "projector: full\nlanguage_model: {mode: lora, use_dora: true}"),
    (
        "llava-next",
        "vision_tower: {mode: lora, lora_rank: 2, use_rslora: true}\nprojector: full\n"
        "language_model: {mode: lora, lora_alpha: 3, use_rslora: true}",
    ),
    ("qwen2.5-vl", "vision_tower: {mode: lora, lora_rank: 2}\nprojector: {mode: lora, lora_alpha: 5}"),
    ("qwen2.5-vl", "vision_tower: full\nprojector: full\nlanguage_model: {mode: lora, use_dora: true}"),
    ("llama", "language_model: {mode: lora, lora_targets: attention}"),
]


@pytest.mark.parametrize(("family", "parts"), ADAPTERS)
def test_plain_peft_loads_the_adapter(
    family, parts, load_tiny, tiny_folder, image_batch, make_config, tmp_path
):
    batch = image_batch(family)
    model = load_tiny(family)
    plan = resolve_plan(model, make_config(parts))
    apply_plan(model, plan)
    base = load_tiny(family)(**batch).logits
    shaken(model).eval()
    trained = model(**batch).logits
    assert (trained - base).abs().max() > 1e-2
    adapter_config(plan, str(tiny_folder(family))).save_pretrained(tmp_path)
    save_file(adapter_state(model, plan), tmp_path / "adapter_model.safetensors")

    loaded = PeftModel.from_pretrained(load_tiny(family), tmp_path).eval()
    torch.testing.assert_close(loaded(**batch).logits, trained, rtol=0, atol=1e-6)

    again = load_tiny(family)
    apply_plan(again, plan)
    load_adapter(again, plan, tmp_path)
    torch.testing.assert_close(again.eval()(**batch).logits, trained, rtol=0, atol=0)
    set_train_mode(again, plan)
    backward(again, batch)
    assert {n for n, p in again.named_parameters() if p.grad is not None} == set(plan.trainable)
