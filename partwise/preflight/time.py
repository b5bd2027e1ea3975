"""How long will the run take? Measured on typical micro-batches of the rows that were read, on the device.

In: a Context. Out: one Finding: an estimate and what it is made of. A step is the forward and backward passes
of its micro-batches, an update of as many numbers as train, and what its rows keep it waiting for; an
evaluation is forward passes. Not in it: checkpoints, whose disk is not tried, and the start of the run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import mean, median

import torch

from partwise.data.collate import collate
from partwise.data.scan import Scan
from partwise.engine.choose import runs_compiled
from partwise.preflight.context import Context
from partwise.preflight.probe import examples_at, spread, typical_groups, usable_rows
from partwise.records import Batch, Finding, StepData
from partwise.tables import format_seconds
from partwise.training.evaluations import Schedule
from partwise.training.job import Job
from partwise.training.probe import measuring, untouched
from partwise.training.reference import reference_source
from partwise.training.step import accumulate_loss, batch_loss_sum

# Micro-batches that are timed, for how long they are repeated, and how often at the most.
NUM_BATCHES = 3
ENOUGH_SECONDS = 0.2
MOST_ROUNDS = 5
# How many of the numbers that train are updated on trial: 256 MiB with gradients and moments.
TRIED_NUMBERS = 1 << 24


@dataclass(frozen=True)
class Timing:
    """Seconds of one micro-batch of the usual number of tokens, of one update, and of preparing one row.

    `forward` is the micro-batch without its backward pass, 0 where no evaluation needs it. `number` is how
    many a step has.
    """

    number: int
    backward: float
    forward: float
    update: float
    row: float
    shape: tuple[int, ...]


def check_time(context: Context) -> list[Finding]:
    """The time that the run will take, estimated from a few passes over typical rows.

    Raises:
        DataError: a row has changed since it was scanned.
    """
    job = context.job
    if not usable_rows(context):
        return []  # no row can be used, which another check says
    try:
        timing = time_passes(context)
    except torch.OutOfMemoryError:
        return [Finding("time", "info", "no time can be told: a micro-batch does not fit in memory")]
    step = step_seconds(job, timing)
    num_evaluations, evaluation = evaluations(context, timing)
    total = job.num_steps * step + num_evaluations * evaluation
    text = (
        f"about {format_seconds(total)} for {job.num_steps:,} steps of {format_seconds(step)}, measured on "
        f"{device_name(job.device)}: {describe(job, timing)}"
    )
    if num_evaluations:
        times = "1 evaluation" if num_evaluations == 1 else f"{num_evaluations} evaluations"
        text += f"; {times} of {format_seconds(evaluation)}"
    if job.config.train.save_every:
        text += "; without checkpoints"
    if job.config.train.offload_optimizer:
        text += "; without the way of weights and gradients between host and GPU"
    if runs_compiled(context.engine) and job.compiles:
        text += "; measured before layers are compiled, which makes steps faster"
    values = {
        "seconds": total,
        "num_steps": job.num_steps,
        "step_seconds": step,
        "num_evaluations": num_evaluations,
        "evaluation_seconds": evaluation,
        "micro_batch_seconds": timing.backward,
        "update_seconds": timing.update,
        "row_seconds": timing.row,
    }
    return [Finding("time", "info", text, job.config.where("train"), values=values)]


def describe(job: Job, timing: Timing) -> str:
    """What a step is made of."""
    num_workers = job.config.data.num_workers
    number = timing.number
    batches = "1 micro-batch" if number == 1 else f"{number} micro-batches"
    prepared = format_seconds(job.answers_per_step * timing.row)
    if num_workers:
        by = "another process" if num_workers == 1 else f"each of {num_workers} other processes"
        rows = f"rows that {by} prepares in {prepared}"
    else:
        rows = f"{prepared} to prepare its rows"
    shape = " x ".join(map(str, timing.shape))
    return (
        f"{batches} of {format_seconds(timing.backward)} ({shape} tokens), "
        f"an update of {format_seconds(timing.update)}, {rows}"
    )


def num_micro_batches(context: Context) -> int:
    """Of a step of rows of the usual lengths."""
    job, groups = context.job, typical_groups(context)
    if job.packs is None:
        return -(-job.answers_per_step // job.answers_per_batch)
    return math.ceil(len(groups) * job.answers_per_step / sum(map(len, groups)))


def step_seconds(job: Job, timing: Timing) -> float:
    computing = timing.number * timing.backward + timing.update
    return with_rows(job, computing, job.answers_per_step * timing.row)


def with_rows(job: Job, computing: float, preparing: float) -> float:
    """Seconds of a step or an evaluation: other processes prepare rows meanwhile, this one before."""
    num_workers = job.config.data.num_workers
    return max(computing, preparing / num_workers) if num_workers else computing + preparing


def evaluations(context: Context, timing: Timing) -> tuple[int, float]:
    """How many there are, one at the end included, and the seconds of each, without answers."""
    job, scan = context.job, context.eval_scan
    if job.eval_rows is None or scan is None or not scan.num_examples:
        return 0, 0.0
    schedule = Schedule(context.config, job.num_steps)
    number = sum(schedule.measures_at(done) for done in range(1, job.num_steps + 1))
    longer = tokens_per_row(scan, job) / tokens_per_row(context.train_scan, job)
    num_rows = len(job.eval_rows)
    computing = num_rows / job.answers_per_step * timing.number * timing.forward * longer
    return number, with_rows(job, computing, num_rows * timing.row * longer)


def time_passes(context: Context) -> Timing:
    """Raises: torch.OutOfMemoryError where a micro-batch does not fit."""
    job, model = context.job, context.loaded.model
    batches = typical_batches(context)
    again = seconds_of(partial(typical_batches, context), job.device)  # the first time may still warm up
    row = again / sum(len(batch.sides) for batch in batches)
    number = num_micro_batches(context)
    usual = job.answers_per_step / number * tokens_per_row(context.train_scan, job)
    scale = usual / mean(batch.num_input_tokens for batch in batches)
    with untouched(model):
        passes = [partial(accumulate_loss, model, StepData(0, (batch,)), job.device) for batch in batches]
        backward = measured_seconds(passes, job.device)
    forward = 0.0
    looks_twice = reference_source(job, context.engine) in ("adapter_off", "copy")
    if job.eval_rows is not None or looks_twice:
        with measuring(model):
            passes = [partial(batch_loss_sum, model, batch, job.device) for batch in batches]
            forward = measured_seconds(passes, job.device)
    if looks_twice:  # the reference is asked about each micro-batch, too
        backward, forward = backward + forward, 2 * forward
    sizes = [model.get_parameter(name).numel() for name in job.plan.trainable]
    shape = batches[len(batches) // 2].input_ids.shape
    device = torch.device("cpu") if job.config.train.offload_optimizer else job.device
    seconds = update_seconds(sizes, device)
    return Timing(number, backward * scale, forward * scale, seconds, row, tuple(shape))


def typical_batches(context: Context) -> list[Batch]:
    """Micro-batches of a step of rows from everywhere, long and short ones."""
    job, groups = context.job, typical_groups(context)
    chosen = [groups[i] for i in spread(list(range(len(groups))), NUM_BATCHES)]
    examples = [examples_at(context, group) for group in chosen]
    return [collate(rows, job.pad_token_id, job.packs) for rows in examples if rows]


def tokens_per_row(scan: Scan, job: Job) -> float:
    limit = job.config.data.max_seq_len
    return mean(min(row.num_tokens, limit) for row in scan.rows if not row.dropped)


def measured_seconds(calls: Sequence[Callable[[], object]], device: torch.device) -> float:
    """The mean over the calls of each one's middle time; all are made once more before, to warm: on a GPU
    the first pass of each shape takes several times as long."""
    for call in calls:
        call()
    rounds: list[list[float]] = []
    while not rounds or (sum(map(sum, rounds)) < ENOUGH_SECONDS and len(rounds) < MOST_ROUNDS):
        rounds.append([seconds_of(call, device) for call in calls])
    return mean(median(times) for times in zip(*rounds, strict=True))


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Wall time until the device has done what the call asked of it."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def update_seconds(sizes: Sequence[int], device: torch.device) -> float:
    """Clipping and AdamW on stand-ins for tensors of these sizes, cut where they are large."""
    share = min(1.0, TRIED_NUMBERS / sum(sizes))
    masters = [torch.zeros(max(1, int(size * share)), device=device) for size in sizes]
    for master in masters:
        master.grad = torch.zeros_like(master)
    adamw = torch.optim.AdamW(masters, fused=True)

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        adamw.step()

    return measured_seconds([update], device) / share


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "this CPU"
