"""Runs in stages: they are the runs that they replace, they go on where they were killed, to the bit."""

from __future__ import annotations

import json
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from starting import start, wait_for

from partwise.config import load_config
from partwise.lineage.chain import trace_lineage
from partwise.lineage.manifest import read_manifest
from partwise.run import check, train
from partwise.training.checkpoint import checkpoint_folder, whole_checkpoints
from partwise.training.metrics import read_metrics

PARTWISE = Path(sys.executable).with_name("partwise")
VOLATILE = ("step_seconds", "data_wait_seconds", "peak_memory_bytes")
SMALL = {"train__global_batch_size": 4, "train__micro_batch_size": 2, "model__dtype": "bfloat16"}
EVERY_STEP = {**SMALL, "train__steps": None, "train__save_every": 1, "train__keep_last": 99}
LORA = {"mode": "lora", "lora_rank": 4, "lora_dropout": 0.3}
FULL_STAGES = [
    {"parts": ["projector"], "steps": 2, "learning_rate": 1e-3},
    {"parts": {"projector": "full", "language_model": {"layers": "-1:"}}, "name": "until",
     "until": {"window": 4, "slope": 2, "spread": 3, "max_steps": 8}},
    {"parts": ["vision_tower", "projector"], "steps": 1},
]  # fmt: skip
LORA_STAGES = [
    {"parts": ["projector"], "steps": 1, "name": "projector"},
    {"parts": {"language_model": {"layers": "-1:"}}, "steps": 2, "name": "top"},
    {"parts": ["language_model", "vision_tower"], "steps": 2, "name": "adapters"},
]
LORA_PARTS = {"vision_tower": LORA, "projector": "full", "language_model": LORA}


