"""When a run compiles its layers, and when it recomputes them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from partwise.config import load_config
from partwise.errors import ConfigError, PlanError
from partwise.training import job as job_module
from partwise.training.job import COMPILE_PAYS_FROM, Job


@pytest.fixture
def open_job(tiny_folder: Callable[[str], Path], tmp_path: Path) -> Callable[..., Job]:
    def make(packing: bool | None = None, **train: object) -> Job:
        (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "which?", "completion": "red"}) + "\n")
        config = {
            "model": {"path": str(tiny_folder("gemma3"))},
            "parts": {"language_model": "lora"},
            "data": {"train": str(tmp_path / "rows.jsonl"), "packing": packing},
            "train": train,
            "output": str(tmp_path / "run"),
        }
        (tmp_path / "config.yaml").write_text(json.dumps(config, indent=1))
        return Job(load_config(tmp_path / "config.yaml"))

    return make


@pytest.mark.parametrize(
    ("packing", "train", "compiles"),
    [
        (None, {"steps": COMPILE_PAYS_FROM}, True),
        (None, {"steps": COMPILE_PAYS_FROM - 1}, False),
        (False, {"steps": COMPILE_PAYS_FROM}, False),
        (False, {"steps": 1, "compile": True}, True),
        (None, {"steps": COMPILE_PAYS_FROM, "compile": False}, False),
    ],
)
def test_with_a_gpu(open_job, monkeypatch, packing, train, compiles):
    monkeypatch.setattr(job_module, "can_compile", lambda: True)
    assert open_job(packing, **train).compiles is compiles


def test_without_one(open_job, monkeypatch):
    monkeypatch.setattr(job_module, "can_compile", lambda: False)
    assert not open_job(steps=COMPILE_PAYS_FROM).compiles
    with pytest.raises(ConfigError, match=r"config.yaml:\d+: train.compile: true needs a CUDA GPU"):
        _ = open_job(compile=True).compiles


def test_a_model_that_cannot_recompute_is_refused_only_where_it_should(open_job, monkeypatch):
    def refuse(*_):
        raise PlanError("it cannot")

    def on_gpu(**train) -> Job:
        job = open_job(**train)
        job.__dict__["device"] = torch.device("cuda")
        return job

    decoder = on_gpu().open_skeleton().model.get_decoder()
    assert all(layer.gradient_checkpointing for layer in decoder.layers)
    monkeypatch.setattr(job_module, "enable_gradient_checkpointing", refuse)
    on_gpu().open_skeleton()
    with pytest.raises(PlanError, match="it cannot"):
        on_gpu(gradient_checkpointing=True).open_skeleton()
