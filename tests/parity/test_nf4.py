"""NF4 beside an independent reference, QLoRA beside plain layers with the same weights, and what it saves."""

from __future__ import annotations

from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, BitsAndBytesConfig

from partwise.config import ModelConfig
from partwise.export.adapter import open_adapter
from partwise.export.folder import ExportOptions, export_runs
from partwise.lineage.manifest import make_manifest
from partwise.lineage.origin import model_record
from partwise.model.load import empty_model, load_model
from partwise.model.parts import apply_plan, resolve_plan
from partwise.model.quantize import dequantize_linears, dequantized, quantize_linear, quantize_parts
from partwise.training.checkpoint import save_final
from partwise.training.optim import Optimizer
from partwise.training.step import batch_loss_sum, model_inputs, train_step

CPU = torch.device("cpu")
QLORA = {"mode": "lora", "lora_rank": 4, "quantization": "nf4"}
FAMILIES = ["gemma3", "llava-next", "qwen2.5-vl", "llama"]


def nf4_values() -> np.ndarray:
    """The 16 values: 8 quantiles of a normal distribution above zero, 7 below, and zero; the largest is 1.

    Source: arXiv 2305.14314, section 3 and the code of its appendix.
    """
    quantile = NormalDist().inv_cdf
    outermost = (31 / 32 + 29 / 30) / 2
    above = [quantile(p) for p in np.linspace(outermost, 0.5, 9)[:-1]]
    below = [-quantile(p) for p in np.linspace(outermost, 0.5, 8)[:-1]]
    return np.array(sorted([*below, 0.0, *above])) / max(above)


def reference_nf4(weight: np.ndarray) -> np.ndarray:
    """Each weight as the nearest of 16 values, times the largest size in its block of 64; fp64."""
    values, blocks = nf4_values(), weight.astype(np.float64).reshape(-1, 64)
    scales = np.abs(blocks).max(axis=1, keepdims=True)
    nearest = np.abs(blocks[:, :, None] / scales[:, :, None] - values).argmin(axis=2)
    return (values[nearest] * scales).reshape(weight.shape)


def test_nf4_weights_are_those_of_the_reference():
    torch.manual_seed(0)
    linear = nn.Linear(192, 40)
    weight = quantize_linear(linear, False, "cpu", torch.float32).weight
    got = dequantized(weight, torch.float32).numpy()
    np.testing.assert_allclose(got, reference_nf4(linear.weight.detach().numpy()), rtol=1e-6, atol=1e-9)
    assert weight.numel() == 192 * 40 // 2


def test_double_quantization_errs_by_its_scales_alone():
    torch.manual_seed(0)
    linear = nn.Linear(512, 256)
    plain = dequantized(quantize_linear(linear, False, "cpu", torch.float32).weight, torch.float32)
    double = dequantized(quantize_linear(linear, True, "cpu", torch.float32).weight, torch.float32)
    ratio = (double / plain)[plain != 0].reshape(-1)
    # 8-bit codes of scales around their mean: far less than the tenth that NF4 itself loses.
    assert 0 < (ratio - 1).abs().max() < 0.01
    assert ((plain == 0) == (double == 0)).all()


