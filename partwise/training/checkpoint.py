"""Checkpoints: a folder that other tools load, and beside it what training needs to go on.

Out: RUN/checkpoints/step-000100/ and RUN/final/. Each is written under a temporary name, flushed to disk and
renamed, and its manifest partwise.json is the last file written: a folder with a manifest is whole.
A full run saves the Hugging Face model, a run with LoRA the PEFT adapter with the parts trained full.
Nothing is pickled. What trains and how adapters are laid out is model/parts.py's business.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from partwise.config import ModelConfig
from partwise.errors import CheckpointError
from partwise.lineage.manifest import MANIFEST, read_manifest
from partwise.lineage.publish import publish
from partwise.model.parts import adapter_config, adapter_state
from partwise.model.weights import read_model
from partwise.records import PartsPlan
from partwise.training.optim import Optimizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from partwise.model.load import LoadedModel

OPTIMIZER_FILE = "training_state/optimizer.safetensors"


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
    if plan.has_adapters:
        save_file(
            {name: tensor.contiguous() for name, tensor in adapter_state(loaded.model, plan).items()},
            folder / "adapter_model.safetensors",
            metadata={"format": "pt"},
        )
        adapter_config(plan, loaded.name).save_pretrained(folder)
    elif plan.is_quantized:
        with_base_weights(loaded, plan).save_pretrained(folder)
    else:
        loaded.model.save_pretrained(folder)
    loaded.processor.save_pretrained(folder)


def with_base_weights(loaded: LoadedModel, plan: PartsPlan) -> PreTrainedModel:
    """The trained tensors in the base as its folder holds it: frozen parts are saved as they were given."""
    model = loaded.model
    settings = ModelConfig(path=loaded.path, dtype=str(model.dtype).removeprefix("torch."))  # type: ignore[arg-type]
    whole = read_model(type(model), Path(loaded.path), model.config, settings)
    with torch.no_grad():
        for name in plan.trainable:
            whole.get_parameter(name).copy_(model.get_parameter(name))
    return whole
