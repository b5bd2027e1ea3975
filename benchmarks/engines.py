"""Engines on the GPUs of this machine beside one GPU alone, through `partwise train` itself.

Usage: python benchmarks/engines.py OUT.jsonl [CELL ...]; needs GPUs. A cell is METHOD-ENGINE-COUNT, such as
lora-ddp-2; each is one run in a fresh process, with as many rows a step for each GPU. The engine `trainer` is
plain transformers under DeepSpeed ZeRO-3 (zero3_peer.py). `scaling` is tokens per second over those of
METHOD-single-1 of the same call. One JSON line per cell; one that fails says why.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from step import (
    GEMMA_3_4B,
    GEMMA_3_12B,
    NUM_WARMUP_STEPS,
    append_row,
    describe_machine,
    read_report,
    read_steps,
    write_model,
    write_rows,
)

NUM_STEPS = 12
ROWS_PER_GPU = 16
MICRO_BATCH = 4
SHAPES = {"4b": GEMMA_3_4B, "12b": GEMMA_3_12B}
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"shape": "4b", "parts": {"language_model": {"mode": "lora", "lora_rank": 16}}},
    "full": {
        "shape": "4b",
        "parts": {"projector": "full", "language_model": "full"},
        "train": {"gradient_checkpointing": True},
    },
    "offload": {
        "shape": "4b",
        "parts": {"projector": "full", "language_model": "full"},
        "train": {"gradient_checkpointing": True, "offload_optimizer": True},
    },
    "full12b": {
        "shape": "12b",
        "parts": {"projector": "full", "language_model": "full"},
        "train": {"gradient_checkpointing": True, "optimizer_states": "8bit"},
    },
}
ENGINES = ("ddp", "fsdp", "zero2", "zero3")


def default_cells() -> list[str]:
    count = torch.cuda.device_count()
    engines = ("single", *ENGINES, "trainer")
    pairs = [(method, engine) for method in ("lora", "full") for engine in engines]
    return [f"{method}-{engine}-{1 if engine == 'single' else count}" for method, engine in pairs]


def main() -> None:
    out, names = Path(sys.argv[1]), sys.argv[2:] or default_cells()
    alone: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder_name:
        folder = Path(folder_name)
        write_rows(folder)
        for name in names:
            method = name.split("-")[0]
            shape = METHODS[method]["shape"]
            base = folder / f"base-{shape}"
            if not base.is_dir():
                write_model(base, SHAPES[shape])
            row = run_cell(name, folder, base)
            shutil.rmtree(folder / name, ignore_errors=True)  # a model in full for each cell
            if name == f"{method}-single-1" and "error" not in row:
                alone[method] = row["tokens_per_second"]
            if method in alone and "error" not in row:
                row["scaling"] = round(row["tokens_per_second"] / alone[method], 3)
            append_row(out, row)


def run_cell(name: str, folder: Path, base: Path) -> dict[str, Any]:
    method, engine, count = name.split("-")
    cell, num_gpus = METHODS[method], int(count)
    if engine == "trainer":
        return run_trainer(name, folder, base)
    config = {
        "model": {"path": str(base)},
        "parts": cell["parts"],
        "data": {"train": str(folder / "rows.jsonl"), "num_workers": 6},
        "train": {
            "steps": NUM_STEPS,
            "global_batch_size": ROWS_PER_GPU * num_gpus,
            "micro_batch_size": MICRO_BATCH,
            "learning_rate": 1e-5,
            "verify": "off",
            **cell.get("train", {}),
        },
        "engine": engine,
        "output": str(folder / name),
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "partwise.cli", "train", str(path), "--num-processes", count]
    done = subprocess.run(command, capture_output=True, text=True)
    row = {"contender": "partwise", **describe_cell(name)}
    if done.returncode:
        return row | {"error": done.stderr.strip()[-900:]}
    steps = read_steps(folder / name)
    predicted = read_report(folder / name).get("memory", {}).get("peak_bytes")
    return row | describe_steps(steps, num_gpus) | {"predicted_peak_bytes": predicted}


def run_trainer(name: str, folder: Path, base: Path) -> dict[str, Any]:
    method, _, count = name.split("-")
    out = folder / f"{name}.json"
    script = Path(__file__).with_name("zero3_peer.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", count, str(script)]
    job = [base, folder / "rows.jsonl", method, NUM_STEPS, MICRO_BATCH, ROWS_PER_GPU, out]
    done = subprocess.run([*launch, *map(str, job)], capture_output=True, text=True)
    row = {"contender": "transformers Trainer + DeepSpeed", **describe_cell(name), "engine": "zero3"}
    if done.returncode:
        return row | {"error": done.stderr.strip()[-900:]}
    return row | describe_steps(json.loads(out.read_text()), int(count))


def describe_cell(name: str) -> dict[str, Any]:
    method, engine, count = name.split("-")
    cell, num_gpus = METHODS[method], int(count)
    return {
        "cell": f"gemma-3-{cell['shape']} image questions, {method}",
        "engine": engine,
        "num_gpus": num_gpus,
        "command": f"python benchmarks/engines.py OUT.jsonl {name}",
        **describe_machine(),
        "rows_per_step": ROWS_PER_GPU * num_gpus,
        "micro_batch_size": MICRO_BATCH,
        "gradient_checkpointing": cell.get("train", {}).get("gradient_checkpointing", False),
    }


def describe_steps(steps: list[dict[str, float]], num_gpus: int) -> dict[str, Any]:
    measured = steps[NUM_WARMUP_STEPS:]
    rate = statistics.median(step["num_input_tokens"] / step["step_seconds"] for step in measured)
    return {
        "runs": len(measured),
        "tokens_per_second": round(rate),
        "tokens_per_second_per_gpu": round(rate / num_gpus),
        "step_seconds_median": round(statistics.median(step["step_seconds"] for step in measured), 4),
        "peak_memory_bytes": max(step["peak_memory_bytes"] for step in steps),
        "first_loss": steps[0]["loss"],
        "last_loss": steps[-1]["loss"],
    }


if __name__ == "__main__":
    main()
