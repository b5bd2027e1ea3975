"""Runs that prove what they train, and runs that stop at numbers that are not finite and say where."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console

from partwise.config import load_config
from partwise.data.images import decode_image
from partwise.data.sources import open_rows
from partwise.errors import TrainingError
from partwise.training.checkpoint import newest_checkpoint
from partwise.training.job import Job
from partwise.training.loop import run_stage

LORA = {"projector": "full", "language_model": {"mode": "lora", "learning_rate": 1e-2}}


def read_proofs(run: Path) -> list[dict]:
    return [f for f in json.loads((run / "report.json").read_text()) if f["check"] == "proof"]


def test_a_run_proves_its_first_and_its_last_step_and_so_does_its_resumption(toy, tmp_path, run_cli) -> None:
    config = toy.config(tmp_path, parts=LORA, train__steps=6, train__save_every=3)
    done, run = run_cli("train", config), tmp_path / "run"
    assert done.code == 0, done.err
    first, last = read_proofs(run)
    (reason,) = first["values"]["standing"]
    standing = first["values"]["standing"][reason]
    assert reason == "with a gradient of exactly zero" and all("lora_A" in name for name in standing)
    num_trainable, num_frozen = first["values"]["num_trainable"], first["values"]["num_frozen"]
    assert num_trainable == len(json.loads((run / "plan.json").read_text())["parts"][-1]["trainable"]) + 2
    assert first["message"] in done.out and num_frozen > 40
    assert last["message"] in done.out and last["values"]["step"] == 6
    assert f"step 6: all {num_trainable} trainable tensors moved" in last["message"]
    assert "warning" not in (run / "metrics.jsonl").read_text()

    shutil.rmtree(run / "final")
    shutil.rmtree(run / "checkpoints/step-000006")
    resumed = run_cli("train", config, "--resume")
    assert resumed.code == 0, resumed.err
    assert [proof["values"]["step"] for proof in read_proofs(run)] == [4, 6]
    assert f"step 4: all {num_trainable} trainable tensors moved" in resumed.out


def train_here(config: Path, break_model) -> tuple[torch.nn.Module, dict[str, torch.Tensor], str]:
    """A run in this process on a model that was broken after loading: model, weights before, the error."""
    job = Job(load_config(config))
    loaded, folder = job.open_model(), Path(job.config.output)
    folder.mkdir(parents=True)
    with torch.no_grad():
        break_model(loaded.model)
    before = {name: p.detach().clone() for name, p in loaded.model.named_parameters()}
    with pytest.raises(TrainingError) as caught:
        run_stage(
            loaded,
            job.plan,
            job.config,
            job.loader,
            None,
            folder,
            job.num_steps,
            job.manifest,
            console=Console(quiet=True),
        )
    return loaded.model, before, str(caught.value)


def test_a_frozen_tensor_that_something_else_writes_stops_the_run(toy, tmp_path) -> None:
    def add_writer(model: torch.nn.Module) -> None:
        model.model.vision_tower.register_forward_hook(write_bias)

    def write_bias(tower: torch.nn.Module, inputs: object, output: object) -> None:
        parameter = next(tower.parameters())
        parameter.data.view(-1)[0] += 1

    config = toy.config(tmp_path, parts=LORA, train__save_every=1)
    _, _, told = train_here(config, add_writer)
    assert told.startswith(
        "step 1: 1 tensors of which each changed although it is frozen: vision_tower: 1 (model.vision_tower."
    )
    assert newest_checkpoint(tmp_path / "run") is None


def test_an_infinite_weight_is_named_with_its_layer_and_changes_nothing(toy, tmp_path, run_cli) -> None:
    name = "model.language_model.layers.1.mlp.down_proj"
    config = toy.config(tmp_path, train__save_every=1, data__packing=False)

    def set_infinite(model: torch.nn.Module) -> None:
        model.get_submodule(name).weight[0, 0] = float("inf")

    model, before, told = train_here(config, set_infinite)
    assert told.startswith("step 1: the loss is nan and the gradient norms are nan in vision_tower")
    assert (
        f"It began in language_model: {name} (Linear) gave values that are not finite, in micro-batch 1"
        in told
    )
    assert f"The weight {name}.weight itself holds values that are not finite." in told
    assert all(
        torch.equal(p.view(torch.int32), before[n].view(torch.int32)) for n, p in model.named_parameters()
    )
    assert newest_checkpoint(tmp_path / "run") is None

    folder = tmp_path / "run/bad_batch"
    job = Job(load_config(config))
    saved, expected = open_rows([folder / "rows.jsonl"]), [job.rows[i] for i in job.loader.step_rows(0)]
    assert [text_of(row) for row in saved] == [text_of(row) for row in expected]
    for row, original in zip(saved, expected, strict=True):
        mine, theirs = (decode_image(r.images[0], "row").tobytes() for r in (row, original))
        assert mine == theirs
    record = json.loads((folder / "fault.json").read_text())
    assert record["step"] == 1 and record["values"]["loss"] == "nan"
    assert sum(len(batch["rows"]) for batch in record["batches"]) == 16
    pixels = record["batches"][0]["tensors"]["pixel_values"]
    assert pixels["num_not_finite"] == 0 and pixels["shape"][0] == 8 and -1.01 < pixels["min"] < pixels["max"]
    again = run_cli("check", toy.config(tmp_path / "again", data__train=str(folder / "rows.jsonl")))
    assert again.code == 0, again.out


def text_of(row) -> list:
    return [(m.role, m.train, [getattr(c, "text", "image") for c in m.contents]) for m in row.messages]


def test_a_huge_learning_rate_stops_the_run_before_its_damage_is_saved(toy, tmp_path, run_cli) -> None:
    config = toy.config(tmp_path, train__learning_rate=1e25, train__save_every=1, train__log_every=4)
    done, run = run_cli("train", config), tmp_path / "run"
    assert done.code == 1 and "Traceback" not in done.err
    told = " ".join(done.err.split())
    assert "step 2: the loss is nan" in told and "It began in vision_tower: model.vision_tower." in told
    assert newest_checkpoint(run) == run / "checkpoints/step-000001"
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "loss" in record] == [1]
    assert len((run / "bad_batch/rows.jsonl").read_text().splitlines()) == 16
    assert not (run / "final").exists()


def test_a_gradient_that_is_not_finite_is_named_where_the_loss_is_finite(toy, tmp_path) -> None:
    def break_backward(model: torch.nn.Module) -> None:
        model.model.language_model.layers[0].register_full_backward_hook(
            lambda module, into, out: tuple(None if g is None else g * float("inf") for g in into)
        )

    model, before, told = train_here(toy.config(tmp_path, data__packing=False), break_backward)
    assert "It began in the backward pass, in " in told and "is not finite, in micro-batch 1 of 2" in told
    assert "layers.1" not in told
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
