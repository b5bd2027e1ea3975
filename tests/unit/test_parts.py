"""The partition of a model into parts, and the audit of every image-text-to-text class."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    T5Config,
    T5ForConditionalGeneration,
)

from partwise.errors import PlanError
from partwise.model.audit import audit_model_type, audited_model_types, render_document
from partwise.model.find import contains, deepest_path
from partwise.model.parts import apply_plan, find_parts, parts_table, resolve_plan

LANGUAGE = ("model.language_model", "lm_head")
TREES = {
    "gemma3": {
        "vision_tower": (("model.vision_tower",), 2),
        "projector": (("model.multi_modal_projector",), 0),
        "language_model": (LANGUAGE, 2),
    },
    "gemma3-text": {"language_model": (("model", "lm_head"), 2)},
    "llama": {"language_model": (("model", "lm_head"), 2)},
    "llava": {
        "vision_tower": (("model.vision_tower",), 3),
        "projector": (("model.multi_modal_projector",), 0),
        "language_model": (LANGUAGE, 2),
    },
    "llava-next": {
        "vision_tower": (("model.vision_tower",), 3),
        "projector": (("model.multi_modal_projector", "model.image_newline"), 0),
        "language_model": (LANGUAGE, 2),
    },
    "qwen2-vl": {
        "vision_tower": (("model.visual",), 2),
        "projector": (("model.visual.merger",), 0),
        "language_model": (LANGUAGE, 2),
    },
    "qwen2.5-vl": {
        "vision_tower": (("model.visual",), 2),
        "projector": (("model.visual.merger",), 0),
        "language_model": (LANGUAGE, 2),
    },
}


@pytest.mark.parametrize("family", TREES)
def test_partition_is_exact(family, tiny_folder):
    config = AutoConfig.from_pretrained(tiny_folder(family))
    auto = AutoModelForImageTextToText if config.sub_configs else AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(config)
    parts = find_parts(model)
    assert {p: (f.module_paths, len(f.layers)) for p, f in parts.items()} == TREES[family]
    names = [name for found in parts.values() for name in found.parameter_names]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert sum(f.num_parameters for f in parts.values()) == sum(p.numel() for p in model.parameters())
    for part, found in parts.items():
        for name in found.parameter_names:
            owners = [path for f in parts.values() for path in f.module_paths]
            assert deepest_path(name, owners) in found.module_paths, (part, name)
        assert all(isinstance(model.get_submodule(path), nn.Module) for _, path in found.layers)


def test_merger_belongs_to_the_projector_only(load_tiny):
    parts = find_parts(load_tiny("qwen2.5-vl"))
    assert not any("merger" in name for name in parts["vision_tower"].parameter_names)
    assert all(name.startswith("model.visual.merger.") for name in parts["projector"].parameter_names)


def test_tied_head_is_counted_once(load_tiny):
    model = load_tiny("gemma3")
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    names = find_parts(model)["language_model"].parameter_names
    assert "model.language_model.embed_tokens.weight" in names and "lm_head.weight" not in names


def test_partition_after_adapters(load_tiny, make_config):
    model = load_tiny("qwen2-vl")
    before = find_parts(model)
    apply_plan(model, resolve_plan(model, make_config("vision_tower: lora\nlanguage_model: lora")))
    after = find_parts(model)
    assert {p: f.module_paths for p, f in after.items()} == {p: f.module_paths for p, f in before.items()}
    assert {p: f.layers for p, f in after.items()} == {p: f.layers for p, f in before.items()}
    assert after["projector"] == before["projector"]
    added = set(after["vision_tower"].parameter_names) - set(before["vision_tower"].parameter_names)
    assert {name.rsplit(".", 3)[1] for name in added if ".lora_" in name} == {"lora_A", "lora_B"}


def test_dtypes_are_named(load_tiny):
    model = load_tiny("llava")
    model.model.vision_tower.to(torch.bfloat16)
    assert find_parts(model)["vision_tower"].dtypes == ("bfloat16",)
    assert find_parts(model)["language_model"].dtypes == ("float32",)


def test_parameter_in_no_part_is_an_error(load_tiny):
    model = load_tiny("gemma3")
    model.model.gate = nn.Parameter(torch.zeros(3))
    with pytest.raises(PlanError) as error:
        find_parts(model)
    assert str(error.value) == (
        "gemma3: parameters that belong to no part: model.gate. Partwise trains the model types that "
        "docs/families.md lists with a language model path."
    )


def test_encoder_decoder_is_an_error():
    with torch.device("meta"):
        model = T5ForConditionalGeneration(
            T5Config(vocab_size=32, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
        )
    with pytest.raises(PlanError, match=r"t5: parameters that belong to no part: shared\.weight, encoder\."):
        find_parts(model)


def test_contains_respects_dots():
    assert contains("a.b", "a.b") and contains("a.b", "a.b.c") and contains("", "a")
    assert not contains("a.b", "a.bc") and not contains("a.b.c", "a.b")


def test_table_of_parts(load_tiny, make_config):
    model = load_tiny("llava-next")
    rows = {row.part: row for row in parts_table(model)}
    assert rows["vision_tower"].num_layers == 3 and rows["vision_tower"].num_trainable is None
    plan = resolve_plan(model, make_config("projector: full"))
    rows = {row.part: row for row in parts_table(model, plan)}
    assert rows["projector"].num_trainable == rows["projector"].num_parameters > 0
    assert rows["projector"].mode == "full" and rows["language_model"].mode == "frozen"
    assert rows["language_model"].num_trainable == 0


def test_audit_names_every_class_and_matches_the_docs():
    committed = (Path(__file__).parents[2] / "docs" / "families.md").read_text()
    if f"transformers {transformers.__version__}," not in committed:
        pytest.skip("docs/families.md is of another transformers version")
    rows = [audit_model_type(model_type) for model_type in audited_model_types()]
    assert all(bool(row.reason) != bool(row.num_parameters) for row in rows)
    assert render_document(rows) == committed