def run(toy, folder: Path, resume: bool = False, **changes: Any) -> Path:
    """The run's folder. Nothing is checked before: that takes longer than the steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("partwise.run.CHECKS", [])
        patch.setattr("partwise.run.MODEL_CHECKS", [])
        return train(load_config(toy.config(folder, **changes)), resume, Console(quiet=True)).parent


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.rglob("*.safetensors")) for name, t in load_file(file).items()}


def assert_equal(found: Path, expected: Path) -> None:
    one, other = tensors(found), tensors(expected)
    assert one.keys() == other.keys()
    assert [name for name in other if not torch.equal(one[name], other[name])] == []


def steps(folder: Path) -> list[dict[str, Any]]:
    """Records of steps and of ends of stages, without what no two runs have alike."""
    records = [r for r in read_metrics(folder) if "checkpoint" not in r]
    return [{key: value for key, value in record.items() if key not in VOLATILE} for record in records]


def cut(whole: Path, folder: Path, done: int) -> None:
    """A copy of a run as it was when it was killed after its checkpoint of `done` steps."""
    shutil.copytree(whole, folder / "run")
    shutil.rmtree(folder / "run" / "final")
    for checkpoint in whole_checkpoints(folder / "run")[done:]:
        shutil.rmtree(checkpoint)


@pytest.fixture(scope="module")
def full_run(toy, tmp_path_factory):
    changes = {**EVERY_STEP, "stages": FULL_STAGES}
    return run(toy, tmp_path_factory.mktemp("full"), **changes), changes


@pytest.fixture(scope="module")
def lora_run(toy, tmp_path_factory):
    changes = {**EVERY_STEP, "stages": LORA_STAGES, "parts": LORA_PARTS}
    return run(toy, tmp_path_factory.mktemp("lora"), **changes), changes


@pytest.mark.parametrize("done", [1, 2, 5])
def test_a_run_goes_on_to_the_bit_in_each_stage_and_between_them(done, full_run, toy, tmp_path):
    """After 2 steps a stage is over, and the next one after 4 more, when it is stable."""
    whole, changes = full_run
    assert [p.name for p in whole_checkpoints(whole)] == [f"step-{n:06d}" for n in range(1, 8)]
    cut(whole, tmp_path, done)
    resumed = run(toy, tmp_path, resume=True, **changes)
    assert_equal(resumed / "final", whole / "final")
    assert steps(resumed) == steps(whole)


def test_final_is_the_trained_model_in_a_fresh_process(full_run, toy, tmp_path):
    """All stages are over, so that nothing but final/ is left to make."""
    whole, changes = full_run
    cut(whole, tmp_path, 7)
    resumed = run(toy, tmp_path, resume=True, **{**changes, "train__verify": "sample"})
    assert_equal(resumed / "final", whole / "final")
    (finding,) = [f for f in json.loads((resumed / "report.json").read_text()) if f["check"] == "verify"]
    assert "verified in a fresh process: logits differ by 0 of their norm" in finding["message"]


@pytest.mark.parametrize("done", [2, 3])
def test_adapters_go_on_to_the_bit(done, lora_run, toy, tmp_path):
    whole, changes = lora_run
    cut(whole, tmp_path, done)
    assert_equal(run(toy, tmp_path, resume=True, **changes) / "final", whole / "final")


def test_what_a_stage_trained_stays(lora_run, toy):
    """In final/ the projector is as its stage left it, beside adapters that went on and new ones."""
    whole, _ = lora_run
    first, last = tensors(checkpoint_folder(whole, 1)), tensors(whole / "final")
    base = tensors(toy.base)
    names = [name for name in last if "multi_modal_projector" in name]
    assert len(names) == 2
    for name in names:
        assert torch.equal(last[name], first[name])
        (source,) = [n for n in base if n.endswith(name.rpartition("multi_modal_projector")[2])]
        assert not torch.equal(last[name].float(), base[source].bfloat16().float())
    grown = {name.split(".lora_B")[0] for name, t in last.items() if ".lora_B" in name and t.any()}
    assert grown == {name.split(".lora_B")[0] for name in last if ".lora_B" in name}
    assert trace_lineage(whole / "final", verify=True).parents[0].state == "unchanged"


def test_the_files_say_which_stage_it_was(full_run):
    whole, _ = full_run
    ends = [record for record in read_metrics(whole) if "stage_end" in record]
    assert [(r["step"], r["stage"], r["stage_end"]) for r in ends] == [
        (2, "projector", "its steps are done"),
        (6, "until", "stable"),
        (7, "vision_tower + projector", "its steps are done"),
    ]
    assert abs(ends[1]["slope"]) <= 2 and ends[1]["spread"] <= 3 and ends[1]["window"] == 4
    stages = [record["stage"] for record in read_metrics(whole) if "loss" in record]
    assert stages == ["projector"] * 2 + ["until"] * 4 + ["vision_tower + projector"]
    plan = json.loads((whole / "plan.json").read_text())
    assert [(stage["name"], stage["num_steps"]) for stage in plan["stages"]][1] == ("until", 8)
    trained = [{p["part"] for p in stage["parts"] if p["trainable"]} for stage in plan["stages"]]
    assert trained == [{"projector"}, {"projector", "language_model"}, {"vision_tower", "projector"}]
    manifest = read_manifest(checkpoint_folder(whole, 4))
    assert manifest is not None
    assert manifest["stages"] == [
        {"name": "projector", "steps": 2, "is_done": True},
        {"name": "until", "steps": 2, "is_done": False},
    ]


def test_parts_that_go_on_keep_their_optimizer_and_new_ones_start_afresh(full_run):
    whole, _ = full_run
    before, after = (tensors(checkpoint_folder(whole, n) / "training_state") for n in (2, 3))
    updates = {name: int(t) for name, t in after.items() if name.startswith("step/")}
    assert {n for name, n in updates.items() if "projector" in name} == {3}
    assert {n for name, n in updates.items() if "language_model" in name} == {1}
    assert all("projector" in name for name in before)


def test_two_stages_of_the_same_parts_are_one_run(toy, tmp_path):
    """They differ in a length that no row reaches: masters, moments and the order of rows go on."""
    common = {**SMALL, "parts": {"language_model": "full"}, "train__save_every": 4}
    constant = {"train__learning_rate_schedule": "constant", **common}
    whole = run(toy, tmp_path / "one", train__steps=4, **constant)
    stages = [
        {"parts": ["language_model"], "steps": 3, "name": "a"},
        {"parts": ["language_model"], "steps": 1, "name": "b", "data": {"max_seq_len": 256}},
    ]
    staged = run(toy, tmp_path / "two", train__steps=None, stages=stages, **constant)
    assert_equal(staged / "final", whole / "final")
    assert_equal(
        checkpoint_folder(staged, 4) / "training_state", checkpoint_folder(whole, 4) / "training_state"
    )


def test_stages_are_the_runs_that_one_would_make_by_hand(toy, tmp_path):
    settings = {**SMALL, "train__warmup_steps": 1}
    first = run(toy, tmp_path / "1", parts={"projector": "full"}, train__steps=2, **settings)
    by_hand = run(
        toy,
        tmp_path / "2",
        parts={"language_model": "full"},
        model__path=str(first / "final"),
        data__train=str(toy.held_out),
        train__steps=2,
        **settings,
    )
    stages = [
        {"parts": ["projector"], "steps": 2},
        {"parts": ["language_model"], "steps": 2, "data": {"train": str(toy.held_out)}},
    ]
    parts = {"projector": "full", "language_model": "full"}
    staged = run(toy, tmp_path / "s", parts=parts, train__steps=None, stages=stages, **settings)
    assert_equal(staged / "final", by_hand / "final")
    losses = [record["loss"] for record in steps(staged) if "loss" in record]
    assert losses == [record["loss"] for folder in (first, by_hand) for record in steps(folder)]


def test_a_killed_run_goes_on(full_run, toy, tmp_path, environment):
    """Killed for good as soon as the first stage's last checkpoint is there."""
    whole, changes = full_run
    process = start([PARTWISE, "train", toy.config(tmp_path, **changes)], environment)
    boundary = checkpoint_folder(tmp_path / "run", 2) / "partwise.json"
    wait_for(boundary.is_file, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "run" / "final").exists()
    resumed = run(toy, tmp_path, resume=True, **changes)
    assert_equal(resumed / "final", whole / "final")
    assert steps(resumed) == steps(whole)


