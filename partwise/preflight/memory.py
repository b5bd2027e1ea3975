"""Does a training step fit into the device's memory? Predicted from shapes, before any weight is read.

The longest of the rows that were read stands for each row of a micro-batch, or the fullest pack for each of
them, and one rank for all.
On a GPU a peak above its memory is an error, and the fix is one that was computed; a CPU may swap, so there
it is a warning, and only when it is far above what is available.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from partwise.config import Config, PartConfig
from partwise.data.scan import ScannedRow
from partwise.engine.choose import runs_compiled
from partwise.engine.device import host_memory_bytes
from partwise.errors import PlanError
from partwise.model.estimate import Footprint, RowShape, estimate_footprint, planned_model
from partwise.model.plan import resolve_plan
from partwise.model.tower import replace_tower
from partwise.preflight.context import Context
from partwise.records import Finding
from partwise.tables import format_bytes

# What the estimate leaves for the CUDA context and the gaps between tensors (docs/memory.md).
GPU_WARNING_FRACTION = 0.9
CPU_WARNING_FACTOR = 1.5
# In how many steps the share of recomputed layers is raised until a step fits.
NUM_SHARES = 32

# What takes less on the language model, in the order of what it costs, as a config says it.
ADAPTERS = {
    PartConfig(mode="lora"): "lora",
    PartConfig(mode="lora", quantization="nf4"): "{mode: lora, quantization: nf4}",
}

# What a forward pass of shapes raises in models that branch on values, or whose tower takes other inputs.
UNPREDICTED = (AttributeError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError)


def check_memory(context: Context) -> list[Finding]:
    """The predicted peak of a step, what it is made of, and whether the device has as much."""
    config, job = context.config, context.job
    row = longest_row(context)
    if row is None:
        return []  # no row can be used, which another check says
    try:
        footprint = config_footprint(context, config, row)
    except (NotImplementedError, RuntimeError) as error:
        text = (
            f"the memory of a step cannot be predicted for {config.model.path}: {str(error).splitlines()[0]}"
        )
        return [Finding("memory", "info", text, config.where("model"))]
    limit = limit_bytes(config, job.device)
    on_host = judge_host(context, footprint)
    finding = judge(context, footprint, row, limit, on_gpu=job.device.type == "cuda")
    if finding.level != "error":
        return [finding, *on_host]
    return [with_fix(context, finding, footprint, row, limit), *on_host]


def judge(context: Context, footprint: Footprint, row: RowShape, limit: int, on_gpu: bool) -> Finding:
    """The prediction beside the limit, without a fix."""
    config, train = context.config, context.config.train
    share = recomputed_share(config, footprint, context.job.device)
    peak = footprint.peak_bytes(train.micro_batch_size, share)
    device = "the GPU has" if on_gpu else "this machine has free"
    if train.memory_limit is not None and on_gpu:
        device = "train.memory_limit is"
    text = (
        f"a step takes about {format_bytes(peak)}{on_each(context)}, {describe(footprint, config, share)}, "
        f"with {describe_micro_batch(context, row)}; "
        f"{device} {format_bytes(limit)}"
    )
    level: Literal["error", "warning", "info"] = "info"
    if on_gpu and peak > GPU_WARNING_FRACTION * limit:
        level = "error" if peak > limit else "warning"
    elif not on_gpu and peak > CPU_WARNING_FACTOR * limit:
        level = "warning"
    values = {"peak_bytes": peak, "limit_bytes": limit, "num_tokens": row.num_tokens}
    fix = "It may not fit: lower train.micro_batch_size." if level == "warning" else ""
    return Finding("memory", level, text, config.where("train.micro_batch_size"), fix, values)


def describe_micro_batch(context: Context, row: RowShape) -> str:
    size = context.config.train.micro_batch_size
    if row.most_rows is None:
        rows = "pairs" if context.config.objective.per_row == 2 else "rows"
        return f"{size} {rows} of {row.num_tokens} tokens a micro-batch"
    return f"packs of up to {min(size, row.most_rows) * row.num_tokens:,} tokens"


def judge_host(context: Context, footprint: Footprint) -> list[Finding]:
    """A warning where the shards that are kept on the host are more than it has free."""
    needed, limit = all_host_bytes(context, footprint), host_memory_bytes()
    if needed <= limit:
        return []
    text = (
        f"train.offload_optimizer keeps about {format_bytes(needed)} in this machine's memory, which has "
        f"{format_bytes(limit)} free"
    )
    fix = "It may not fit: train fewer parts, set train.optimizer_states: 8bit, or take more machines."
    values = {"host_bytes": needed, "limit_bytes": limit}
    return [Finding("memory", "warning", text, context.config.where("train.offload_optimizer"), fix, values)]


def all_host_bytes(context: Context, footprint: Footprint) -> int:
    """Of all ranks on this machine. A check stands for a run whose ranks are all here."""
    ranks = context.job.ranks
    return footprint.share.host_bytes * (ranks.local_size if ranks.size > 1 else context.num_ranks)


def fits_alone(context: Context) -> bool:
    """Whether one rank has room for the passes that the checks make: weights, no masters or moments."""
    config, row = context.config, longest_row(context)
    if row is None:
        return True
    try:
        footprint = config_footprint(context, config, row).on_ranks("single", 1)
    except UNPREDICTED:
        return False
    share = recomputed_share(config, footprint, context.job.device)
    peak = footprint.peak_bytes(config.train.micro_batch_size, share)
    needed = peak - footprint.share.masters_bytes - footprint.share.moments_bytes
    return needed < GPU_WARNING_FRACTION * limit_bytes(config, context.job.device)


def chosen_share(context: Context) -> float:
    """The share of layers that the run recomputes; all where the memory of a step is not predicted."""
    if context.config.train.gradient_checkpointing is not None or context.job.device.type == "cpu":
        return float(bool(context.config.train.gradient_checkpointing))
    row = longest_row(context)
    if row is None:
        return 0.0
    try:
        footprint = config_footprint(context, context.config, row)
    except UNPREDICTED:
        return 1.0
    return recomputed_share(context.config, footprint, context.job.device)


def recomputed_share(config: Config, footprint: Footprint, device: torch.device) -> float:
    """What the config says, or on a GPU the least share with which a step fits; 1 where none does."""
    train = config.train
    if train.gradient_checkpointing is not None or device.type == "cpu":
        return float(bool(train.gradient_checkpointing))
    limit = GPU_WARNING_FRACTION * limit_bytes(config, device)
    shares = (number / NUM_SHARES for number in range(NUM_SHARES))
    fitting = (share for share in shares if footprint.peak_bytes(train.micro_batch_size, share) < limit)
    return next(fitting, 1.0)


def on_each(context: Context) -> str:
    """Where it is taken; "" where there is one rank."""
    return f" on each of {context.num_ranks} ranks" if context.num_ranks > 1 else ""


def describe(footprint: Footprint, config: Config, recomputed: float) -> str:
    held = footprint.share
    trained = held.masters_bytes + held.moments_bytes + held.gradients_bytes
    kept = footprint.activations_bytes(config.train.micro_batch_size, recomputed)
    text = (
        f"of it weights {format_bytes(held.weights_bytes)}, masters, moments and gradients "
        f"{format_bytes(trained)}, activations {format_bytes(kept)}"
    )
    return f"{text} with {recomputed:.0%} of the layers recomputed" if 0 < recomputed < 1 else text


def with_fix(context: Context, finding: Finding, footprint: Footprint, row: RowShape, limit: int) -> Finding:
    """The finding with what would fit, tried in the order of what it costs; each was computed."""
    fixes = [rows_fix(context, context.config, footprint, limit), engine_fix(context, footprint, limit)]
    fix = " ".join(filter(None, fixes)) or states_fix(context, row, limit)
    if context.config.parts.settings("language_model"):
        fix = fix or adapter_fix(context, row, limit)
    fix = fix or offload_fix(context, footprint, limit)
    fix = fix or "Nothing less fits: train fewer parts, lower data.max_seq_len, or take a larger GPU."
    return Finding(finding.check, finding.level, finding.message, finding.where, fix, finding.values)


def engine_fix(context: Context, footprint: Footprint, limit: int) -> str:
    """Weights and states in shards over the ranks at hand; "" where they are so already, or do not fit so."""
    if context.num_ranks == 1 or context.engine == "fsdp":
        return ""
    spread, train = footprint.on_ranks("fsdp", context.num_ranks), context.config.train
    fix = rows_fix(context, context.config, spread, limit, always=True)
    share = recomputed_share(context.config, spread, context.job.device)
    peak = spread.peak_bytes(train.micro_batch_size, share)
    return fix and f"Set engine: fsdp, with which it takes {format_bytes(peak)}{on_each(context)}. {fix}"


def states_fix(context: Context, row: RowShape, limit: int) -> str:
    """AdamW's moments in 8 bits; "" where that is not enough, or is so already."""
    if context.config.train.optimizer_states == "8bit":
        return ""
    train = context.config.train.model_copy(update={"optimizer_states": "8bit"})
    config = context.config.model_copy(update={"train": train})
    fix = rows_fix(context, config, config_footprint(context, config, row), limit, always=True)
    return fix and f"Set train.optimizer_states: 8bit. {fix}"


