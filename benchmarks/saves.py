"""How long training stands still for a checkpoint, on Gemma-3-4B's shape with random weights.

Usage: python benchmarks/saves.py OUT.jsonl [CELL ...]; needs a GPU, but for the cells that begin with "tiny".
A cell trains between saves: the first allocates the memory of the copy, the second is like all later ones,
and the last is written at once, without copy, for comparison. Model and checkpoints are written beside OUT:
for "gemma-3-4b full" 64 GB, and its copy takes 75 GB of host memory. One JSON line per cell.
"""

from __future__ import annotations

import gc
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import yaml
from memory import write_rows
from step import append_row, describe_machine, write_model

from partwise.config import load_config
from partwise.lineage.manifest import stamp_manifest
from partwise.model.parts import set_train_mode
from partwise.tiny import write_tiny
from partwise.training.job import Job
from partwise.training.optim import Optimizer
from partwise.training.saver import Saved, Saver
from partwise.training.step import read_outcomes, train_step

NUM_STEPS = 24  # as many as memory.py's rows are enough for
MODES = {
    "lora": {"language_model": {"mode": "lora", "lora_rank": 16}},
    "full": {"projector": "full", "language_model": "full"},
    "upper-third": {"language_model": {"mode": "full", "layers": "-12:"}},
    "projector": {"projector": "full"},
    "all-full": {"vision_tower": "full", "projector": "full", "language_model": "full"},
}
CELLS = ("gemma-3-4b lora", "gemma-3-4b projector", "gemma-3-4b upper-third", "gemma-3-4b full")


def main() -> None:
    out, names = Path(sys.argv[1]), sys.argv[2:] or CELLS
    with tempfile.TemporaryDirectory(dir=out.absolute().parent) as folder_name:
        folder = Path(folder_name)
        for shape in {name.split()[0] for name in names}:
            if shape == "tiny":
                write_tiny("gemma3", folder / shape)
            else:
                write_model(folder / shape)
        write_rows(folder, "short", 200)
        for name in names:
            row = run_cell(name, folder)
            append_row(out, row)
            gc.collect()
            torch.cuda.empty_cache()


def run_cell(name: str, folder: Path) -> dict:
    shape, mode = name.split()
    config = {
        "model": {"path": str(folder / shape)},
        "parts": MODES[mode],
        "data": {"train": str(folder / "short.jsonl"), "num_workers": 0, "max_seq_len": 16384},
        "train": {
            "steps": NUM_STEPS,
            "global_batch_size": 1,
            "micro_batch_size": 1,
        },
        "output": str(folder / "run"),
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return {
        "cell": f"{shape}, {mode}",
        "command": f"python benchmarks/saves.py OUT.jsonl '{name}'",
        **describe_machine(),
        **measure_saves(Job(load_config(path)), folder),
    }


def measure_saves(job: Job, folder: Path) -> dict:
    loaded, train = job.open_model(), job.config.train
    optimizer = Optimizer(loaded.model, job.plan, train, NUM_STEPS)
    set_train_mode(loaded.model, job.plan)
    manifest = job.manifest
    saves: list[Saved] = []
    run_folder = folder / "run"
    with Saver(run_folder, loaded, job.plan, optimizer, train, saves.append, print) as saver:
        steps = step_seconds(job, loaded.model, optimizer)
        quiet = [next(steps) for _ in range(6)][2:]
        busy = []
        for step in (1, 2):
            shutil.rmtree(run_folder, ignore_errors=True)  # a disk for one is enough
            saver.save(stamp_manifest(manifest, step))
            while not busy or (saver.in_flight and not saver.in_flight.done() and len(busy) < 14):
                busy.append(next(steps))
            saver.wait()
        copies, saver.copies = saver.copies, None
        shutil.rmtree(run_folder)
        saver.save(stamp_manifest(manifest, 3))
    first, second, direct = saves
    return {
        "save_bytes": second.num_bytes,
        "first_stall_seconds": round(first.stall_seconds, 4),
        "stall_seconds": round(second.stall_seconds, 4),
        "write_seconds": round(second.write_seconds, 4),
        "stall_seconds_without_copy": round(direct.stall_seconds, 4),
        "copied": copies is not None,
        "host_copy_bytes": sum(buffer.nbytes for buffer in copies.buffers.values()) if copies else 0,
        "step_seconds_median": round(statistics.median(quiet), 4),
        "step_seconds_median_while_writing": round(statistics.median(busy), 4),
    }


def step_seconds(job: Job, model: torch.nn.Module, optimizer: Optimizer) -> Iterator[float]:
    """The seconds of one step after the other, without the preparation of its rows."""
    for step_data in job.loader.iterate(0, NUM_STEPS):
        start = time.monotonic()
        read_outcomes([train_step(model, step_data, optimizer, job.device)])
        yield time.monotonic() - start


if __name__ == "__main__":
    main()
