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
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from benchmarks.speed.cells import CELLS, Cell

SLOWER = 0.98  # a larger micro-batch below this share of the last one's rate ends the search
START = 4  # the micro-batch that the search begins with
LEARNING_RATE = 1e-5


@dataclass(frozen=True)
class Job:
    """`seconds` are for all, from `started` on: at `sweep_until` of them the search ends, and measuring takes
    as many steps as there is time for until `measure_until`."""

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
    started: float = 0.0
    sweep_until: float = 0.55
    measure_until: float = 0.85

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
    """Seconds since the job was started, its process's own start included."""

    def __init__(self, job: Job) -> None:
        self.started, self.seconds = job.started, job.seconds

    def left_until(self, fraction: float) -> float:
        return self.started + fraction * self.seconds - time.time()


def main(opens: Callable[[Job], Contender]) -> None:
    job = read_job(Path(sys.argv[1]))
    clock = Clock(job)
    contender = opens(job)
    fitting, tried = find_fastest(contender, job, clock)
    row = {
        "precision": contender.precision,
        **measure(contender, job, clock, fitting),
        "tried": [attempt.describe() for attempt in tried],
        "first_loss": round(next(attempt for attempt in tried if attempt.steps).steps[0].loss, 5),
    }
    # Last, since a forward pass before the first step can disturb what a contender compiles.
    right, reason = contender.mask()
    print(json.dumps({"mask_is_right": right, "mask_reason": reason, **row}), flush=True)


def measure(contender: Contender, job: Job, clock: Clock, fitting: Sequence[Attempt]) -> dict[str, Any]:
    """The fastest of the settings that holds out: longer rows than those that were tried may come later."""
    for attempt in fitting:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        num_warmup, num_steps = affordable_steps(job, clock, attempt.seconds)
        measured = try_setting(contender, attempt.setting, num_warmup + num_steps)
        if measured.steps:
            return {
                **attempt.setting._asdict(),
                **describe_steps(measured.steps[num_warmup:]),
                "num_warmup_steps": num_warmup,
                "peak_memory_bytes": peak_memory_bytes(),
                "last_loss": round(measured.steps[-1].loss, 5),
            }
    raise SystemExit(f"no setting held out; the last one: {measured.error}")


class Attempt(NamedTuple):
    """Without steps where it failed; the first of them warms up."""

    setting: Setting
    steps: list[Step]
    error: str = ""

    @property
    def rate(self) -> float:
        return sum(step.num_tokens for step in self.steps[1:]) / sum(step.seconds for step in self.steps[1:])

    @property
    def seconds(self) -> float:
        return max(step.seconds for step in self.steps[1:])

    def describe(self) -> dict[str, Any]:
        found = {"tokens_per_second": round(self.rate)} if self.steps else {"error": self.error}
        return {**self.setting._asdict(), **found}


def find_fastest(contender: Contender, job: Job, clock: Clock) -> tuple[list[Attempt], list[Attempt]]:
    """The settings that fit, the fastest first, and all that were tried, in their order.

    Micro-batches double from START until one is slower or does not fit; where START does not, they halve.
    With checkpointing a micro-batch is slower than without, so that only those are tried that did not fit.
    """
    sizes = [size for size in job.micro_batches if job.rows_per_step % size == 0]
    tried: list[Attempt] = []

    def fits(size: int, checkpointing: bool) -> bool:
        """Whether it fits and is no slower than the last that did; false, too, where the time is over."""
        done = [attempt for attempt in tried if attempt.steps]
        if done and clock.left_until(job.sweep_until) < 0:
            return False
        attempt = try_setting(contender, Setting(size, checkpointing), job.num_sweep_steps + 1)
        tried.append(attempt)
        before = [other.rate for other in done if other.setting.gradient_checkpointing == checkpointing]
        return bool(attempt.steps) and (not before or attempt.rate > SLOWER * before[-1])

    for checkpointing in (False, True):
        fitted = max((attempt.setting.micro_batch_size for attempt in tried if attempt.steps), default=0)
        larger = [size for size in sizes if size > fitted]
        upward = [size for size in larger if size >= START] or larger[-1:]
        downward = [size for size in reversed(larger) if upward and size < upward[0]]
        num_before = len(tried)
        all(fits(size, checkpointing) for size in upward)
        if len(tried) > num_before and not tried[num_before].steps:
            any(fits(size, checkpointing) for size in downward)
    done = [attempt for attempt in tried if attempt.steps]
    if not done:
        raise SystemExit("; ".join(dict.fromkeys(attempt.error for attempt in tried)))
    return sorted(done, key=lambda attempt: -attempt.rate), tried


def try_setting(contender: Contender, setting: Setting, num_steps: int) -> Attempt:
    """What fails is told with the row: some contenders can do one of two ways of checkpointing only."""
    try:
        attempt = Attempt(setting, list(contender.run(setting, num_steps)))
    except torch.OutOfMemoryError:
        attempt = Attempt(setting, [], "out of memory")
    except Exception as error:
        traceback.print_exc()
        attempt = Attempt(setting, [], f"{type(error).__name__}: {str(error)[:200]}")
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return attempt


def affordable_steps(job: Job, clock: Clock, step_seconds: float) -> tuple[int, int]:
    """Steps to warm up with and to measure: those of the job, or fewer where the time left is short."""
    affordable = int(clock.left_until(job.measure_until) / step_seconds)
    num_steps = max(3, min(job.total_steps, affordable))
    num_warmup = min(job.num_warmup_steps, num_steps // 3)
    return num_warmup, min(job.num_steps, num_steps - num_warmup)


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