def adapter_fix(context: Context, row: RowShape, limit: int) -> str:
    """Adapters on the language model, over 4-bit weights where they are too many else; "" where none fit."""
    for setting, text in ADAPTERS.items():
        parts = context.config.parts.model_copy(update={"language_model": setting})
        config = context.config.model_copy(update={"parts": parts})
        try:
            fix = rows_fix(context, config, config_footprint(context, config, row), limit, always=True)
        except PlanError:
            continue
        if fix:
            return f"Set parts.language_model: {text}. {fix}"
    return ""


def offload_fix(context: Context, footprint: Footprint, limit: int) -> str:
    """All shards on the host; "" where they are there already, cannot be cut, or that is not enough."""
    train = context.config.train
    if train.offload_optimizer or any(part.quantization for part in context.job.plan.parts):
        return ""
    spread = footprint.on_ranks("fsdp", context.num_ranks, offload_optimizer=True)
    if all_host_bytes(context, spread) > host_memory_bytes():
        return ""
    fix = rows_fix(context, context.config, spread, limit, always=True)
    share = recomputed_share(context.config, spread, context.job.device)
    peak = spread.peak_bytes(train.micro_batch_size, share)
    return fix and (
        f"Set engine: fsdp with train.offload_optimizer: true, with which it takes {format_bytes(peak)}"
        f"{on_each(context)} and steps are slower. {fix}"
    )


