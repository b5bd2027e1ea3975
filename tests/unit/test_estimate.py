"""The memory estimate: exact where tensors can be counted, and the fix that it computes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from partwise.config import load_config
from partwise.model.estimate import Kept, RowShape, estimate_footprint, planned_model
from partwise.model.trace import saved_bytes
from partwise.preflight import Context, memory
from partwise.tables import format_bytes
from partwise.training.job import Job
from partwise.training.optim import Optimizer

ROW = RowShape(num_tokens=64, num_target_tokens=16, tile_shape=(3, 56, 56), num_tiles=1)


@pytest.fixture
def job(tiny_folder, tmp_path, make_image):
    def make(family: str, parts: str, *overrides: str) -> Job:
        make_image().save(tmp_path / "a.png")
        messages = [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "red"}]
        (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": messages, "images": ["a.png"]}) + "\n")
        path = tmp_path / "config.yaml"
        path.write_text(
            f"model: {{path: {tiny_folder(family)}}}\nparts: {parts}\n"
            f"data: {{train: {tmp_path / 'rows.jsonl'}, num_workers: 0, packing: false}}\n"
            f"train: {{gradient_checkpointing: false}}\noutput: {tmp_path / 'run'}\n"
        )
        return Job(load_config(path, overrides))

    return make


def footprint(made: Job, row: RowShape = ROW):
    model = planned_model(made.config.model, made.plan)
    config = made.config
    return estimate_footprint(model, made.plan, row, config.model.attention, config.train.optimizer_states)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("parts", ["{language_model: lora}", "{vision_tower: full, language_model: full}"])
def test_fixed_bytes_are_those_of_the_real_model_and_optimizer(job, parts, dtype) -> None:
    made = job("gemma3", parts, f"model.dtype={dtype}")
    model = made.open_model().model
    optimizer = Optimizer(model, made.plan, made.config.train, 1)
    weights = sum(p.numel() * p.dtype.itemsize for p in model.parameters())
    masters = sum(m.nbytes for n, m in optimizer.masters.items() if m is not optimizer.parameters[n])
    trained = sum(m.numel() for m in optimizer.masters.values())
    assert footprint(made).fixed_bytes == weights + masters + 12 * trained


@pytest.mark.parametrize("is_double", ["true", "false"])
def test_quantised_weights_and_packed_moments_are_counted_to_the_byte(job, is_double) -> None:
    quantized = f"quantization: nf4, double_quantization: {is_double}"
    parts = f"{{vision_tower: {{mode: frozen, {quantized}}}, language_model: {{mode: lora, {quantized}}}}}"
    made = job("gemma3", parts, "train.optimizer_states=8bit", "parts.language_model.lora_rank=64")
    model = made.open_model().model
    optimizer = Optimizer(model, made.plan, made.config.train, 1)
    for master in optimizer.masters.values():
        master.grad = torch.ones_like(master)
    optimizer.step(0)
    weights = 0
    for parameter in model.parameters():
        weights += parameter.nbytes
        if state := getattr(parameter, "quant_state", None):
            tables = [state.absmax, state.code]
            tables += [state.offset, state.state2.absmax, state.state2.code] if state.nested else []
            weights += sum(table.nbytes for table in tables)
    result = footprint(made)
    assert result.share.weights_bytes == weights
    states = (optimizer.adamw.state[master] for master in optimizer.masters.values())
    moments = sum(value.nbytes for state in states for kind, value in state.items() if kind != "step")
    assert result.share.moments_bytes == moments < 8 * sum(m.numel() for m in optimizer.masters.values())
    largest = max(linear.weight.numel() for linear in quantized_linears(made))
    assert result.largest_dequantized_bytes == 2 * largest


def quantized_linears(made: Job):
    return [
        made.empty_model.get_submodule(name)
        for part in made.plan.parts
        if part.quantization
        for name in part.quantization.modules
    ]


@pytest.mark.parametrize(("dtype", "logit_bytes"), [("bfloat16", 6), ("float32", 4)])
def test_the_loss_holds_a_chunk_of_logits_and_the_gradient_of_the_head(job, dtype, logit_bytes) -> None:
    """Once in fp32 and once in 16 bits; where the head is called as a module, all of its backward pass."""
    frozen = footprint(
        job("gemma3", "{projector: full}", f"model.dtype={dtype}"), replace(ROW, num_target_tokens=900)
    )
    vocab_size, width = 512, 64
    assert frozen.vocab_size == vocab_size
    assert frozen.head_bytes(1) == 900 * vocab_size * logit_bytes
    assert frozen.head_bytes(5) == 2048 * vocab_size * logit_bytes
    assert frozen.on_ranks("zero3", 2).head_bytes(5) == 1024 * vocab_size * 12
    trained = footprint(job("gemma3", "{language_model: full}", f"model.dtype={dtype}"))
    copy = 2 * vocab_size * width if dtype == "bfloat16" else 0
    assert trained.head_bytes(1) == 4 * vocab_size * width + max(16 * vocab_size * logit_bytes, copy)


@pytest.mark.parametrize("family", ["gemma3", "llava", "llava-next", "qwen2.5-vl"])
def test_every_family_is_predicted_and_checkpointing_keeps_less(job, family) -> None:
    made = job(family, "{vision_tower: full, projector: full, language_model: full}")
    row = memory.longest_row(Context(made))
    assert row is not None and row.num_tiles >= 1
    result = footprint(made, row)
    assert 0 < result.activations_bytes(1, True) < result.activations_bytes(1, False)
    assert result.activations_bytes(3, False) == 3 * result.activations_bytes(1, False)


def test_a_text_model_has_no_tower(job) -> None:
    result = footprint(job("llama", "{language_model: lora}"), RowShape(64, 16))
    assert result.tower.all_bytes == 0 and result.decoder.all_bytes > 0


def test_frozen_lower_layers_keep_nothing(job) -> None:
    upper = footprint(job("gemma3", '{language_model: {mode: lora, layers: "-1:"}}'))
    assert upper.decoder.all_bytes < footprint(job("gemma3", "{language_model: lora}")).decoder.all_bytes


def test_eager_attention_keeps_its_scores(job) -> None:
    eager = footprint(job("gemma3", "{language_model: lora}", "model.attention=eager"))
    assert eager.decoder.all_bytes > footprint(job("gemma3", "{language_model: lora}")).decoder.all_bytes


def test_saved_bytes_counts_each_storage_once_and_no_weight() -> None:
    linear = torch.nn.Linear(8, 8, device="meta")
    x = torch.empty(4, 8, device="meta", requires_grad=True)
    assert saved_bytes(linear, lambda: linear(x) * linear(x).detach().view(4, 8)) == 2 * 4 * 8 * 4


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_largest_number_of_rows_is_the_last_that_fits(job, checkpointing) -> None:
    result = footprint(job("gemma3", "{language_model: full}"))
    limit = result.peak_bytes(3, checkpointing) + 1
    assert result.largest_num_rows(limit, checkpointing, most=8) == 3
    assert result.largest_num_rows(1, checkpointing, most=8) == 0


def error_of(made: Job, monkeypatch, limit: int, **ranks):
    monkeypatch.setattr(memory, "device_bytes", lambda device: limit)
    made.__dict__["device"] = torch.device("cuda")
    (finding,) = memory.check_memory(Context(made, **ranks))
    return finding


def test_shards_are_advised_where_several_ranks_are_there(job, monkeypatch) -> None:
    made = job("gemma3", "{language_model: full}", "train.micro_batch_size=1")
    whole = footprint(made, memory.longest_row(Context(made)))
    spread = whole.on_ranks("fsdp", 8).peak_bytes(1, False)
    limit = int(spread / 0.9) + 9
    assert limit < whole.peak_bytes(1, True)
    finding = error_of(made, monkeypatch, limit, engine="ddp", num_ranks=8)
    assert f"takes about {format_bytes(whole.peak_bytes(1, False))} on each of 8 ranks" in finding.message
    assert finding.fix.startswith(
        f"Set engine: fsdp, with which it takes {format_bytes(spread)} on each of 8 ranks. "
        "This would fit: train.micro_batch_size: 1"
    )
    assert "fsdp" not in error_of(made, monkeypatch, limit).fix
    fits = error_of(made, monkeypatch, limit, engine="fsdp", num_ranks=8)
    assert fits.level == "info" and fits.values["peak_bytes"] == spread
    assert "fsdp" not in error_of(made, monkeypatch, 1000, engine="fsdp", num_ranks=8).fix


def test_fewer_rows_and_shards_are_both_named(job, monkeypatch) -> None:
    made = job("gemma3", "{language_model: full}", "train.micro_batch_size=8")
    limit = int(footprint(made, memory.longest_row(Context(made))).peak_bytes(3, False) / 0.9) + 9
    fix = error_of(made, monkeypatch, limit, engine="ddp", num_ranks=8).fix
    assert "This would fit: train.micro_batch_size: 3" in fix and "Set engine: fsdp" in fix


def test_too_many_rows_for_a_gpu_is_an_error_with_what_fits(job, monkeypatch) -> None:
    made = job("gemma3", "{language_model: full}", "train.micro_batch_size=8")
    row = memory.longest_row(Context(made))
    finding = error_of(made, monkeypatch, int(footprint(made, row).peak_bytes(3, False) / 0.9) + 9)
    assert finding.level == "error"
    assert "train.micro_batch_size: 3, or train.gradient_checkpointing: true" in finding.fix


def test_by_default_as_many_layers_are_recomputed_as_it_takes(job, monkeypatch) -> None:
    made = job("gemma3", "{language_model: full}", "train.gradient_checkpointing=null")
    whole = footprint(made, memory.longest_row(Context(made)))
    whole = replace(whole, decoder=Kept(32_000_000, 320_000, 1_000_000))
    monkeypatch.setattr(memory, "config_footprint", lambda *_: whole)
    for share in (0, 0.25, 0.5, 1):
        finding = error_of(made, monkeypatch, int(whole.peak_bytes(4, share) / 0.9) + 9)
        assert memory.chosen_share(Context(made)) == share
        assert finding.level == "info" and finding.values["peak_bytes"] == whole.peak_bytes(4, share)
        assert ("with 50% of the layers recomputed" in finding.message) == (share == 0.5)
    finding = error_of(made, monkeypatch, int(whole.peak_bytes(2, 1) / 0.9) + 9)
    assert finding.level == "error" and memory.chosen_share(Context(made)) == 1
    assert finding.fix == "This would fit: train.micro_batch_size: 2."

    del made.__dict__["device"]
    assert made.device.type == "cpu" and memory.chosen_share(Context(made)) == 0


def test_a_memory_limit_is_the_memory_that_there_is(job, monkeypatch) -> None:
    made = job("gemma3", "{language_model: full}", "train.memory_limit=0.001")
    finding = error_of(made, monkeypatch, 1 << 40)
    assert finding.level == "error" and "train.memory_limit is 1.0 MiB" in finding.message


def test_compiled_layers_are_taken_to_keep_less(job, monkeypatch) -> None:
    made = job("gemma3", "{language_model: lora}", "data.packing=true", "train.compile=true")
    made.__dict__["device"] = torch.device("cuda")
    assert made.packs is not None
    row = memory.longest_row(Context(made))
    monkeypatch.setattr(Job, "compiles", False)
    usual = memory.config_footprint(Context(made), made.config, row)
    monkeypatch.setattr(Job, "compiles", True)
    compiled = memory.config_footprint(Context(made), made.config, row)
    sharded = memory.config_footprint(Context(made, engine="fsdp", num_ranks=2), made.config, row)
    assert 0.5 < compiled.decoder.all_bytes / usual.decoder.all_bytes < 0.95
    assert sharded.decoder.all_bytes == usual.decoder.all_bytes


def test_8_bit_moments_are_advised_before_adapters(job, monkeypatch) -> None:
    made = job("gemma3", "{language_model: full}", "train.micro_batch_size=1")
    row = memory.longest_row(Context(made))
    smaller = job(
        "gemma3", "{language_model: full}", "train.micro_batch_size=1", "train.optimizer_states=8bit"
    )
    limit = footprint(smaller, row).peak_bytes(1, True) / 0.9 + 9
    assert limit * 0.9 < footprint(made, row).peak_bytes(1, True)
    finding = error_of(made, monkeypatch, int(limit))
    assert finding.fix.startswith(
        "Set train.optimizer_states: 8bit. This would fit: train.gradient_checkpointing"
    )
    # Where the moments are so already, there is no such advice to give.
    assert "optimizer_states" not in error_of(smaller, monkeypatch, int(limit * 0.9)).fix


def test_lora_is_advised_only_where_full_does_not_fit(job, monkeypatch) -> None:
    made = job("gemma3", "{language_model: full}", "train.micro_batch_size=1")
    finding = error_of(made, monkeypatch, int(footprint(made).fixed_bytes * 0.7))
    assert finding.fix.startswith("Set parts.language_model: lora. This would fit: train.micro_batch_size: 1")
    assert "Nothing less fits" in error_of(made, monkeypatch, 1000).fix


def test_4_bits_are_advised_where_lora_alone_does_not_fit(job, monkeypatch) -> None:
    lora = job("gemma3", "{language_model: lora}", "train.micro_batch_size=1")
    row = memory.longest_row(Context(lora))
    quantized = job("gemma3", "{language_model: {mode: lora, quantization: nf4}}", "train.micro_batch_size=1")
    limit = footprint(quantized, row).peak_bytes(1, True) / 0.9 + 9
    assert limit * 0.9 < footprint(lora, row).peak_bytes(1, True)
    made = job("gemma3", "{language_model: full}", "train.micro_batch_size=1")
    finding = error_of(made, monkeypatch, int(limit))
    assert finding.fix.startswith(
        "Set parts.language_model: {mode: lora, quantization: nf4}. This would fit:"
    )


def test_an_offloaded_optimizer_is_judged_on_gpu_and_host(job, monkeypatch) -> None:
    made = job("gemma3", "{language_model: full}", "engine=fsdp", "train.offload_optimizer=true")
    monkeypatch.setattr(memory, "host_memory_bytes", lambda: 10)
    (on_cpu,) = memory.check_memory(Context(made, engine="fsdp", num_ranks=2))
    spread = footprint(made, memory.longest_row(Context(made))).on_ranks("fsdp", 2)
    assert on_cpu.values["peak_bytes"] == spread.peak_bytes(4, False)

    monkeypatch.setattr(memory, "device_bytes", lambda device: 1 << 40)
    made.__dict__["device"] = torch.device("cuda")
    on_gpu, on_host = memory.check_memory(Context(made, engine="fsdp", num_ranks=2))
    offloaded = spread.on_ranks("fsdp", 2, offload_optimizer=True)
    assert on_gpu.values["peak_bytes"] == offloaded.peak_bytes(4, False) < spread.peak_bytes(4, False)
    assert on_host.level == "warning" and on_host.values["host_bytes"] == 2 * offloaded.share.host_bytes
    monkeypatch.setattr(memory, "host_memory_bytes", lambda: 2 * offloaded.share.host_bytes)
    assert len(memory.check_memory(Context(made, engine="fsdp", num_ranks=2))) == 1


def test_offloading_is_advised_where_nothing_else_fits(job, monkeypatch) -> None:
    parts = "{vision_tower: full, projector: full}"
    made = job("gemma3", parts, "train.micro_batch_size=1", "train.optimizer_states=8bit")
    whole = footprint(made, memory.longest_row(Context(made)))
    peak = whole.on_ranks("fsdp", 1, offload_optimizer=True).peak_bytes(1, False)
    limit = int(peak / 0.9) + 9
    assert limit < whole.peak_bytes(1, True)
    advice = f"Set engine: fsdp with train.offload_optimizer: true, with which it takes {format_bytes(peak)}"
    assert error_of(made, monkeypatch, limit).fix.startswith(advice)
    monkeypatch.setattr(memory, "host_memory_bytes", lambda: 10)
    assert "Nothing less fits" in error_of(made, monkeypatch, limit).fix


def test_the_check_needs_no_weights(job, tiny_folder, tmp_path) -> None:
    folder = tmp_path / "bare"
    folder.mkdir()
    for file in Path(tiny_folder("gemma3")).iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    (finding,) = memory.check_memory(Context(job("gemma3", "{language_model: lora}", f"model.path={folder}")))
    assert finding.level == "info" and finding.values["peak_bytes"] > 0
