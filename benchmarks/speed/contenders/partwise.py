"""Partwise, through `partwise train` itself: a config, a run, and what its metrics.jsonl says.

Its settings stand in settings.py; nothing is searched for here. Tokens are those of the batches, seconds
include waiting for data, as everywhere.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from benchmarks.speed.cells import PARTS
from benchmarks.speed.contenders.measure import LEARNING_RATE, Job, Step, describe_steps, read_job
from benchmarks.speed.mixtures import SEED
from benchmarks.speed.settings import FASTEST

MASK = "packs equal their rows alone, held by tests/parity/test_pack_attention.py"
# Partwise keeps these beside bfloat16 weights that train in full.
PRECISION = "AdamW on float32 masters"


def main() -> None:
    job = read_job(Path(sys.argv[1]))
    config = write_config(job)
    path = job.folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "partwise.cli", "train", str(path)]
    if job.num_gpus > 1:
        command += ["--num-processes", str(job.num_gpus)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr.strip()[-900:] or done.stdout.strip()[-900:])
    print(json.dumps(describe_run(job, config)), flush=True)
    shutil.rmtree(config["output"])


def write_config(job: Job) -> dict[str, Any]:
    cell, settings = job.cell, FASTEST[job.name]
    train = {
        "steps": job.total_steps,
        "global_batch_size": job.rows_per_step,
        "learning_rate": LEARNING_RATE,
        "learning_rate_schedule": "constant",
        "seed": SEED,
        "verify": "off",
    }
    if cell.eight_bit_states:
        train["optimizer_states"] = "8bit"
    data = {
        "train": str(job.folder / "rows.jsonl"),
        "max_seq_len": cell.max_seq_len,
        "overlong": "error",
        "num_workers": job.num_workers,
    }
    if cell.features_are_cached:
        data["feature_cache"] = str(job.folder / "features")
    config: dict[str, Any] = {
        "model": {"path": str(job.base), "dtype": str(job.dtype).removeprefix("torch.")},
        "parts": PARTS[cell.method],
        "data": data,
        "train": train,
        "output": str(job.folder / "run"),
    }
    for section, changes in settings.items():
        config[section] = {**config[section], **changes} if isinstance(changes, dict) else changes
    return config


def describe_run(job: Job, config: dict[str, Any]) -> dict[str, Any]:
    lines = (Path(config["output"]) / "metrics.jsonl").read_text().splitlines()
    logged = [record for line in lines if "loss" in (record := json.loads(line))]
    steps = [Step(line["num_input_tokens"], line["step_seconds"], line["loss"]) for line in logged]
    waits = sorted(line["data_wait_seconds"] for line in logged[job.num_warmup_steps :])
    return {
        "mask_is_right": True,
        "mask_reason": MASK,
        "precision": PRECISION,
        "micro_batch_size": config["train"]["micro_batch_size"],
        "gradient_checkpointing": config["train"].get("gradient_checkpointing", False),
        "settings": FASTEST[job.name],
        **describe_steps(steps[job.num_warmup_steps :]),
        "data_wait_seconds_median": round(waits[len(waits) // 2], 5),
        "peak_memory_bytes": max(line["peak_memory_bytes"] for line in logged),
        "first_step_seconds": round(steps[0].seconds, 2),
        "first_loss": round(steps[0].loss, 5),
        "last_loss": round(steps[-1].loss, 5),
    }


if __name__ == "__main__":
    main()
