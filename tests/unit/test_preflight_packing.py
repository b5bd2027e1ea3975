"""When rows are packed, what check says of it, and the memory and time of packs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from partwise.config import load_config
from partwise.errors import ConfigError
from partwise.model.attention import PACKED, packing_obstacle, plain_attention, takes_packs
from partwise.preflight import Context
from partwise.preflight.memory import check_memory, longest_row
from partwise.preflight.packing import check_packing
from partwise.preflight.probe import longest_rows, probe_batches
from partwise.preflight.step import check_step
from partwise.preflight.time import num_micro_batches
from partwise.training.job import Job

WORDS = "red green blue cyan "
NUM_ROWS, MICRO, LIMIT = 12, 2, 96


@pytest.fixture
def open_context(tiny_folder: Callable[[str], Path], tmp_path: Path, make_image: Callable):
    def make(family: str, **data: object) -> Context:
        make_image().save(tmp_path / "a.png")
        lines = []
        for i in range(NUM_ROWS):
            row = {"prompt": "which?", "completion": WORDS * (1 + i % 4)}
            if i % 3 == 0 and family not in ("llama", "gemma3-text"):
                row |= {"prompt": "<image>which?", "image": "a.png"}
            lines.append(json.dumps(row))
        (tmp_path / "rows.jsonl").write_text("\n".join(lines))
        attention = data.pop("attention", "sdpa")
        config = {
            "model": {"path": str(tiny_folder(family)), "dtype": "float32", "attention": attention},
            "parts": {"language_model": "full"},
            "data": {"train": str(tmp_path / "rows.jsonl"), "max_seq_len": LIMIT, "num_workers": 0, **data},
            "train": {"steps": 2, "global_batch_size": NUM_ROWS, "micro_batch_size": MICRO},
            "output": str(tmp_path / "run"),
        }
        (tmp_path / "config.yaml").write_text(json.dumps(config, indent=1))
        return Context(Job(load_config(tmp_path / "config.yaml")))

    return make


@pytest.mark.parametrize("family", ["gemma3", "gemma3-text", "llava", "llava-next", "qwen2.5-vl", "llama"])
def test_rows_of_known_families_are_packed_by_default(open_context, family):
    context = open_context(family)
    packs = context.job.packs
    assert packs is not None and packs.max_tokens == MICRO * LIMIT
    assert packs.image_field == ("token_type_ids" if family == "gemma3" else None)
    assert (packs.positions is not None) == (family == "qwen2.5-vl")
    model = context.loaded.model
    assert takes_packs(model) and plain_attention(model) == "sdpa"
    if family not in ("llama", "gemma3-text"):
        assert model.config.vision_config._attn_implementation == "sdpa"
    assert all(batch.pack for batch in context.job.loader.load_step(0).batches)
    (found,) = check_packing(context)
    assert found.level == "info" and found.message.startswith(f"rows are packed: {NUM_ROWS} rows make ")
    assert found.values["packed_fraction"] > 0.7 and 0 < found.values["padded_fraction"] <= 1
    assert found.values["num_packs"] == len(context.job.loader.load_step(0).batches)


def test_packing_can_be_turned_off(open_context):
    context = open_context("gemma3", packing=False)
    assert context.job.packs is None and not takes_packs(context.loaded.model)
    assert all(batch.pack is None for batch in context.job.loader.load_step(0).batches)
    assert check_packing(context)[0].message == "rows are padded: data.packing is false"


def test_an_attention_that_takes_a_mask_pads_and_cannot_be_told_to_pack(open_context):
    context = open_context("gemma3", attention="eager")
    assert context.job.packs is None
    assert check_packing(context)[0].message == "rows are padded: model.attention is eager"
    with pytest.raises(ConfigError, match=r"config.yaml:\d+: data.packing: true: model.attention is eager"):
        _ = open_context("gemma3", attention="eager", packing=True).job.packs
    assert open_context("gemma3", packing=True).job.packs is not None


def test_models_whose_mask_is_not_known_are_named(open_context):
    config = open_context("llama").job.empty_model.config
    assert packing_obstacle(config, "sdpa") == ""
    config.auto_map = {"AutoModelForCausalLM": "code.Model"}
    assert "does not have the attention mask of llama models" in packing_obstacle(config, "sdpa")
    gemma = open_context("gemma3-text").job.empty_model.config
    gemma.use_bidirectional_attention = True
    assert packing_obstacle(gemma, "sdpa") == "its decoder looks at later tokens"
    gemma.use_bidirectional_attention, gemma.attn_logit_softcapping = False, 30.0
    assert "squashes" in packing_obstacle(gemma, "sdpa")
    gemma.model_type = "gemma2"
    assert "of gemma2 models" in packing_obstacle(gemma, "sdpa")


def test_the_longest_pack_is_as_full_as_rows_make_it(open_context):
    context = open_context("gemma3")
    batch = probe_batches(context)[0]
    lengths = [context.train_scan.rows[i].num_tokens for i in longest_rows(context, lambda row: True)]
    assert batch.pack and batch.num_input_tokens == sum(lengths) <= MICRO * LIMIT
    assert sum(lengths) + max(row.num_tokens for row in context.train_scan.rows) > MICRO * LIMIT
    assert [finding.level for finding in check_step(context)] == ["info", "info"]


def test_the_step_check_sees_documents_that_see_each_other(open_context, monkeypatch):
    """Packs of several rows are compared with each row alone."""
    context = open_context("llama")
    documents = torch.nn.functional.scaled_dot_product_attention

    def attend(query, key, value, *_: object):
        return documents(query, key, value, is_causal=True, enable_gqa=True).transpose(1, 2)

    assert check_step(context)[0].level == "info"
    monkeypatch.setattr("partwise.model.attention.attend_documents", attend)
    (found,) = check_step(context)
    assert found.level == "error" and "the loss from hidden states is" in found.message


def test_memory_is_that_of_the_fullest_pack(open_context):
    context = open_context("gemma3")
    row = longest_row(context)
    assert row.num_tokens == LIMIT and row.most_rows >= MICRO and row.num_tiles >= 2
    (found,) = check_memory(context)
    assert f"with packs of up to {MICRO * LIMIT:,} tokens" in found.message
    padded = check_memory(open_context("gemma3", packing=False))[0]
    assert 0.2 < found.values["peak_bytes"] / padded.values["peak_bytes"] < 5


def test_a_step_shorter_than_a_pack_takes_no_more_than_its_rows(open_context):
    context = open_context("llama", max_seq_len=4096)
    row = longest_row(context)
    lengths = [row.num_tokens for row in context.train_scan.rows]
    assert len(lengths) == NUM_ROWS and row.num_tokens == sum(lengths) and row.most_rows == 1
    assert num_micro_batches(context) == 1


def test_packs_are_known_by_the_plain_name_of_their_attention(open_context):
    assert PACKED not in ("sdpa", "eager")
    assert plain_attention(open_context("llama", packing=False, attention="eager").loaded.model) == "eager"
