"""Usage: python -m benchmarks.speed OUT.jsonl [--cells C4 C3] [--contenders partwise hf] [--time-limit 90]

Every cell is measured by one contender after the other, each in a fresh process, on the same rows. One JSON
line per contender goes to OUT.jsonl at once; one that fails or is not installed says why. A model folder is
written once for each shape. Needs a GPU, but for the cells whose names begin with `tiny`.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.speed.cells import CELLS, Cell
from benchmarks.speed.contenders import OURS, PATIENCE
from benchmarks.speed.contenders.measure import Job
from benchmarks.speed.floor import floor_seconds
from benchmarks.speed.mixtures import Lengths
from benchmarks.speed.rows import write_rows
from benchmarks.step import describe_machine, write_model
from partwise.tiny import write_tiny

PACKAGES = (
    "liger-kernel",
    "trl",
    "unsloth",
    "llamafactory",
    "bitsandbytes",
    "triton",
    "accelerate",
    "flash-attn",
)
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "WANDB_MODE": "disabled",
    "TOKENIZERS_PARALLELISM": "false",
    "UNSLOTH_DISABLE_STATISTICS": "1",
    "UNSLOTH_AUTO_INSTALL": "0",
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
}
# Other contenders count a line break after the last turn as a target, so that losses differ by so much.
SAME_LOSS = 0.005


def main() -> None:
    options = parse()
    run_id = f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{os.getpid()}"
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        for row in measure(options, Path(name)):
            row = {"run_id": run_id, **row}
            with options.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(summary(row), flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed")
    parser.add_argument("out", type=Path)
    real = [name for name in CELLS if not name.startswith("tiny")]
    parser.add_argument("--cells", nargs="+", default=real, choices=list(CELLS))
    parser.add_argument(
        "--contenders", nargs="+", default=[OURS, "hf", "hf-liger", "trl"], choices=list(PATIENCE)
    )
    parser.add_argument("--steps", type=int, default=15, help="measured steps")
    parser.add_argument("--warmup", type=int, default=5, help="steps before those")
    parser.add_argument("--sweep-steps", type=int, default=2, help="steps for each setting that is tried")
    parser.add_argument("--micro-batches", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--time-limit", type=float, default=90, help="seconds for a cell and contender")
    parser.add_argument(
        "--gpus",
        nargs="+",
        type=int,
        default=[1],
        help="numbers of GPUs; Partwise alone above 1, and in cells that only it can run",
    )
    parser.add_argument(
        "--num-workers", type=int, default=min(12, os.cpu_count() or 2), help="processes that prepare rows"
    )
    parser.add_argument("--folder", type=Path, help="where models and rows are written for the time")
    return parser.parse_args()


def measure(options: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """The rows, cell by cell, each with the rates and first losses of those before it in mind."""
    for name in options.cells:
        base = open_base(CELLS[name], folder)
        alone, losses = 0.0, {}
        for num_gpus in options.gpus:
            job = make_job(options, name, base, folder / f"{name}-{num_gpus}", num_gpus)
            num_rows = job.total_steps * job.rows_per_step
            lengths = write_rows(job.cell, base, job.folder, num_rows)
            alone_there = num_gpus > 1 or job.cell.rivals is not None
            for contender in [OURS] if alone_there else options.contenders:
                row = measure_one(contender, job, lengths)
                if contender == OURS and "error" not in row:
                    alone = row["tokens_per_second"] if num_gpus == 1 else alone
                    row |= {"scaling": round(row["tokens_per_second"] / alone, 3)} if alone else {}
                if num_gpus == 1 and "error" not in row:
                    losses[contender] = row["first_loss"]
                    row |= compare_losses(contender, losses)
                yield row
            shutil.rmtree(job.folder)


def open_base(cell: Cell, folder: Path) -> Path:
    """The folder of the cell's model, written when it is first asked for."""
    base = folder / f"base-{cell.model.title.replace(' ', '-')}"
    if not base.is_dir():
        if torch.cuda.is_available():
            write_model(base, cell.model.sizes, cell.model.family)
            # This process keeps nothing on the GPU while contenders are there.
            gc.collect()
            torch.cuda.empty_cache()
        else:
            write_tiny(cell.model.family, base, **cell.model.sizes)
    return base


