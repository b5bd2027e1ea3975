"""Runs -> a folder that other tools load: a whole Hugging Face model, a PEFT adapter, or GGUF files.

Written to a temporary name, compared with what was trained in a fresh process, and renamed: an export that
fails leaves nothing behind.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from transformers import PreTrainedModel

from partwise.engine.device import pick_device
from partwise.errors import CheckpointError
from partwise.export.adapter import base_path, trained_arguments, trained_quantization
from partwise.export.gguf import find_converter, replace_by_gguf
from partwise.export.question import question_probe
from partwise.export.whole import Written, trained_model, write_merged, write_whole
from partwise.lineage.manifest import read_manifest
from partwise.lineage.origin import require_whole
from partwise.lineage.publish import write_manifest
from partwise.lineage.verify import start_verification
from partwise.model.folder import is_adapter
from partwise.model.load import load_processor

# What rounding the weights may do to logits, as a fraction of their norm; merge.py tells what it took.
ROUNDED_LIMIT = 1e-1
NOT_FOR_OTHERS = ("training_state",)


@dataclass(frozen=True)
class ExportOptions:
    """`dtype` None is the base's own, `weights` one share for each run, `verify` the fresh process."""

    to: Literal["hf", "adapter", "gguf"] = "hf"
    weights: tuple[float, ...] = ()
    dtype: Literal["bfloat16", "float32"] | None = None
    max_shard_size: str | None = None
    verify: bool = True
    trust_remote_code: bool = False
    accept_base: bool = False
    converter: Path | None = None


def final_folder(run: Path) -> Path:
    """The folder that holds what a run trained: RUN/final, or the folder itself when it is a model.

    Raises:
        CheckpointError: nothing was trained there yet.
    """
    for folder in (run / "final", run):
        if (folder / "config.json").is_file() or is_adapter(folder):
            return folder
    if not run.is_dir():
        state = "is a file, not a folder" if run.exists() else "does not exist"
        raise CheckpointError(
            f"{run} {state}. Give the output folder of a run, or a model or adapter folder."
        )
    raise CheckpointError(
        f"{run} has no final/ yet, and is no model itself. Give the output folder of a finished run, or "
        "finish it with `partwise train CONFIG --resume`."
    )


