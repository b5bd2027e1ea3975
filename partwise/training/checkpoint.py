"""Checkpoints: a folder that other tools load, and beside it what training needs to go on.

Out: RUN/checkpoints/step-000100/ and RUN/final/. Each is written under a temporary name, flushed to disk and
renamed, and its manifest partwise.json is the last file written: a folder with a manifest is whole.
A full run saves the Hugging Face model, a run with LoRA the PEFT adapter with the parts trained full.
Nothing is pickled. What trains and how adapters are laid out is model/parts.py's business.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from partwise.errors import CheckpointError, TrainingError
from partwise.model.parts import adapter_config, adapter_state
from partwise.records import PartPlan, PartsPlan
from partwise.training.optim import Optimizer

if TYPE_CHECKING:
    from partwise.model.load import LoadedModel

MANIFEST = "partwise.json"
OPTIMIZER_FILE = "training_state/optimizer.safetensors"
FORMAT = 1


def save_checkpoint(
    run_folder: Path, loaded: LoadedModel, plan: PartsPlan, optimizer: Optimizer, manifest: dict[str, Any]
) -> Path:
    """RUN/checkpoints/step-NNNNNN, whole and on disk; the step is the manifest's.

    Raises:
        TrainingError: the disk refuses; older checkpoints are as they were.
    """

    def write(folder: Path) -> None:
        write_model(folder, loaded, plan)
        (folder / OPTIMIZER_FILE).parent.mkdir()
        save_file(optimizer.state_dict(), folder / OPTIMIZER_FILE)

    return publish(checkpoint_folder(run_folder, manifest["step"]), write, manifest)


def save_final(run_folder: Path, loaded: LoadedModel, plan: PartsPlan, manifest: dict[str, Any]) -> Path:
    """RUN/final, the same without training state; one that is there already is replaced at once.

    Raises:
        TrainingError: the disk refuses; the old one is as it was.
    """
    return publish(run_folder / "final", lambda folder: write_model(folder, loaded, plan), manifest)


def load_checkpoint(folder: Path, optimizer: Optimizer, manifest: dict[str, Any]) -> int:
    """The number of steps done; everything that was trained is taken over bit for bit.

    The model is the base with the plan applied. `manifest` is the one that this run would write.

    Raises:
        CheckpointError: the checkpoint is broken, or is of another base, other data or another plan.
    """
    saved = read_manifest(folder)
    if saved is None:
        raise CheckpointError(
            f"{folder} has no {MANIFEST}: its writing was cut off. Use an older checkpoint."
        )
    for key, what in (("base", "base model"), ("data", "training data")):
        if saved[key]["fingerprint"] != manifest[key]["fingerprint"]:
            raise CheckpointError(
                f"{folder}: the {what} is not the one the run was started with (fingerprint "
                f"{saved[key]['fingerprint'][:12]}, now {manifest[key]['fingerprint'][:12]}). "
                "Put it back as it was, or start a new run with another output."
            )
    try:
        optimizer.load_state_dict(load_file(folder / OPTIMIZER_FILE))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder / OPTIMIZER_FILE} cannot be read: {error}. "
            "Delete that checkpoint to resume from the one before."
        ) from error
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    return int(saved["step"])


def newest_checkpoint(run_folder: Path) -> Path | None:
    """The newest whole checkpoint of the run; None when there is none. Torn ones are passed over."""
    return max(whole_checkpoints(run_folder), key=step_of, default=None)


def rotate_checkpoints(run_folder: Path, keep_last: int) -> None:
    """Delete all but the newest `keep_last` whole checkpoints, and what torn writes left behind."""
    whole = sorted(whole_checkpoints(run_folder), key=step_of)
    kept = set(whole[-keep_last:])
    for folder in (run_folder / "checkpoints").iterdir():
        if folder not in kept:
            shutil.rmtree(folder, ignore_errors=True)


def whole_checkpoints(run_folder: Path) -> list[Path]:
    folders = (run_folder / "checkpoints").glob("step-*")
    return [folder for folder in folders if step_of(folder) >= 0 and (folder / MANIFEST).is_file()]


def checkpoint_folder(run_folder: Path, step: int) -> Path:
    return run_folder / "checkpoints" / f"step-{step:06d}"


def step_of(folder: Path) -> int:
    """The step in a checkpoint's name; -1 for any other name."""
    number = folder.name.removeprefix("step-")
    return int(number) if number.isdigit() else -1