def make_job(options: argparse.Namespace, name: str, base: Path, folder: Path, num_gpus: int) -> Job:
    return Job(
        name=name,
        base=base,
        folder=folder,
        num_steps=options.steps,
        num_warmup_steps=options.warmup,
        num_sweep_steps=min(options.sweep_steps, options.steps + options.warmup - 1),
        micro_batches=tuple(options.micro_batches),
        seconds=options.time_limit,
        num_workers=options.num_workers,
        num_gpus=num_gpus,
    )


def measure_one(contender: str, job: Job, lengths: list[Lengths]) -> dict[str, Any]:
    cell = job.cell
    machine = describe_machine()
    versions = machine["versions"] | {name: found for name in PACKAGES if (found := find_version(name))}
    row = {
        "cell": job.name,
        "title": cell.title,
        "contender": contender,
        "method": cell.method,
        "num_gpus": job.num_gpus,
        "rows_per_step": job.rows_per_step,
        "command": f"python -m benchmarks.speed {' '.join(sys.argv[1:])}",
        **machine,
        "versions": versions,
    }
    start = time.monotonic()
    found = run_contender(contender, job, PATIENCE[contender])
    row["total_seconds"] = round(time.monotonic() - start, 1)
    if "error" in found:
        return row | found
    floor = sum(length.num_tokens for length in lengths) / floor_seconds(cell, lengths) * job.num_gpus
    fraction = {
        "floor_fraction": float(f"{found['tokens_per_second'] / floor:.4g}"),
        "floor_tokens_per_second": round(floor),
    }
    return row | found | fraction


def run_contender(contender: str, job: Job, patience: float) -> dict[str, Any]:
    """What the contender printed, or why it did not; with its time over, all its processes are stopped."""
    seconds = job.seconds * patience
    path = job.folder / f"{contender}.json"
    path.write_text(replace(job, seconds=seconds, started=time.time()).to_json())
    command = [sys.executable, "-m", f"benchmarks.speed.contenders.{contender.replace('-', '_')}", str(path)]
    environment = {**os.environ, **ENVIRONMENT, "UNSLOTH_COMPILE_LOCATION": str(job.folder / "compiled")}
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        return {"error": f"stopped after {seconds:.0f} seconds", "output": (out + err)[-600:]}
    lines = [line for line in out.splitlines() if line.startswith('{"mask_is_right"')]
    if process.returncode or not lines:
        return {"error": last_line(err or out), "output": (out + err)[-1500:]}
    return json.loads(lines[-1])


def last_line(text: str) -> str:
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return lines[-1][-300:] if lines else "ended without a word"


def compare_losses(contender: str, losses: dict[str, float]) -> dict[str, Any]:
    """A warning where the untouched model's loss is not what the first contender of the cell found."""
    first, loss = next(iter(losses.items())), losses[contender]
    if abs(loss - first[1]) <= SAME_LOSS * first[1]:
        return {}
    return {"warning": f"first loss {loss:.4f}, but {first[1]:.4f} with {first[0]}: not the same training"}


def find_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def summary(row: dict[str, Any]) -> str:
    head = f"{row['cell']:10} {row['contender']:14}"
    if "error" in row:
        return f"{head} error: {row['error']}"
    line = (
        f"{head} {row['tokens_per_second']:8,} tokens/s, {row['floor_fraction']:.1%} of the floor, "
        f"step {row['step_seconds_median']:.3f} s, peak {row['peak_memory_bytes'] / 2**30:.1f} GiB, "
        f"micro-batch {row['micro_batch_size']}{', checkpointing' if row['gradient_checkpointing'] else ''}, "
        f"first loss {row['first_loss']:.4f}, {row['runs']} steps"
    )
    notes = [row["warning"]] if "warning" in row else []
    notes += ["wrong mask"] if row["mask_is_right"] is False else []
    return "; ".join([line, *notes])


if __name__ == "__main__":
    main()
