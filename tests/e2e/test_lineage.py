"""Runs built on runs: adapters that go on, bases that are not theirs, and the tree of ancestors."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

LORA = {"projector": "full", "language_model": {"mode": "lora", "lora_rank": 4, "learning_rate": 1e-2}}


@pytest.fixture(scope="module")
def tuned(toy, tmp_path_factory, make_run):
    """A full fine-tune, and an adapter on it that holds the projector, too."""
    folder = tmp_path_factory.mktemp("tuned")
    full = make_run(toy.config(folder / "full", train__steps=2))
    adapter = make_run(toy.config(folder / "lora", model__path=str(full), parts=LORA, train__steps=2))
    return full, adapter


@pytest.fixture(scope="module")
def make_run():
    from partwise import load_config, train

    return lambda config: train(load_config(config))


def test_an_adapter_goes_on_where_it_ended(toy, tuned, tmp_path, run_cli) -> None:
    full, adapter = tuned
    config = toy.config(
        tmp_path, model__path=str(full), model__adapter=str(adapter), parts=LORA,
        train__steps=1, train__learning_rate=1e-12, train__save_every=1,
    )  # fmt: skip
    parts = {**LORA, "language_model": {**LORA["language_model"], "learning_rate": 1e-12}}
    config.write_text(json.dumps(json.loads(config.read_text()) | {"parts": parts}))
    done = run_cli("train", config)
    assert done.code == 0, done.err
    before = load_file(adapter / "adapter_model.safetensors")
    after = load_file(tmp_path / "run/final/adapter_model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=1e-9)
    (parent,) = json.loads((tmp_path / "run/final/partwise.json").read_text())["parents"]
    assert parent["kind"] == "adapter" and parent["path"] == str(adapter)
    assert [p["kind"] for p in (parent["parents"][0], parent["parents"][0]["parents"][0])] == [
        "full",
        "model",
    ]
    shutil.rmtree(tmp_path / "run/final")
    resumed = run_cli("train", config, "--resume")
    assert resumed.code == 0, resumed.err


def test_the_tree_names_every_ancestor_and_sees_a_changed_one(toy, tuned, tmp_path, run_cli) -> None:
    full, adapter = tuned
    told = run_cli("lineage", adapter.parent)
    assert told.code == 0, told.err
    lines = told.out.splitlines()
    assert lines[0] == f"adapter {adapter}" and "2 steps; projector full, language_model lora" in lines[1]
    assert f"full {full}" in lines[2] and f"model {toy.base}" in lines[4]
    verified = run_cli("lineage", adapter, "--verify")
    assert verified.out.count("unchanged") == 2
    moved = tmp_path / "moved"
    shutil.move(full, moved)
    try:
        assert "gone" in run_cli("lineage", adapter).out
        shutil.copytree(toy.base, full)
        assert f"full {full}" in (out := run_cli("lineage", adapter, "--verify").out)
        assert " changed" in out
    finally:
        shutil.rmtree(full, ignore_errors=True)
        shutil.move(moved, full)
    assert run_cli("lineage", toy.base).out.strip() == f"model {toy.base}"
    drawn = run_cli("lineage", adapter, "--picture", tmp_path / "lineage.png")
    assert drawn.code == 0 and (tmp_path / "lineage.png").read_bytes().startswith(b"\x89PNG")
    refused = run_cli("lineage", adapter, "--picture", tmp_path / "lineage.txt")
    assert refused.code == 1 and "Name a .png or .svg file" in refused.err
    nothing = run_cli("lineage", tmp_path)
    assert nothing.code == 1 and "is no model itself" in nothing.err


def test_another_base_is_named_with_its_parts_and_can_be_accepted(toy, tuned, tmp_path, run_cli) -> None:
    full, adapter = tuned
    config = toy.config(
        tmp_path, model__path=str(toy.base), model__adapter=str(adapter), parts=LORA, train__steps=1
    )
    for command in ("check", "train"):
        refused = run_cli(command, config)
        told = " ".join((refused.out + refused.err).split())
        assert refused.code == 1
        assert "trained on another base" in told and str(full) in told and str(toy.base) in told
        assert "language_model and projector and vision_tower differ" in told and "--accept-base" in told
        assert not (tmp_path / "run").exists()
    accepted = run_cli("train", config, "--accept-base")
    assert accepted.code == 0, accepted.err
    assert "model.accept_base allows" in accepted.out
    manifest = json.loads((tmp_path / "run/final/partwise.json").read_text())
    assert manifest["accepted_base"]["differing"] == ["language_model", "projector", "vision_tower"]
    assert "accepted" in run_cli("lineage", tmp_path / "run").out


MISFITS = {
    "another rank": (
        {"language_model": {"mode": "lora", "lora_rank": 8, "lora_alpha": 8}, "projector": "full"},
        ["in it and (8,", "lora_rank"],
    ),
    "another alpha": (
        {"language_model": {"mode": "lora", "lora_rank": 4, "lora_alpha": 16}, "projector": "full"},
        ["lora_alpha 8.0", "16.0", "set parts.language_model.lora_alpha: 8.0"],
    ),
    "projector closed": (
        {"language_model": {"mode": "lora", "lora_rank": 4}},
        ["2 of projector that it holds do not train by the plan", "multi_modal_projector"],
    ),
    "fewer targets": (
        {"language_model": {"mode": "lora", "lora_rank": 4, "lora_targets": "mlp"}, "projector": "full"},
        ["of language_model that it holds do not train by the plan", "self_attn"],
    ),
    "no lora": ({"projector": "full"}, ["model.adapter", "no part is in mode lora"]),
}


@pytest.mark.parametrize("name", MISFITS)
def test_an_adapter_that_does_not_fit_the_plan_is_told_before_weights_load(
    toy, tuned, tmp_path, run_cli, name
) -> None:
    full, adapter = tuned
    parts, words = MISFITS[name]
    config = toy.config(tmp_path, model__path=str(full), model__adapter=str(adapter), parts=parts)
    done = run_cli("check", config, "--only", "lineage")
    told = " ".join((done.out + done.err).split())
    assert done.code == 1 and all(word in told for word in words), told


def test_a_flipped_bit_in_a_base_or_an_adapter_is_found(toy, tuned, tmp_path, run_cli) -> None:
    full, adapter = tuned
    parts = {"model__path": str(full), "model__adapter": str(adapter), "parts": LORA}
    for place, folder, file in (("base", full, "model"), ("adapter", adapter, "adapter_model")):
        copy = tmp_path / place
        shutil.copytree(folder, copy)
        data = bytearray((copy / f"{file}.safetensors").read_bytes())
        data[-100] ^= 1
        (copy / f"{file}.safetensors").write_bytes(data)
        key = "model__path" if place == "base" else "model__adapter"
        config = toy.config(tmp_path / f"{place}-config", **parts | {key: str(copy)})
        told = run_cli("check", config, "--only", "lineage")
        assert told.code == 1 and f"{copy} is damaged: {file}.safetensors has the SHA-256" in told.out
        exported = run_cli("export", copy, "--out", tmp_path / "out")
        assert exported.code == 1 and f"{copy} is damaged" in exported.err
        assert not (tmp_path / "out").exists()


def test_folders_in_the_wrong_place_are_told(toy, tuned, tmp_path, run_cli) -> None:
    full, adapter = tuned
    as_model = run_cli("check", toy.config(tmp_path / "a", model__path=str(adapter)))
    assert as_model.code == 1 and "as model.adapter" in as_model.out
    as_adapter = toy.config(tmp_path / "b", model__adapter=str(full), parts=LORA)
    done = run_cli("check", as_adapter, "--only", "lineage")
    assert done.code == 1 and "holds a whole model, not an adapter" in done.out


def test_an_adapter_of_plain_peft_goes_on(toy, tmp_path, run_cli) -> None:
    plain = AutoModelForImageTextToText.from_pretrained(toy.base, dtype=torch.float32)
    targets = r".*language_model.*\.(q_proj|v_proj|k_proj|o_proj)"
    peft = get_peft_model(plain, LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.01)
    peft.save_pretrained(tmp_path / "plain")
    parts = {"language_model": {"mode": "lora", "lora_rank": 4, "lora_targets": "attention"}}
    config = toy.config(
        tmp_path,
        model__adapter=str(tmp_path / "plain"),
        parts=parts,
        train__steps=1,
        train__learning_rate=1e-12,
    )
    done = run_cli("train", config)
    assert done.code == 0, done.err
    after = load_file(tmp_path / "run/final/adapter_model.safetensors")
    for name, tensor in load_file(tmp_path / "plain/adapter_model.safetensors").items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=1e-9)
    lines = run_cli("lineage", tmp_path / "run").out.splitlines()
    assert any(f"adapter {tmp_path / 'plain'}" in line for line in lines)
