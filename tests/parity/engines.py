"""Curves of the engines on the ranks that run this, through the real stage loop, as JSON from rank 0.

    torchrun --standalone --nproc_per_node 2 tests/parity/engines.py JOBS.json

JOBS.json: a list of [engine, config as a dict]; each trains into its own output. Also imported by the tests
for what one process gives. Nothing is checked before and nothing verified after: that is tested elsewhere.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from partwise.config import Config
from partwise.engine.choose import make_engine
from partwise.engine.join import joined
from partwise.engine.launch import started_ranks
from partwise.engine.ranks import Ranks
from partwise.run import open_for, train_opened
from partwise.training.checkpoint import checkpoint_folder
from partwise.training.job import Job
from partwise.training.metrics import read_metrics


def train_curve(engine_name: str, values: dict[str, Any], ranks: Ranks, resume_step: int = 0) -> Path:
    """The run folder with its metrics; from a checkpoint in it where `resume_step` is given."""
    config = Config.model_validate(values)
    job, engine = Job(config, ranks), make_engine(engine_name, ranks, config.train.offload_optimizer)
    loaded = job.open_model() if ranks.is_first else open_for(job, engine)
    folder = Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    manifest = ranks.from_first(job.manifest if ranks.is_first else None)
    checkpoint = checkpoint_folder(folder, resume_step) if resume_step else None
    train_opened(job, engine, loaded, 0.0, manifest, checkpoint, Console(quiet=True))
    return folder


def curve(folder: Path) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step, and the evaluation losses at the end."""
    records = list(read_metrics(folder))
    steps = [(record["loss"], record["grad_norm"]) for record in records if "loss" in record]
    return steps + [(record["eval_loss"], 0.0) for record in records if "eval_loss" in record]


def main(jobs_file: str) -> None:
    torch.set_num_threads(1)
    with joined(started_ranks()) as ranks:
        for engine_name, values, resume_step in json.loads(Path(jobs_file).read_text()):
            train_curve(engine_name, values, ranks, resume_step)


if __name__ == "__main__":
    main(sys.argv[1])
    os._exit(0)  # as the command does: communication libraries may abort while Python ends