def test_two_ranks_train_the_stages(full_run, toy, tmp_path, environment):
    """Of the first two, that is: a decision is the same on both ranks, and so is the model they open."""
    whole, changes = full_run
    changes = {**changes, "stages": FULL_STAGES[:2], "parts": {"projector": "full", "language_model": "full"}}
    command = [PARTWISE, "train", toy.config(tmp_path, **changes), "--num-processes", "2"]
    process = start(command, environment)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    for one, other in zip(steps(tmp_path / "run"), steps(whole), strict=False):
        assert (one["step"], one.get("stage_end")) == (other["step"], other.get("stage_end"))
        assert one.get("loss", 0) == pytest.approx(other.get("loss", 0), rel=1e-3)
    assert [record["step"] for record in steps(tmp_path / "run") if "stage_end" in record] == [2, 6]


def test_check_forecasts_each_stage(toy, tmp_path):
    console = Console(record=True, width=120, quiet=False, file=(tmp_path / "out").open("w"))
    config = load_config(toy.config(tmp_path, train__steps=None, stages=FULL_STAGES))
    wanted = ("plan", "lineage", "template", "memory", "step", "time")
    findings = check(config, only=wanted, console=console)
    assert [f.message for f in findings if f.level == "error"] == []
    for name in ("memory", "time", "step"):
        stages = {finding.values["stage"] for finding in findings if finding.check == name}
        assert stages == {"projector", "until", "vision_tower + projector"}
    text = console.export_text()
    assert "at most 8" in text and "language_model full -1:" in text
    peaks = [f.values["peak_bytes"] for f in findings if f.check == "memory"]
    assert peaks[0] < peaks[1]
    # What all stages share is said once, and rows that they share are read once.
    assert [finding.check for finding in findings].count("lineage") == 1
    assert [finding.check for finding in findings].count("template") == 1


def test_a_stage_beyond_the_models_layers_is_named(toy, tmp_path):
    stages = [{"parts": {"language_model": {"layers": "-9:"}}, "steps": 2, "name": "deep"}]
    config = load_config(
        toy.config(tmp_path, train__steps=None, stages=stages, parts={"language_model": "full"})
    )
    (finding,) = [finding for finding in check(config, only=["plan"]) if finding.level == "error"]
    assert '"-9:" reaches beyond its layers: language_model has 2 layers' in finding.message