def write_model(folder: Path, loaded: LoadedModel, plan: PartsPlan) -> None:
    """What other tools load: the model or adapter, the processor or tokenizer, the chat template."""
    if is_adapter_run(plan):
        save_file(
            {name: tensor.contiguous() for name, tensor in adapter_state(loaded.model, plan).items()},
            folder / "adapter_model.safetensors",
            metadata={"format": "pt"},
        )
        adapter_config(plan, loaded.name).save_pretrained(folder)
    else:
        loaded.model.save_pretrained(folder)
    loaded.processor.save_pretrained(folder)


def is_adapter_run(plan: PartsPlan) -> bool:
    return any(part.mode == "lora" for part in plan.parts)


def publish(folder: Path, write: Callable[[Path], None], manifest: dict[str, Any]) -> Path:
    """`folder` as `write` fills it, with the manifest: either all of it appears, on disk, or nothing.

    Raises:
        TrainingError: the disk refuses. The temporary folder is gone and an older `folder` untouched.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write(partial)
        sync_tree(partial)
        write_manifest(partial, manifest)
        replace_folder(partial, folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise TrainingError(
            f"cannot write {folder}: {error}. Earlier checkpoints are untouched: "
            "free space or make the folder writable, then resume."
        ) from error
    return folder


def replace_folder(new: Path, folder: Path) -> None:
    """Rename `new` to `folder`; an older one steps aside first, because a rename never overwrites folders."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def sync_tree(folder: Path) -> None:
    """Flush every file and folder in it to disk."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    path = folder / MANIFEST
    path.write_text(json.dumps(manifest, indent=2) + "\n")
    sync(path)
    sync(folder)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a folder that Partwise wrote; None for other folders and torn ones.

    Raises:
        CheckpointError: the manifest is broken, or of a newer version.
    """
    path = Path(folder) / MANIFEST
    try:
        manifest = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read: {error}. The folder is damaged; use another one."
        ) from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else manifest
        raise CheckpointError(
            f"{path}: format {found!r} is not {FORMAT}. Use the Partwise version that wrote it."
        )
    return manifest


def make_manifest(loaded: LoadedModel, plan: PartsPlan, data_files: Iterable[str]) -> dict[str, Any]:
    """What a run's checkpoints come from: base and data with fingerprints, plan, versions."""
    files = [Path(file) for file in data_files]
    return {
        "format": FORMAT,
        "kind": "adapter" if is_adapter_run(plan) else "full",
        "base": {"path": loaded.name, "fingerprint": base_fingerprint(loaded.path)},
        "plan": {part.part: summarize_part(part) for part in plan.parts},
        "data": {"files": [str(file) for file in files], "fingerprint": fingerprint_files(files)},
        "versions": {name: version(name) for name in ("partwise", "torch", "transformers", "peft")},
    }


def stamp_manifest(manifest: dict[str, Any], step: int) -> dict[str, Any]:
    """The manifest of one checkpoint: the run's, with the steps done and the time (UTC)."""
    return {**manifest, "step": step, "created": datetime.now(UTC).isoformat(timespec="seconds")}


def summarize_part(part: PartPlan) -> dict[str, Any]:
    return {
        "mode": part.mode,
        "num_parameters": part.num_parameters,
        "num_trainable": part.num_trainable,
        "learning_rate": part.learning_rate,
        "weight_decay": part.weight_decay,
        "held": part.held,
    }


def base_fingerprint(folder: str | Path) -> str:
    """SHA-256 over a model folder's config and a sample of its weights; "" where there is no such folder.

    The sample has every file's name, size and head (tensor names, types and shapes) and small blocks all
    over it: enough to tell one fine-tune from another, and read in a moment.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return ""
    weights = sorted(path for pattern in ("*.safetensors", "*.bin") for path in folder.glob(pattern))
    return fingerprint_files([folder / "config.json", *weights])


def fingerprint_files(paths: Iterable[Path]) -> str:
    """SHA-256 over names, sizes and samples of the files."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{path.name}:{path.stat().st_size}\n".encode())
        for block in sample_blocks(path):
            digest.update(block)
    return digest.hexdigest()


def sample_blocks(
    path: Path, head: int = 1 << 20, num_blocks: int = 4096, block: int = 64
) -> Iterable[bytes]:
    """The first MiB of a file, and blocks of 64 bytes at even distances over the rest."""
    size = path.stat().st_size
    with path.open("rb") as file:
        yield file.read(head)
        stride = max(block, (size - head) // num_blocks)
        for offset in range(head, size, stride):
            file.seek(offset)
            yield file.read(block)
