"""The disk estimate of preflight: what a run will hold, and the error when it does not fit."""

from __future__ import annotations

import shutil

import pytest

from partwise.config import load_config
from partwise.preflight import Context, output
from partwise.training.job import Job


@pytest.fixture
def job(tiny_folder, tmp_path):
    def make(mode: str, *overrides: str) -> Job:
        path = tmp_path / "config.yaml"
        path.write_text(
            f"model: {{path: {tiny_folder('gemma3')}, dtype: float32}}\nparts: {{language_model: {mode}}}\n"
            f"data: {{train: rows.jsonl}}\noutput: {tmp_path / 'run'}\n"
        )
        return Job(load_config(path, overrides))

    return make


def test_a_full_run_holds_the_model_and_each_checkpoint_three_more_copies(job) -> None:
    made = job("full", "train.save_every=10", "train.keep_last=2")
    total = sum(part.num_parameters for part in made.plan.parts)
    trainable = made.plan["language_model"].num_trainable
    assert output.estimate_bytes(made.plan, made.config) == 4 * total * 4 + 3 * 12 * trainable


def test_the_best_checkpoints_count_too(job) -> None:
    keys = ("train.save_every=10", "data.eval=rows.jsonl")
    best, last = job("full", *keys, "train.keep_best=2"), job("full", *keys, "train.keep_last=4")
    assert output.estimate_bytes(best.plan, best.config) == output.estimate_bytes(last.plan, last.config)


def test_an_adapter_run_holds_what_it_trained(job) -> None:
    made = job("lora")
    assert output.estimate_bytes(made.plan, made.config) == 4 * made.plan["language_model"].num_trainable


def test_a_disk_that_is_too_small_is_an_error(job, monkeypatch) -> None:
    made = job("full")
    assert output.check_disk(Context(made))[0].level == "info"
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(output.shutil, "disk_usage", lambda path: usage)
    (finding,) = output.check_disk(Context(made))
    assert finding.level == "error"
    assert "; 1 KiB are free" in finding.message and "train.keep_last" in finding.fix