def fill_adapters(model):
    """Adapters as after some training: new ones add nothing, and would hide what they are added to."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("is_double", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_qlora_equals_lora_on_the_dequantised_weights(family, is_double, use_dora, open_tiny, take_gradients):
    num_images = (0, 0, 0) if family == "llama" else (1, 0, 2)
    parts = {"language_model": {**QLORA, "double_quantization": is_double, "use_dora": use_dora}}
    results = []
    for is_plain in (False, True):
        tiny = open_tiny(family, num_images)
        plan = resolve_plan(tiny.model, tiny.config(parts))
        modules = plan["language_model"].quantization.modules
        originals = {name: tiny.model.get_submodule(name).weight.detach().clone() for name in modules}
        quantize_parts(tiny.model, plan, CPU)
        if is_plain:
            dequantize_linears(tiny.model, torch.float32)
            for name, original in originals.items():
                weight = tiny.model.get_submodule(name).weight
                reference = torch.from_numpy(reference_nf4(original.numpy())).float()
                torch.testing.assert_close(weight, reference, rtol=0.01 if is_double else 1e-6, atol=1e-9)
        apply_plan(tiny.model, plan)
        fill_adapters(tiny.model)
        losses = [batch_loss_sum(tiny.model, batch, CPU) for batch in tiny.split([2, 1]).batches]
        sum(losses).backward()
        results.append((torch.stack(losses).detach(), take_gradients(tiny.model)))
    (loss, gradients), (plain_loss, plain_gradients) = results
    torch.testing.assert_close(loss, plain_loss, rtol=1e-5, atol=0)
    assert gradients.keys() == plain_gradients.keys() and gradients
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            gradient, plain_gradients[name], rtol=1e-5, atol=1e-5 * gradient.abs().max().item()
        )


def manifest_of(tiny, plan):
    record = model_record(Path(tiny.loaded.path), tiny.loaded.name, empty_model(tiny.loaded.path))
    return make_manifest(plan, record, [], str(tiny.model.dtype).removeprefix("torch."))


@pytest.fixture
def trained(open_tiny, tmp_path):
    """A QLoRA run of some steps: its tiny model, and the adapter folder."""

    def train(family, dtype="float32", **settings):
        tiny = open_tiny(family, (0, 0, 0) if family == "llama" else (1, 0, 2), dtype)
        parts = {"language_model": {**QLORA, **settings}}
        if family != "llama":
            parts["projector"] = "full"
        plan, config = tiny.plan(parts, learning_rate=1e-2)
        optimizer = Optimizer(tiny.model, plan, config.train, 3)
        for step in range(3):
            train_step(tiny.model, tiny.split([2, 1], step), optimizer, CPU)
        manifest = manifest_of(tiny, plan)
        return tiny, save_final(tmp_path, tiny.loaded, plan, manifest)

    return train


@torch.no_grad()
def logits(model, batch):
    model.eval()
    return model(**batch).logits.float()


def inputs_of(tiny):
    return model_inputs(tiny.model, tiny.split([3]).batches[0], CPU)


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_equals_adapter_equals_trained(family, trained, tmp_path):
    tiny, folder = trained(family)
    inputs = inputs_of(tiny)
    expected = logits(tiny.model, inputs)
    torch.testing.assert_close(
        logits(open_adapter(folder, "float32").model, inputs), expected, rtol=0, atol=1e-6
    )
    out = export_runs([folder], tmp_path / "merged", ExportOptions(verify=False))
    merged = load_model(ModelConfig(path=str(out), dtype="float32")).model
    assert all(p.dtype == torch.float32 for p in merged.parameters())
    torch.testing.assert_close(logits(merged, inputs), expected, rtol=0, atol=1e-4)


def test_an_adapter_of_bfloat16_meets_the_codes_that_it_was_trained_on(trained, tmp_path):
    """The base's files are float32: rounded to bfloat16 first, some weights have other codes."""
    tiny, folder = trained("gemma3", "bfloat16")
    name = "model.language_model.layers.0.self_attn.q_proj"
    opened = open_adapter(folder, "float32").model.get_base_model().get_submodule(name)
    codes = tiny.model.get_submodule(name).weight
    assert torch.equal(opened.weight.data, codes.data) and opened.weight.dtype == torch.uint8
    base = load_model(ModelConfig(path=tiny.loaded.path, dtype="float32")).model.get_submodule(name)
    assert not torch.equal(quantize_linear(base, True, "cpu", torch.float32).weight.data, codes.data)


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_transformers_and_peft_open_the_adapter(family, trained):
    """The lines of docs/quantization.md: the skipped modules leave all but the blocks as they are."""
    tiny, folder = trained(family)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=[
            "model.vision_tower",
            "model.visual",
            "model.multi_modal_projector",
            "lm_head",
        ],
    )
    auto = AutoModelForCausalLM if family == "llama" else AutoModelForImageTextToText
    base = auto.from_pretrained(
        tiny.loaded.path, quantization_config=quantization, dtype=torch.float32, device_map="cpu"
    )
    model = PeftModel.from_pretrained(base, str(folder))
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    inputs = inputs_of(tiny)
    torch.testing.assert_close(logits(model, inputs), logits(tiny.model, inputs), rtol=0, atol=1e-3)


def test_a_projector_trained_over_nf4_is_saved_in_the_base_as_it_was(open_tiny, tmp_path):
    tiny = open_tiny("gemma3", (1, 0, 2), "bfloat16")
    plan, config = tiny.plan(
        {"projector": "full", "language_model": {"mode": "frozen", "quantization": "nf4"}}, learning_rate=1e-2
    )
    optimizer = Optimizer(tiny.model, plan, config.train, 1)
    train_step(tiny.model, tiny.split([2, 1]), optimizer, CPU)
    final = save_final(tmp_path, tiny.loaded, plan, manifest_of(tiny, plan))
    saved = load_model(ModelConfig(path=str(final))).model
    base = load_model(ModelConfig(path=tiny.loaded.path)).model
    for name, tensor in base.state_dict().items():
        is_trained = name in plan.trainable
        assert torch.equal(saved.state_dict()[name], tensor) != is_trained, name
        if is_trained:
            assert torch.equal(saved.state_dict()[name], tiny.model.get_parameter(name))
