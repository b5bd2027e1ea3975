"""Does the output folder hold a run already, and is this config the one to go on with it?

In: a Context, or a folder and a config. Out: the checkpoint to start from, or findings. A run folder is never
written over: training takes an empty one, or with --resume one whose run was started with the same config.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from partwise.config import Config, load_config
from partwise.config.sections import EvaluateConfig
from partwise.errors import CheckpointError, ConfigError
from partwise.preflight.context import Context
from partwise.records import Finding, PartsPlan
from partwise.training.checkpoint import newest_checkpoint

# Keys that may differ between a run and its resumption: none of them changes what is learned. Moved files
# are known by their content, which load_checkpoint compares.
FREE_KEYS = (
    "engine",
    "output",
    "model.path",
    "data.train",
    "data.eval",
    "data.num_workers",
    "data.packing",
    "objective.reference_cache",
    "train.gradient_checkpointing",
    "train.compile",
    "train.memory_limit",
    "train.micro_batch_size",
    "train.offload_optimizer",
    "train.log_every",
    "train.eval_every",
    "train.save_every",
    "train.keep_last",
    "train.keep_best",
    "train.verify",
    "track",
    "track.to",
    "track.project",
    "track.name",
    "track.samples",
    "evaluate",
    *(f"evaluate.{name}" for name in EvaluateConfig.model_fields),
)


def check_resume(context: Context) -> list[Finding]:
    """What the output folder holds already, and whether --resume can go on with it under this config.

    Raises:
        CheckpointError: the run in it trains other tensors than this plan.
    """
    folder, where = Path(context.config.output), context.config.where("output")
    if is_empty(folder):
        return [Finding("resume", "info", f"{folder} holds no run: a new one starts at step 1", where)]
    if is_finished(folder):
        return [Finding("resume", "info", f"{folder} holds a finished run, which is left as it is", where)]
    try:
        checkpoint = find_start(folder, context.config, resume=True)
    except (CheckpointError, ConfigError) as error:
        text = f"training would refuse this output: {str(error).removeprefix('--resume: ')}"
        return [Finding("resume", "warning", text, where)]
    check_saved_plan(folder, context.job.plan)
    start = str(checkpoint) if checkpoint else "step 1: it has no whole checkpoint yet"
    return [Finding("resume", "info", f"{folder} holds a run; --resume goes on from {start}", where)]


def check_saved_plan(folder: Path, plan: PartsPlan) -> None:
    """Raises: CheckpointError where the run's plan.json has other tensors that train than the plan."""
    file = folder / "plan.json"
    if not file.is_file():
        return
    saved = {name for part in json.loads(file.read_text())["parts"] for name in part["trainable"]}
    if differing := sorted(saved ^ set(plan.trainable)):
        raise CheckpointError(
            f"{file}: the same config now trains other tensors than the run in this folder: {len(differing)} "
            f"differ, such as {differing[0]}. The model folder or transformers has changed since; put it "
            "back, or choose another output."
        )


def is_empty(folder: Path) -> bool:
    return not folder.is_dir() or not any(folder.iterdir())


def is_finished(folder: Path) -> bool:
    return (folder / "final" / "partwise.json").is_file()


def find_start(folder: Path, config: Config, resume: bool) -> Path | None:
    """The checkpoint to go on from, or None to start at step 0.

    Raises:
        ConfigError: the folder holds a run already and `resume` is not set, or there is nothing to resume.
        CheckpointError: the run was started with another config.
    """
    saved = folder / "config.yaml"
    if not resume:
        if not is_empty(folder):
            raise ConfigError(
                f"{config.where('output')}: output: {folder} holds files already and is left as it is. "
                "Add --resume to go on with that run, or choose another output."
            )
        return None
    if not saved.is_file():
        way_out = (
            "Leave --resume out to start one." if is_empty(folder) else "Choose another output for a new one."
        )
        raise ConfigError(f"--resume: {folder} holds no run to go on with. {way_out}")
    if is_finished(folder):
        raise ConfigError(f"--resume: {folder} is finished: {folder / 'final'} is its result.")
    if changed := list(changed_keys(load_config(saved), config)):
        raise CheckpointError(
            f"--resume: {folder} was started with another config. Put these back, or choose another output: "
            + "; ".join(changed)
        )
    return newest_checkpoint(folder)


def changed_keys(old: Config, new: Config) -> Iterator[str]:
    """ "train.seed was 0, is 1" for each key that differs and changes what is learned."""
    before, after = flatten(old.model_dump()), flatten(new.model_dump())
    # Which steps are logged decides when a stage is stable.
    decides = {"train.log_every"} if any(stage.until for stage in new.stages or ()) else set()
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) != after.get(key) and (key not in FREE_KEYS or key in decides):
            yield f"{key} was {before.get(key)!r}, is {after.get(key)!r}"


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
