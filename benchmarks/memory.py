"""Predicted and measured peak memory of training steps, on Gemma-3-4B's shape with random weights.

Usage: python benchmarks/memory.py OUT.jsonl [CELL ...]; needs a GPU. A cell trains 3 steps of 2
micro-batches; all rows of it have one image and like lengths, so the longest row stands for all. One JSON
line per cell.
"""

from __future__ import annotations

import gc
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image
from step import append_row, describe_machine, write_model

from partwise.config import load_config
from partwise.model.parts import set_train_mode
from partwise.preflight import Context
from partwise.preflight.memory import config_footprint, longest_row
from partwise.training.job import Job
from partwise.training.optim import Optimizer
from partwise.training.step import train_step

NUM_STEPS = 3
LENGTHS = {"short": 200, "long": 1600}  # words of an answer; the image and its frame are 260 tokens more
MODES = {
    "projector": {"projector": "full"},
    "lora": {"language_model": {"mode": "lora", "lora_rank": 16}},
    "qlora": {"language_model": {"mode": "lora", "lora_rank": 16, "quantization": "nf4"}},
    "projector-nf4": {"projector": "full", "language_model": {"mode": "frozen", "quantization": "nf4"}},
    "full": {"projector": "full", "language_model": "full"},
    "vision": {"vision_tower": "full"},
    "vision-lora": {"vision_tower": "full", "projector": "full", "language_model": "lora"},
    "all-full": {"vision_tower": "full", "projector": "full", "language_model": "full"},
}
# name -> parts, length, rows of a micro-batch, gradient checkpointing
CELLS = {
    "lora short": ("lora", "short", 4, False),
    "lora long": ("lora", "long", 2, False),
    "lora long checkpointing": ("lora", "long", 4, True),
    "projector short": ("projector", "short", 4, False),
    "projector long": ("projector", "long", 2, False),
    "full short": ("full", "short", 2, False),
    "full long": ("full", "long", 1, False),
    "full long checkpointing": ("full", "long", 4, True),
    "vision short": ("vision", "short", 2, False),
    "vision long": ("vision", "long", 1, False),
    "vision-lora long checkpointing": ("vision-lora", "long", 4, True),
    "all-full short checkpointing": ("all-full", "short", 4, True),
    "lora long eager": ("lora", "long", 1, False),
    "projector short float32": ("projector", "short", 2, False),
    "vision short float32": ("vision", "short", 2, False),
    "all-full short": ("all-full", "short", 2, False),
    "qlora short": ("qlora", "short", 4, False),
    "qlora long": ("qlora", "long", 2, False),
    "qlora long checkpointing": ("qlora", "long", 4, True),
    "projector-nf4 short": ("projector-nf4", "short", 4, False),
    "full short 8bit": ("full", "short", 2, False),
    "full long checkpointing 8bit": ("full", "long", 4, True),
    "qlora long checkpointing 8bit": ("qlora", "long", 4, True),
}
MODEL_KEYS = {"eager": {"attention": "eager"}, "float32": {"dtype": "float32"}}
TRAIN_KEYS = {"8bit": {"optimizer_states": "8bit"}}


def main() -> None:
    out, names = Path(sys.argv[1]), sys.argv[2:] or list(CELLS)
    with tempfile.TemporaryDirectory() as folder_name:
        folder = Path(folder_name)
        write_model(folder / "base")
        for length, num_words in LENGTHS.items():
            write_rows(folder, length, num_words)
        for name in names:
            row = run_cell(name, folder)
            append_row(out, row)
            gc.collect()
            torch.cuda.empty_cache()


def write_rows(folder: Path, length: str, num_words: int) -> None:
    """Chat rows with a noise image of 896 pixels and an answer of `num_words` words."""
    rng = np.random.default_rng(0)
    words = (
        "the",
        "image",
        "shows",
        "a",
        "red",
        "circle",
        "and",
        "two",
        "blue",
        "squares",
        "on",
        "its",
        "left",
    )
    Image.fromarray(rng.integers(0, 256, size=(896, 896, 3), dtype=np.uint8)).save(folder / "image.png")
    rows = []
    for _ in range(NUM_STEPS * 8):
        messages = [
            {"role": "user", "content": "<image>what is it?"},
            {"role": "assistant", "content": " ".join(rng.choice(words, size=num_words))},
        ]
        rows.append(json.dumps({"messages": messages, "images": ["image.png"]}) + "\n")
    (folder / f"{length}.jsonl").write_text("".join(rows))


def run_cell(name: str, folder: Path) -> dict:
    mode, length, num_rows, checkpointing = CELLS[name]
    config = {
        "model": {"path": str(folder / "base"), **MODEL_KEYS.get(name.split()[-1], {})},
        "parts": MODES[mode],
        "data": {
            "train": str(folder / f"{length}.jsonl"),
            "num_workers": 0,
            "max_seq_len": 16384,
            "packing": False,
        },
        "train": {
            "steps": NUM_STEPS,
            "global_batch_size": 2 * num_rows,
            "micro_batch_size": num_rows,
            "gradient_checkpointing": checkpointing,
            **TRAIN_KEYS.get(name.split()[-1], {}),
        },
        "output": str(folder / "run"),
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    job = Job(load_config(path))
    context = Context(job, max_rows=NUM_STEPS * 2)
    longest = longest_row(context)
    footprint = config_footprint(context, job.config, longest)
    predicted = footprint.peak_bytes(num_rows, checkpointing)
    measured = measure_peak(job)
    return {
        "cell": f"gemma-3-4b, {name}",
        "command": f"python benchmarks/memory.py OUT.jsonl '{name}'",
        **describe_machine(),
        "micro_batch_size": num_rows,
        "gradient_checkpointing": checkpointing,
        "num_tokens": longest.num_tokens,
        "num_target_tokens": longest.num_target_tokens,
        "predicted_bytes": predicted,
        **measured,
        "fixed_bytes": footprint.fixed_bytes,
        "activations_bytes": footprint.activations_bytes(num_rows, checkpointing),
        "head_bytes": footprint.head_bytes(num_rows),
    }


def measure_peak(job: Job) -> dict:
    """Peak bytes of the tensors on the GPU over the steps, and why there is none where it did not fit."""
    try:
        model = job.open_model().model
        optimizer = Optimizer(model, job.plan, job.config.train, NUM_STEPS)
        set_train_mode(model, job.plan)
        torch.cuda.reset_peak_memory_stats()
        peaks = []
        for step_data in job.loader.iterate(0, NUM_STEPS):
            train_step(model, step_data, optimizer, job.device)
            peaks.append(torch.cuda.max_memory_allocated())
    except torch.OutOfMemoryError as error:
        return {"error": str(error)[:200]}
    return {"peak_memory_bytes": peaks[-1], "peak_memory_bytes_by_step": peaks}


if __name__ == "__main__":
    main()
