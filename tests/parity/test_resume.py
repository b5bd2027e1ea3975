"""A run that stops and goes on ends bit for bit where the uninterrupted one does."""

from __future__ import annotations

import json
import shutil
import signal

import pytest
import torch
from rich.console import Console

from partwise.data.loader import StepLoader
from partwise.engine.device import seed_everything
from partwise.errors import StoppedError
from partwise.lineage.manifest import make_manifest, read_manifest
from partwise.training.checkpoint import newest_checkpoint
from partwise.training.loop import run_stage

STEPS = 6
CASES = {
    "bf16 full": ("bfloat16", {"projector": "full", "language_model": "full"}),
    "fp32 full": ("float32", {"vision_tower": "full", "language_model": "full"}),
    "qlora": ("bfloat16", {"projector": "full", "language_model": {"mode": "lora", "quantization": "nf4"}}),
    "lora with dropout": (
        "bfloat16",
        {"projector": "full", "language_model": {"mode": "lora", "lora_rank": 4, "lora_dropout": 0.3}},
    ),
}


def run(open_tiny, case, run_folder, num_workers=0, resume_from=None, eval_loader=StepLoader, **train):
    """One run over 10 rows in batches of 4, two epochs; the model and the logged records."""
    dtype, parts = CASES[case]
    tiny = open_tiny("gemma3", (1, 0, 2, 0, 1, 1, 0, 1, 0, 1), dtype)
    settings = {
        "global_batch_size": 4,
        "micro_batch_size": 2,
        "warmup_steps": 2,
        "save_every": 2,
        "verify": "off",
        **train,
    }
    seed_everything(0)
    plan, config = tiny.plan(parts, **settings)
    (run_folder.parent / "rows.jsonl").write_text("{}\n")
    config = config.model_copy(
        update={"data": config.data.model_copy(update={"train": str(run_folder.parent / "rows.jsonl")})}
    )
    data = (tiny.conversations, tiny.chat_format, 0, 4, 2)
    loader = StepLoader(*data, seed=0, num_workers=num_workers)
    run_folder.mkdir(exist_ok=True)
    # The RNG is in another state here than it was in an uninterrupted run.
    torch.rand(7 if resume_from else 1)
    run_stage(
        tiny.loaded,
        plan,
        config,
        loader,
        eval_loader(*data, seed=0, num_workers=num_workers) if config.train.eval_every else None,
        run_folder,
        STEPS,
        make_manifest(plan, NO_BASE, config.data.train_files, dtype),
        resume_from,
        Console(quiet=True),
    )
    records = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    return tiny.model.state_dict(), [record for record in records if "checkpoint" not in record]


NO_BASE = {"path": "", "fingerprint": "", "parts": {}}
VOLATILE = ("step_seconds", "data_wait_seconds", "peak_memory_bytes")


def stable(records):
    return [{k: v for k, v in record.items() if k not in VOLATILE} for record in records]


@pytest.mark.parametrize("case", CASES)
def test_resumed_run_equals_uninterrupted_run_bitwise(case, open_tiny, tmp_path):
    expected, expected_records = run(open_tiny, case, tmp_path / "whole", keep_last=9)
    assert [record["step"] for record in expected_records] == [1, 2, 3, 4, 5, 6]

    stopped = tmp_path / "stopped"
    shutil.copytree(tmp_path / "whole", stopped)
    shutil.rmtree(stopped / "checkpoints" / "step-000006")
    (stopped / "checkpoints" / "step-000004" / "partwise.json").unlink()  # as a kill while writing leaves it
    newest = newest_checkpoint(stopped)
    assert newest == stopped / "checkpoints" / "step-000002"
    resumed, records = run(open_tiny, case, stopped, resume_from=newest, keep_last=1)

    assert resumed.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(resumed[name], tensor), name
    assert stable(records) == stable(expected_records)
    assert [folder.name for folder in (stopped / "checkpoints").iterdir()] == ["step-000006"]


def test_workers_and_evaluations_change_nothing(open_tiny, tmp_path):
    expected, expected_records = run(open_tiny, "lora with dropout", tmp_path / "plain")
    other, records = run(
        open_tiny, "lora with dropout", tmp_path / "other", num_workers=1, eval_every=2, save_every=None
    )
    for name, tensor in expected.items():
        assert torch.equal(other[name], tensor), name
    evals = [record for record in records if "eval_loss" in record]
    assert [record["step"] for record in evals] == [2, 4, 6]
    assert evals[-1]["eval_loss"] < evals[0]["eval_loss"]
    assert stable([r for r in records if "loss" in r]) == stable(expected_records)


class InterruptedLoader(StepLoader):
    """Sends SIGTERM after the first step's rows, as a scheduler does in the middle of an evaluation."""

    def iterate(self, first_step, last_step):
        for step_data in super().iterate(first_step, last_step):
            yield step_data
            signal.raise_signal(signal.SIGTERM)


def test_a_signal_in_an_evaluation_gives_it_up_and_saves(open_tiny, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(StoppedError, match=r"stopped by SIGTERM after step 2 of 6; saved .*/step-000002\. "):
        run(
            open_tiny,
            "fp32 full",
            tmp_path / "run",
            save_every=None,
            eval_every=2,
            eval_loader=InterruptedLoader,
        )
    assert signal.getsignal(signal.SIGTERM) is before
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert not any("eval_loss" in record for record in records)
    newest = newest_checkpoint(tmp_path / "run")
    assert newest == tmp_path / "run/checkpoints/step-000002" and "eval_loss" not in read_manifest(newest)
