"""The reference of a preference run: what the model said of each answer before it was trained.

In: a job, and its model as it was opened. Out: a Preference, and loaders whose examples bring their reference
along where it is computed before the first step. Such numbers lie in one small file per data source, under a
key of all that they depend on; they are read again where that is the same, else made by all ranks together.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from rich.console import Console

from partwise.data.loader import StepLoader
from partwise.data.sources import Rows
from partwise.data.template import chat_template
from partwise.engine.single import Engine
from partwise.errors import CheckpointError, ConfigError, TrainingError
from partwise.lineage.fingerprint import fingerprint_files
from partwise.model.folder import adapter_file
from partwise.model.parts import frozen_copy
from partwise.tables import format_seconds
from partwise.training.preference import Preference, Source, answer_log_probs
from partwise.training.share import Shares
from partwise.training.step import eval_mode

if TYPE_CHECKING:
    from partwise.model.load import LoadedModel
    from partwise.training.job import Job

COPYING_ENGINES = ("single", "ddp")
LINE_SECONDS = 10.0


def reference_source(job: Job, engine_name: str) -> Source:
    """Where the reference's log-probabilities come from; "none" where the loss has no reference.

    Raises:
        ConfigError: the config names a source that would not be the model as it was.
    """
    objective = job.config.objective
    if not objective.has_reference:
        return "none"
    obstacle = adapter_obstacle(job)
    source: Source = objective.reference if objective.reference != "auto" else "adapter_off"
    if objective.reference == "auto" and obstacle:
        source = "precomputed"
    where = job.config.where("objective.reference")
    if objective.reference == "adapter_off" and obstacle:
        raise ConfigError(
            f"{where}: objective.reference: adapter_off: {obstacle}, so that the model without its adapters "
            "is not the model as it was. Write reference: precomputed, or remove this."
        )
    if objective.reference == "copy" and engine_name not in COPYING_ENGINES:
        raise ConfigError(
            f"{where}: objective.reference: copy beside engine {engine_name}: a copy would lie whole on each "
            "rank. Write reference: precomputed, which takes no memory."
        )
    if source == "copy" and job.span.name:
        raise ConfigError(
            f"{where}: objective.reference: copy beside stages: a copy would be of the model as each stage "
            "finds it. Write reference: precomputed."
        )
    if source == "precomputed" and job.has_own_rows:
        raise ConfigError(
            f'{where}: the reference is computed once, before the first step, but stage "{job.name}" has '
            "rows or limits of its own. Remove its data, or train adapters alone, which can be switched off."
        )
    return source


def adapter_obstacle(job: Job) -> str:
    """Why switching off adapters would not give the model as it was; "" where it does."""
    if job.base_adapter is not None:
        return f"training goes on with the adapter {job.base_adapter}"
    full = [part.part for part in job.whole_plan.parts if part.mode == "full"]
    return f"{' and '.join(full)} {'trains' if len(full) == 1 else 'train'} in full" if full else ""


def open_preference(job: Job, engine: Engine, loaded: LoadedModel, console: Console) -> Preference | None:
    """The run's preference loss; None for other objectives. All ranks must call it, before training or a
    checkpoint changes a weight: the model is its own reference now.

    Raises:
        ConfigError: as `reference_source`.
        CheckpointError: the run has begun, and the numbers of its beginning are gone.
        DataError: a row cannot be used.
        TrainingError: the disk refuses.
    """
    objective = job.config.objective
    if not objective.is_preference:
        return None
    source = reference_source(job, engine.name)
    if source == "precomputed":
        fill_references(job, engine, loaded, console)
    return Preference(objective, source, frozen_copy(loaded.model) if source == "copy" else None)


def fill_references(job: Job, engine: Engine, loaded: LoadedModel, console: Console) -> None:
    """Read or compute the log-probability of every answer, and let the job's loaders hand them out."""
    for name, files, loader, rows in sources(job):
        path = references_file(job, files) if engine.ranks.is_first else None
        found = engine.ranks.from_first(read_references(path) if path else None)
        if found is None and not job.is_as_begun:
            raise CheckpointError(
                f"the reference of {name} is gone, and the model is no longer as the run began. Put "
                f"{path or 'it'} back, or begin the run anew."
            )
        if found is None:
            start = time.monotonic()
            found = compute_references(job, engine, loaded, rows, console)
            if path:
                write_references(path, found)
                seconds = format_seconds(time.monotonic() - start)
                console.print(f"reference of {loader.num_rows:,} rows of {name} in {seconds}, kept in {path}")
        loader.references, loader.other_references = found


