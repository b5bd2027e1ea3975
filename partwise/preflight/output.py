"""Can the run folder be written, does the config in it read back, and does it all fit on the disk?"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from partwise.config import Config, dump_config, load_config
from partwise.config.expand import has_stages
from partwise.errors import ConfigError
from partwise.model.shares import moment_bytes
from partwise.preflight.context import Context
from partwise.records import Finding, PartsPlan
from partwise.tables import format_bytes


def check_config(context: Context) -> list[Finding]:
    """The config reads back as the same when it is written to the run folder, so that a run can be resumed.

    Raises:
        ConfigError: it reads back as another one, so that the run could not be resumed.
    """
    config = context.config
    with TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"
        file.write_text(dump_config(config), encoding="utf-8")
        if load_config(file) != config:
            raise ConfigError("the config written out is not the same when it is read: report this as a bug.")
    return [Finding("config", "info", "the config reads back as the same")]


def check_output(context: Context) -> list[Finding]:
    """The output folder is writable, or can be made.

    Raises:
        ConfigError: it is a file, or its nearest existing parent cannot be written.
    """
    output = Path(context.config.output)
    where = context.config.where("output")
    existing = nearest_existing(output)
    if not existing.is_dir():
        raise ConfigError(f"{where}: output: {existing} is a file, not a folder. Choose another output.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(
            f"{where}: output: {output} cannot be written: no permission in {existing}. "
            "Choose another output."
        )
    return [Finding("output", "info", f"{output} can be written", where)]


def check_disk(context: Context) -> list[Finding]:
    """Final model and checkpoints fit into the free space. Sizes are estimated from the plan."""
    output = Path(context.config.output)
    needed = estimate_bytes(context.job.plan, context.config)
    free = shutil.disk_usage(nearest_existing(output)).free
    text = f"{output} will hold about {format_bytes(needed)}; {format_bytes(free)} are free"
    where = context.config.where("output")
    if needed < free:
        return [Finding("disk", "info", text, where)]
    return [
        Finding("disk", "error", text, where, "Free space, lower train.keep_last, or choose another output.")
    ]


def estimate_bytes(plan: PartsPlan, config: Config) -> int:
    """Bytes of final/ and of the most checkpoints that exist at a time, the one being written included.

    A checkpoint adds the optimizer's fp32 masters and its moments to the weights that final/ holds.
    """
    trainable = sum(part.num_trainable for part in plan.parts)
    saved = trainable if plan.has_adapters else sum(part.num_parameters for part in plan.parts)
    train = config.train
    # A stage that others follow ends with a checkpoint, too.
    saves = train.save_every or has_stages(config)
    num_checkpoints = train.keep_last + train.keep_best + 1 if saves else 0
    weight_bytes = saved * {"bfloat16": 2, "float32": 4}[config.model.dtype]
    state_bytes = 4 * trainable + moment_bytes(trainable, config.train.optimizer_states)
    return weight_bytes * (1 + num_checkpoints) + state_bytes * num_checkpoints


def nearest_existing(path: Path) -> Path:
    return next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
