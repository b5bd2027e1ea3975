"""A run -> a folder that other tools load: a whole Hugging Face model, or a PEFT adapter as it is.

Written to a temporary name and renamed, so an export that fails leaves nothing behind.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from partwise.errors import CheckpointError
from partwise.export.adapter import find_base, merge_adapter
from partwise.lineage.manifest import read_manifest
from partwise.lineage.publish import write_manifest
from partwise.model.folder import is_adapter
from partwise.model.load import load_model_config


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


def export_run(run: Path, out: Path, merge: bool = False, trust_remote_code: bool = False) -> Path:
    """`out`, holding the run's final model; with `merge`, adapters are merged into the base in fp32.

    `trust_remote_code` runs the base's own model code, which merging needs where the base has some.

    Raises:
        CheckpointError: `out` exists, the run has no final model, or there is nothing to merge.
    """
    if out.exists():
        raise CheckpointError(f"{out} exists already and is left as it is. Choose another --out.")
    source = final_folder(run)
    if merge and not is_adapter(source):
        raise CheckpointError(
            f"{source} was trained full and has no adapter to merge: it is a whole model already. "
            "Leave --merge out to copy it."
        )
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        if merge:
            write_merged(source, partial, trust_remote_code)
        else:
            shutil.copytree(source, partial)
        partial.rename(out)
    except OSError as error:
        raise CheckpointError(f"cannot write {out}: {error}. Free space or choose another --out.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def write_merged(source: Path, out: Path, trust_remote_code: bool = False) -> None:
    """The merged model in the base's dtype, with processor, generation config and lineage."""
    base = find_base(source, trust_remote_code).path
    merged = merge_adapter(source, trust_remote_code)
    dtype = load_model_config(base, trust_remote_code).dtype or torch.float32
    merged.model.to(dtype)
    merged.model.save_pretrained(out)
    merged.processor.save_pretrained(out)
    parent = read_manifest(source) or {}
    write_manifest(out, {**parent, "kind": "merged", "merged_from": str(source.resolve())})