def sources(job: Job) -> Iterator[tuple[str, list[str], StepLoader, Rows]]:
    yield "data.train", job.config.data.train_files, job.loader, job.rows
    if job.eval_loader is not None and job.eval_rows is not None:
        yield "data.eval", job.config.data.eval_files, job.eval_loader, job.eval_rows


@torch.no_grad()
def compute_references(
    job: Job, engine: Engine, loaded: LoadedModel, rows: Rows, console: Console
) -> tuple[np.ndarray, np.ndarray]:
    """The log-probabilities of the rows, and of others that are looked at; NaN for what is dropped."""
    device = engine.device or loaded.model.device
    in_order = job.make_loader(rows, shuffle=False)
    # An example's own place stands where its reference will: it says whose log-probability was computed.
    in_order.references = in_order.other_references = range(len(rows))
    made: tuple[dict[int, float], dict[int, float]] = ({}, {})
    told = time.monotonic()
    with eval_mode(loaded.model):
        for step_data in Shares(in_order, engine).iterate(0, in_order.steps_per_epoch):
            for batches, values in zip((step_data.batches, step_data.others), made, strict=True):
                for batch in batches:
                    log_probs = answer_log_probs(loaded.model, batch, device, engine).tolist()
                    values.update(
                        (int(place), log_prob)
                        for place, log_prob in zip(batch.references, log_probs, strict=True)
                        if place is not None
                    )
            if time.monotonic() - told > LINE_SECONDS:
                told = time.monotonic()
                done = (step_data.step + 1) * in_order.global_batch_size
                console.print(f"reference of row {done:,}/{in_order.num_rows:,}")
    both = [join(engine.ranks.gather(values), len(rows)) for values in made]
    return both[0], both[1] if in_order.others is not None else np.empty(0)


def join(parts: list[dict[int, float]], number: int) -> np.ndarray:
    values = np.full(number, np.nan)
    for part in parts:
        values[list(part)] = list(part.values())
    return values


def references_file(job: Job, files: list[str]) -> Path:
    """Where the log-probabilities of the rows of these files lie, by all that they depend on."""
    config = job.config
    made_by = {
        "base": job.base_record["fingerprint"],
        "adapter": fingerprint_files([adapter_file(job.base_adapter)]) if job.base_adapter else None,
        "quantization": [str(part.quantization) for part in job.whole_plan.parts],
        "dtype": config.model.dtype,
        "attention": config.model.attention,
        "rows": fingerprint_files(map(Path, files)),
        "shape": config.objective.shape,
        "max_seq_len": config.data.max_seq_len,
        "overlong": config.data.overlong,
        "chat_template": chat_template(job.processor),
        "transformers": version("transformers"),
    }
    key = hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()[:16]
    root = config.objective.reference_cache
    folder = Path(root).expanduser() if root else Path(config.output) / "references"
    return folder / f"{key}.npz"


def read_references(path: Path) -> tuple[np.ndarray, np.ndarray] | None:
    """None where there are none yet. Raises: TrainingError where the file is broken."""
    if not path.is_file():
        return None
    try:
        with np.load(path) as file:
            return file["rows"], file["others"]
    except (OSError, ValueError, KeyError) as error:
        raise TrainingError(f"{path} cannot be read: {error}. Remove it: it is made again.") from error


def write_references(path: Path, values: tuple[np.ndarray, np.ndarray]) -> None:
    partial = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(partial, rows=values[0], others=values[1])
        partial.replace(path)
    except OSError as error:
        raise TrainingError(
            f"{path} cannot be written: {error}. Free space, or choose another objective.reference_cache."
        ) from error