def rows_fix(context: Context, config: Config, footprint: Footprint, limit: int, always: bool = False) -> str:
    """What to set so that the footprint fits; "" where nothing does. `always`: as it is may be the answer."""
    train = config.train
    most = train.micro_batch_size if always else train.micro_batch_size - 1
    limit = int(GPU_WARNING_FRACTION * limit)
    fixes = []
    # By default all layers are recomputed before rows have to be fewer.
    is_chosen = train.gradient_checkpointing is None and context.job.device.type == "cuda"
    if rows := footprint.largest_num_rows(limit, is_chosen or bool(train.gradient_checkpointing), most):
        fixes.append(f"train.micro_batch_size: {rows}")
    if not train.gradient_checkpointing and not is_chosen:
        rows = footprint.largest_num_rows(limit, True, train.micro_batch_size)
        if rows:
            fixes.append(f"train.gradient_checkpointing: true with train.micro_batch_size: {rows}")
    return f"This would fit: {', or '.join(fixes)}." if fixes else ""


def config_footprint(context: Context, config: Config, row: RowShape) -> Footprint:
    plan = resolve_plan(context.job.empty_model, config, context.job.whole_plan)
    whole = None if config.parts != context.config.parts else context.job.whole_plan
    model = planned_model(config.model, plan, whole)
    if context.job.cut is not None:
        replace_tower(model, context.job.cut)
        row = replace(row, num_tiles=0)
    attention = config.model.attention if row.most_rows is None else "packed"
    compiled = runs_compiled(context.engine) and context.job.compiles
    alone = estimate_footprint(model, plan, row, attention, config.train.optimizer_states, compiled)
    if config.objective.has_reference and config.objective.reference == "copy":
        held = replace(alone.share, weights_bytes=2 * alone.share.weights_bytes)
        return replace(alone, share=held)  # by engines alone that hold all of it on each rank
    # On a CPU the host is where shards are anyway.
    offloads = config.train.offload_optimizer and context.job.device.type == "cuda"
    return alone.on_ranks(context.engine, context.num_ranks, offloads)