def export_runs(
    runs: Sequence[Path],
    out: Path,
    options: ExportOptions = ExportOptions(),
    console: Console | None = None,
) -> Path:
    """`out`, holding what the runs trained: of one run, or of several adapters merged by their weights.

    Raises:
        CheckpointError: `out` exists, a run has no final model, the options do not fit what was trained, or
            what was written is not what was trained.
    """
    console = console or Console(quiet=True)
    if out.exists():
        raise CheckpointError(f"{out} exists already and is left as it is. Choose another --out.")
    sources = [final_folder(run) for run in runs]
    check_options(sources, options)
    for source in sources:
        require_whole(source)
    converter = find_converter(options.converter) if options.to == "gguf" else []
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        written = write_export(sources, partial, options)
        if written.rounding:
            console.print(written.rounding_text())
        if options.verify:
            console.print(verify_export(sources, partial, out, options, written))
        if converter:
            console.print(replace_by_gguf(partial, converter, tokenizer_model_of(sources[0])))
        partial.rename(out)
    except OSError as error:
        raise CheckpointError(f"cannot write {out}: {error}. Free space or choose another --out.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def tokenizer_model_of(source: Path) -> Path | None:
    """The base's SentencePiece file: transformers reads it and saves tokenizer.json in its place."""
    if is_adapter(source):
        base = base_path(source)
    else:
        base = (read_manifest(source) or {}).get("base", {}).get("path", "")
    file = Path(base) / "tokenizer.model" if base else source / "tokenizer.model"
    return file if file.is_file() else None


def parse_weights(text: str | None) -> tuple[float, ...]:
    """ "0.7,0.3" -> (0.7, 0.3). Raises: CheckpointError for anything else."""
    try:
        weights = tuple(float(word) for word in text.split(",")) if text else ()
    except ValueError:
        weights = (math.nan,)
    if not all(math.isfinite(weight) for weight in weights):
        raise CheckpointError(f"--weights {text} is not a list of numbers. Write it as --weights 0.7,0.3.")
    return weights


def check_options(sources: Sequence[Path], options: ExportOptions) -> None:
    """Raises: CheckpointError where the options do not fit the folders."""
    if options.max_shard_size and not re.fullmatch(r"\d+(\.\d+)?[KMGT]B", options.max_shard_size):
        raise CheckpointError(
            f"--max-shard-size {options.max_shard_size} is no size. Write it as 5GB or 500MB."
        )
    full = [source for source in sources if not is_adapter(source)]
    if full and options.to == "adapter":
        raise CheckpointError(
            f"{full[0]} was trained full and has no adapter: it is a whole model. Add --to hf."
        )
    if full and (options.weights or len(sources) > 1):
        raise CheckpointError(
            f"{full[0]} was trained full; only adapters can be merged by weights. Export it alone, without "
            "--weights."
        )
    if len(sources) > 1 and options.to == "adapter":
        raise CheckpointError(
            f"{len(sources)} adapters make no single one: --to adapter takes one run. Merge "
            "them with --to hf."
        )
    if (len(sources) > 1 or options.weights) and len(options.weights) != len(sources):
        raise CheckpointError(
            f"--weights has {len(options.weights)} numbers for {len(sources)} runs. Give one for each run, "
            "such as --weights 0.7,0.3."
        )


def write_export(sources: Sequence[Path], out: Path, options: ExportOptions) -> Written:
    settings = (options.dtype, options.max_shard_size or "5GB", options.trust_remote_code)
    if options.to != "adapter" and is_adapter(sources[0]):
        share = options.weights or (1.0,)
        return write_merged(sources, share, out, *settings, options.accept_base, options.verify)
    if options.to != "adapter" and (options.dtype or options.max_shard_size):
        return write_whole(sources[0], out, *settings)
    shutil.copytree(sources[0], out, ignore=shutil.ignore_patterns(*NOT_FOR_OTHERS))
    if manifest := read_manifest(out):
        write_manifest(out, manifest)  # its checksums are of the files that are there now
    return Written()


def requantises(model: PreTrainedModel, adapter: Path) -> bool:
    """Whether the base was rounded before it was quantised: some codes are then others in fp32."""
    manifest = read_manifest(adapter) or {}
    stored = str(model.config.dtype or torch.float32).removeprefix("torch.")
    return bool(trained_quantization(manifest)) and manifest["dtype"] != stored


def verify_export(
    sources: Sequence[Path], folder: Path, out: Path, options: ExportOptions, written: Written
) -> str:
    """What a fresh process says of the folder, to be `out`, against what was trained; both in fp32.

    Several adapters, or one with a weight of its own, are no folder's: there the merged model as it was in
    memory is the measure.

    Raises:
        CheckpointError: the folder is not what was trained.
    """
    reference = None if written.logits else sources[0]
    trained = trained_model(sources[0], options.trust_remote_code)
    probe = question_probe(
        load_processor(sources[0], options.trust_remote_code),
        trained.num_parameters(),
        str(pick_device()),
        options.trust_remote_code,
    )
    quantization = trained_arguments(trained, sources[0])
    is_rounded = written.dtype not in (None, torch.float32) or requantises(trained, sources[0])
    limit = ROUNDED_LIMIT if reference is not None and is_rounded else None
    finding = start_verification(
        folder,
        replace(probe, logits=written.logits),
        reference,
        limit,
        name=out,
        quantization={str(path): quantization for path in (sources[0], folder) if is_adapter(path)},
    ).finish()
    moved = finding.values.get("moved")
    return finding.message + (f"; the adapter moves them by {moved:.1g}" if moved is not None else "")
