"""What all contenders share: the job they read, the search for their fastest setting, the line they print.

A contender is a class that opens a job and has `run(setting, num_steps) -> steps`, each time from the first
row on. `mask()` says whether its attention mask is the model's own. Nothing here touches how it trains.
"""

from __future__ import annotations

import gc
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from benchmarks.speed.cells import CELLS, Cell

SLOWER = 0.98  # a larger micro-batch below this share of the best rate ends the search
LEARNING_RATE = 1e-5


@dataclass(frozen=True)
class Job:
    """`seconds` are for all: at `sweep_until` of them the search ends, and before the end measuring does."""

    name: str
    base: Path
    folder: Path
    num_steps: int
    num_warmup_steps: int
    num_sweep_steps: int
    micro_batches: tuple[int, ...]
    seconds: float
    num_workers: int
    num_gpus: int = 1
    sweep_until: float = 0.55
    measure_until: float = 0.92

    @property
    def cell(self) -> Cell:
        return CELLS[self.name]

    @property
    def rows_per_step(self) -> int:
        return self.cell.rows_per_step * self.num_gpus

    @property
    def total_steps(self) -> int:
        return self.num_warmup_steps + self.num_steps

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def samples(self) -> list[dict[str, Any]]:
        """The rows, in the order of the steps; images as whole paths."""
        lines = (self.folder / "samples.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        for record in records:
            record["images"] = [str(self.folder / name) for name in record["images"]]
        return records

    def to_json(self) -> str:
        return json.dumps({**self.__dict__, "base": str(self.base), "folder": str(self.folder)})


def read_job(path: Path) -> Job:
    record = json.loads(path.read_text())
    record |= {"base": Path(record["base"]), "folder": Path(record["folder"])}
    record["micro_batches"] = tuple(record["micro_batches"])
    return Job(**record)


class Setting(NamedTuple):
    micro_batch_size: int
    gradient_checkpointing: bool


class Step(NamedTuple):
    """Tokens are those of the batches, without padding; seconds include waiting for data."""

    num_tokens: int
    seconds: float
    loss: float

    @property
    def rate(self) -> float:
        return self.num_tokens / self.seconds


class Contender(Protocol):
    precision: str  # in what the trained weights are kept and updated

    def run(self, setting: Setting, num_steps: int) -> Iterator[Step]: ...

    def mask(self) -> tuple[bool | None, str]: ...


class Clock:
    """Seconds since this process began to measure."""

    def __init__(self, seconds: float) -> None:
        self.start, self.seconds = time.monotonic(), seconds

    def is_past(self, fraction: float) -> bool:
        return time.monotonic() - self.start > fraction * self.seconds


def main(opens: Callable[[Job], Contender]) -> None:
    job = read_job(Path(sys.argv[1]))
    clock = Clock(job.seconds)
    contender = opens(job)
    right, reason = contender.mask()
    first: list[Step] = []
    best, tried = find_fastest(contender, job, clock, first)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    steps: list[Step] = []
    for step in contender.run(best, job.total_steps):
        steps.append(step)
        if clock.is_past(job.measure_until) and len(steps) > job.num_warmup_steps:
            break
    row = {
        "mask_is_right": right,
        "mask_reason": reason,
        "precision": contender.precision,
        **best._asdict(),
        "tried": tried,
        **describe_steps(steps[min(job.num_warmup_steps, len(steps) - 1) :]),
        "peak_memory_bytes": peak_memory_bytes(),
        "first_loss": round(first[0].loss, 5),
        "last_loss": round(steps[-1].loss, 5),
    }
    print(json.dumps(row), flush=True)


def find_fastest(
    contender: Contender, job: Job, clock: Clock, first: list[Step]
) -> tuple[Setting, list[dict[str, Any]]]:
    """The fastest setting, and what was tried; `first` gets the very first step, of the untouched model.

    With checkpointing a micro-batch is slower than without, so that it begins where that ran out of memory.
    """
    sizes = [size for size in job.micro_batches if job.rows_per_step % size == 0]
    tried: list[dict[str, Any]] = []
    rates: dict[Setting, float] = {}
    fits = 0
    for checkpointing in (False, True):
        for size in sizes:
            if checkpointing and size <= fits:
                continue
            if rates and clock.is_past(job.sweep_until):
                break
            setting = Setting(size, checkpointing)
            rate = try_setting(contender, setting, job.num_sweep_steps, first)
            tried.append({**setting._asdict(), "tokens_per_second": rate and round(rate)})
            if rate is None:
                break
            is_slower = bool(rates) and rate < SLOWER * max(rates.values())
            rates[setting] = rate
            fits = fits if checkpointing else size
            if is_slower:
                break
    if not rates:
        raise MemoryError(f"out of memory with micro-batches of {sizes[0]}, with checkpointing, too")
    return max(rates, key=lambda setting: rates[setting]), tried


def try_setting(contender: Contender, setting: Setting, num_steps: int, first: list[Step]) -> float | None:
    """Tokens per second after one step that warms up; None where memory does not suffice."""
    try:
        steps = list(contender.run(setting, num_steps + 1))
    except torch.OutOfMemoryError:
        steps = []
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if not steps:
        return None
    first.extend(steps[:1])
    return sum(step.num_tokens for step in steps[1:]) / sum(step.seconds for step in steps[1:])


def describe_steps(steps: Sequence[Step]) -> dict[str, Any]:
    rates, seconds = [step.rate for step in steps], [step.seconds for step in steps]
    return {
        "runs": len(steps),
        "tokens_per_second": round(statistics.median(rates)),
        "tokens_per_second_mean": round(sum(step.num_tokens for step in steps) / sum(seconds)),
        "tokens_per_second_min": round(min(rates)),
        "tokens_per_second_max": round(max(rates)),
        "step_seconds_median": round(statistics.median(seconds), 5),
        "tokens_per_step": round(statistics.mean(step.num_tokens for step in steps)),
    }


def peak_memory_bytes() -> int:
    """On a GPU by tensors there, since the search ended; on the CPU by the whole process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