def longest_row(context: Context) -> RowShape | None:
    """The most tokens, targets and images of a usable row that was read; None where there is no such row.

    Of a pair, both answers as if they were one. Of packs, max_seq_len tokens of one, which is what
    micro_batch_size counts there, and twice that of pairs.
    """
    rows = [row for row in context.train_scan.rows if not row.dropped]
    if not rows:
        return None
    sizes = [row.image_sizes for row in rows if row.image_sizes]
    tiles = [image_tiles(context.job.processor, size) for size in {s for group in sizes for s in group}]
    tile_shape, num_tiles = max(tiles, key=lambda tile: (tile[1], tile[0]), default=((), 0))
    per_row = context.config.objective.per_row
    shape = RowShape(
        num_tokens=per_row * min(max(row.num_tokens for row in rows), context.config.data.max_seq_len),
        num_target_tokens=per_row * max(row.num_target_tokens for row in rows),
        tile_shape=tile_shape,
        num_tiles=per_row * num_tiles * max((len(group) for group in sizes), default=0),
    )
    return shape if context.job.packs is None else pack_shape(context, shape, rows)


def pack_shape(context: Context, longest: RowShape, rows: Sequence[ScannedRow]) -> RowShape:
    """max_seq_len tokens of a pack, as full of images as the row that has the most for its tokens; less where
    the longest rows that a rank's share of a step could have are shorter than that."""
    limit, per_row = context.config.data.max_seq_len, context.config.objective.per_row
    num_rows = math.ceil(context.job.answers_per_step / context.num_ranks)
    lengths = sorted((min(row.num_tokens, limit) for row in rows), reverse=True)[:num_rows]
    all_tokens = math.ceil(sum(lengths) * num_rows / len(lengths))
    num_tokens = min(limit * per_row, all_tokens)
    densest = max(len(row.image_sizes) / min(row.num_tokens, limit) for row in rows)
    most_images = max(len(row.image_sizes) for row in rows)
    tiles_per_image = longest.num_tiles // max(1, most_images * per_row)
    num_images = min(math.ceil(densest * num_tokens), num_rows * most_images)
    return replace(
        longest,
        num_tokens=num_tokens,
        num_target_tokens=num_tokens,
        num_tiles=tiles_per_image * num_images,
        most_rows=math.ceil(all_tokens / num_tokens),
    )


def image_tiles(processor: Any, size: tuple[int, int]) -> tuple[tuple[int, ...], int]:
    """What the processor makes of a black image of (width, height): shape of a tile, and how many tiles."""
    made = processor.image_processor(images=[Image.new("RGB", size)], return_tensors="pt")
    pixels = torch.as_tensor(np.asarray(made["pixel_values"]))
    last = 3 if pixels.ndim >= 4 else 1
    tile_shape = tuple(pixels.shape[-last:])
    return tile_shape, pixels.numel() // int(np.prod(tile_shape))


def limit_bytes(config: Config, device: torch.device) -> int:
    """What the run may take: train.memory_limit on a GPU, or all that the device has."""
    limit, has = config.train.memory_limit, device_bytes(device)
    return has if limit is None or device.type == "cpu" else min(has, int(limit * 2**30))


def device_bytes(device: torch.device) -> int:
    """Memory of the GPU; on a CPU what is free now, or all of it where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return host_memory_bytes()
