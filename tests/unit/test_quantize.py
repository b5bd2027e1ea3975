"""Which layers go into 4 bits, what is refused, what is counted, and that nothing else changes them."""

from __future__ import annotations

import json

import pytest
import torch

from partwise.errors import CheckpointError, ConfigError, PlanError
from partwise.model import quantize
from partwise.model.find import find_parts
from partwise.model.load import load_model_config
from partwise.model.parts import adapter_state, apply_plan, resolve_plan
from partwise.model.quantize import quantize_parts
from partwise.preflight import Context, collect_findings
from partwise.preflight.doctor import float32_weights
from partwise.preflight.packages import check_packages
from partwise.records import IGNORE_INDEX
from partwise.tables import describe_mode
from partwise.training.job import Job
from partwise.training.optim import Optimizer
from partwise.training.proof import Proof, frozen_tensors

CPU = torch.device("cpu")
QLORA = "language_model: {mode: lora, lora_rank: 4, quantization: nf4}"


@pytest.fixture
def open_qlora(load_tiny, make_config):
    def open_model(family: str, parts: str = QLORA, dtype: torch.dtype = torch.float32):
        model, config = load_tiny(family).to(dtype), make_config(parts)
        plan = resolve_plan(model, config)
        quantize_parts(model, plan, CPU)
        apply_plan(model, plan)
        return model, plan, config

    return open_model


@pytest.mark.parametrize("family", ["gemma3", "llava-next", "qwen2.5-vl", "llama"])
def test_exactly_the_linear_layers_of_the_blocks_are_packed(family, load_tiny, make_config) -> None:
    model = load_tiny(family)
    before = find_parts(model)
    plan = resolve_plan(model, make_config(QLORA))
    linears = {
        name
        for name, module in model.get_decoder().layers.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    quantize_parts(model, plan, CPU)
    packed = {name for name, p in model.named_parameters() if p.dtype == torch.uint8}
    assert packed == {f"{name}.weight" for name in plan["language_model"].quantization.modules}
    assert len(packed) == len(linears) == len(plan["language_model"].lora_targets)
    assert describe_mode(plan["language_model"]) == f"lora r4 on {len(linears)} modules in nf4"
    after = find_parts(model)
    assert {part: found.num_parameters for part, found in after.items()} == {
        part: found.num_parameters for part, found in before.items()
    }
    assert after["language_model"].dtypes == ("float32", "nf4")


def test_a_layer_range_trains_some_adapters_over_all_packed_layers(load_tiny, make_config) -> None:
    parts = QLORA.replace("nf4", "nf4, layers: '-1:', lora_targets: attention")
    part = resolve_plan(load_tiny("gemma3"), make_config(parts))["language_model"]
    assert len(part.lora_targets) == 4
    assert len(part.quantization.modules) == 14


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_are_those_of_a_model_that_transformers_quantised(open_qlora, dtype) -> None:
    from peft.tuners.lora.bnb import Linear4bit

    model, plan, _ = open_qlora("gemma3", dtype=dtype)
    targets = plan["language_model"].lora_targets
    assert all(isinstance(model.get_submodule(target), Linear4bit) for target in targets)
    assert {model.get_parameter(name).dtype for name in plan.trainable} == {dtype}


def test_an_evaluation_leaves_the_packed_weights_as_they_are(open_qlora, image_batch) -> None:
    """On CPUs with AVX512-BF16 bitsandbytes would lay them out anew."""
    model, *_ = open_qlora("gemma3", dtype=torch.bfloat16)
    before = {name: p.clone() for name, p in model.named_parameters() if p.dtype == torch.uint8}
    with torch.no_grad():
        model.eval()(**image_batch("gemma3"))
    assert before
    for name, weight in before.items():
        assert torch.equal(model.get_parameter(name), weight), name


def test_the_doctor_widens_all_but_the_packed_weights(open_qlora, image_batch) -> None:
    model, *_ = open_qlora("gemma3", dtype=torch.bfloat16)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with float32_weights(model), torch.no_grad():
        assert {p.dtype for p in model.parameters()} == {torch.float32, torch.uint8}
        assert model.eval()(**image_batch("gemma3")).logits.isfinite().all()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_rows_that_are_no_multiple_of_a_block_are_refused(load_tiny, make_config) -> None:
    model = load_tiny("llama")
    model.model.layers[0].mlp.down_proj = torch.nn.Linear(96, 64, bias=False)
    with pytest.raises(PlanError) as caught:
        resolve_plan(model, make_config(QLORA))
    assert str(caught.value).endswith(
        "run.yaml:5: parts.language_model.quantization: nf4: model.layers.0.mlp.down_proj has 96 inputs, and "
        "NF4 has one scale for 64 weights: each row must be a multiple of that. Remove it."
    )


def make_proof(model, plan, config):
    return Proof(model, plan, Optimizer(model, plan, config.train, 3))


def test_the_proof_sees_a_changed_code_and_a_changed_scale(open_qlora, image_batch) -> None:
    model, plan, config = open_qlora("gemma3")
    proof = make_proof(model, plan, config)
    name = "model.language_model.layers.0.mlp.up_proj.base_layer.weight"
    scales = {f"{name}.{kind}" for kind in ("absmax", "nested_absmax", "nested_offset")}
    frozen = frozen_tensors(model, proof.optimizer)
    assert scales | {name} <= frozen.keys()
    batch = image_batch("gemma3")
    labels = batch["input_ids"].clone()
    labels[:, :-4] = IGNORE_INDEX
    model(**batch, labels=labels).loss.backward()
    proof.optimizer.step(0)
    proof.check(1)
    for changed in (name, *sorted(scales)):
        kept = frozen[changed].data.clone()
        frozen[changed].data.view(-1)[0] += 1
        with pytest.raises(Exception, match="changed although it is frozen: language_model: 1") as caught:
            proof.check(1)
        assert changed in str(caught.value)
        frozen[changed].data.copy_(kept)
    proof.check(1)


def test_an_adapter_file_holds_no_packed_weight(open_qlora) -> None:
    model, plan, _ = open_qlora("gemma3")
    state = adapter_state(model, plan)
    assert state and all(tensor.is_floating_point() for tensor in state.values())
    assert not [name for name in state if "absmax" in name or "base_layer" in name]


@pytest.mark.parametrize(
    ("parts", "key"),
    [
        (QLORA, "run.yaml:5: parts.language_model.quantization: nf4"),
        ("language_model: lora", ""),
    ],
)
def test_a_missing_package_is_said_before_anything_is_loaded(parts, key, make_config, monkeypatch) -> None:
    context = Context(Job(make_config(parts)))
    assert collect_findings(context, [check_packages]) == []
    monkeypatch.setattr(quantize, "find_spec", lambda name: None)
    findings = collect_findings(context, [check_packages])
    assert len(findings) == bool(key)
    for finding in findings:
        assert finding.level == "error"
        assert f"{key} needs the package bitsandbytes, which is not installed." in finding.message
        assert finding.message.endswith('pip install "partwise[quant]".')


def test_a_missing_package_stops_the_quantising(load_tiny, make_config, monkeypatch) -> None:
    model = load_tiny("llama")
    plan = resolve_plan(model, make_config(QLORA))
    monkeypatch.setattr(quantize, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install"):
        quantize_parts(model, plan, CPU)


def test_a_quantised_folder_is_refused_with_the_way(tiny_folder, tmp_path) -> None:
    config = json.loads((tiny_folder("llama") / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "bitsandbytes"}})
    )
    with pytest.raises(CheckpointError, match=r"parts\.language_model\.quantization: nf4 then holds"):
        load_model_config(tmp_path)
