"""Checkpoints: a folder that other tools load, and beside it what training needs to go on.

Out: RUN/checkpoints/step-000100/ and RUN/final/. Each is written under a temporary name, flushed to disk and
renamed, and its manifest partwise.json is the last file written: a folder with a manifest is whole.
A full run saves the Hugging Face model, a run with LoRA the PEFT adapter with the parts trained full.
Nothing is pickled. What trains and how adapters are laid out is model/parts.py's business.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from partwise.config import ModelConfig
from partwise.engine.single import Engine, Stretch
from partwise.errors import CheckpointError
from partwise.lineage.checksums import verify_files
from partwise.lineage.manifest import MANIFEST, read_manifest
from partwise.lineage.publish import publish
from partwise.model.parts import adapter_config, adapter_tensors
from partwise.model.tower import lacks_tower
from partwise.model.weights import read_model
from partwise.records import PartsPlan
from partwise.training.optim import Optimizer
from partwise.training.shards import Shards
from partwise.training.state import SavedState, state_file, state_files, write_state

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from partwise.model.load import LoadedModel


LOSS = "loss"  # what best_by calls the evaluation loss


class TrainingState(NamedTuple):
    """The tensors of a checkpoint, as their files name them: of the model or adapter, and of the optimizer.

    Tied weights, and fp32 weights that are their own masters, are in it more than once. With several ranks,
    `optimizer` are one rank's shards and `stretches` say which; the model's are on rank 0 alone.
    """

    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    stretches: dict[str, Stretch]


def training_state(loaded: LoadedModel, plan: PartsPlan, optimizer: Optimizer) -> TrainingState:
    """The state as it is now. All ranks must call it. Only what was gathered from shards is a copy."""
    model = model_state(loaded, plan, optimizer.engine)
    return TrainingState(model, optimizer.state_dict(), optimizer.stretches())


def model_state(loaded: LoadedModel, plan: PartsPlan, engine: Engine | None = None) -> dict[str, Tensor]:
    """The tensors of the model's or adapter's file; where weights are sharded, gathered on rank 0's host."""
    engine, state = engine or Engine(), {}
    for name, tensor in saved_tensors(loaded.model, plan, engine).items():
        whole = engine.whole(tensor)
        if engine.ranks.is_first:
            state[name] = whole
    return state


def saved_tensors(model: PreTrainedModel, plan: PartsPlan, engine: Engine) -> dict[str, Tensor]:
    """The model's own tensors by their names in the file; those that train where the base has the rest."""
    if plan.has_adapters:
        return adapter_tensors(model, plan)
    if plan.is_quantized or engine.shards_weights or lacks_tower(model):
        return {name: model.get_parameter(name) for name in plan.trainable}
    return model.state_dict(keep_vars=True)


def save_checkpoint(
    run_folder: Path,
    loaded: LoadedModel,
    plan: PartsPlan,
    state: TrainingState,
    manifest: dict[str, Any],
    shards: Shards | None = None,
) -> Path:
    """RUN/checkpoints/step-NNNNNN, whole and on disk; the step is the manifest's.

    With `shards`, the folder was opened before and the other ranks write theirs into it.

    Raises:
        TrainingError: the disk refuses, here or for another rank; older checkpoints are as they were.
    """

    def write(folder: Path) -> None:
        write_model(folder, loaded, plan, state.model)
        if shards:
            shards.write(folder, state.optimizer, state.stretches)
            shards.wait_for_others(folder)
        else:
            (folder / state_file()).parent.mkdir()
            write_state(folder / state_file(), state.optimizer, state.stretches)

    path = checkpoint_folder(run_folder, manifest["step"])
    return publish(path, write, manifest, is_open=shards is not None)


def save_final(
    run_folder: Path,
    loaded: LoadedModel,
    plan: PartsPlan,
    manifest: dict[str, Any],
    state: dict[str, Tensor] | None = None,
) -> Path:
    """RUN/final, the same without training state; one that is there already is replaced at once.

    Raises:
        TrainingError: the disk refuses; the old one is as it was.
    """
    return publish(run_folder / "final", lambda folder: write_model(folder, loaded, plan, state), manifest)


def load_checkpoint(
    folder: Path, optimizer: Optimizer, manifest: dict[str, Any], is_new_stage: bool = False
) -> int:
    """The number of steps done; everything that was trained is taken over bit for bit.

    The model is the base with the plan applied. `manifest` is the one that this run would write.

    Raises:
        CheckpointError: the checkpoint is damaged, or is of another base, other data or another plan.
    """
    try:
        saved = read_manifest(folder)
    except CheckpointError as error:
        raise CheckpointError(f"{error} {way_out(folder)}") from error
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
    if faults := state_faults(folder):
        raise CheckpointError(f"{folder} is damaged: {'; '.join(faults)}. {way_out(folder)}")
    try:
        optimizer.load(SavedState([folder / file for file in state_files(folder)]), is_new_stage)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    return int(saved["step"])


def state_faults(folder: Path) -> list[str]:
    """What is wrong with the files that resuming reads; empty where nothing is."""
    files = state_files(folder)
    try:
        faults = verify_files(folder, read_manifest(folder) or {}, files)
    except CheckpointError as error:
        return [str(error)]
    for file in [] if faults else files:
        try:
            with safe_open(folder / file, "pt"):
                pass  # the header is sound, also where the manifest lists no checksums
        except (OSError, SafetensorError) as error:
            faults.append(f"{file} cannot be read: {error}")
    return faults


def way_out(damaged: Path) -> str:
    """Which other checkpoint is sound, and the command that goes on from there."""
    run_folder, whole = damaged.parent.parent, whole_checkpoints(damaged.parent.parent)
    sound = next((p for p in reversed(whole) if p != damaged and not state_faults(p)), None)
    if sound is None:
        return "No other checkpoint of the run is intact; start again with another output."
    unfit = " ".join(str(path) for path in whole if step_of(path) > step_of(sound))
    return f"{sound} is intact. To go on from there: rm -r {unfit} && {resume_command(run_folder)}"


def resume_command(run_folder: Path) -> str:
    return f"partwise train {run_folder / 'config.yaml'} --resume"


def newest_checkpoint(run_folder: Path) -> Path | None:
    """The newest whole checkpoint of the run; None when there is none. Torn ones are passed over."""
    return next(reversed(whole_checkpoints(run_folder)), None)


def rotate_checkpoints(
    run_folder: Path,
    keep_last: int,
    keep_best: int = 0,
    spared: Path | None = None,
    best_by: str = LOSS,
) -> None:
    """Delete all but the newest `keep_last` whole checkpoints and the `keep_best` best ones, and what torn
    writes left behind. `spared` stays this time.
    """
    whole = whole_checkpoints(run_folder)
    costs = {folder: cost for folder in whole if (cost := cost_of(folder, best_by)) is not None}
    best = sorted(costs, key=lambda folder: costs[folder])[:keep_best]
    for folder in [*torn_checkpoints(run_folder), *(set(whole) - {*whole[-keep_last:], *best, spared})]:
        shutil.rmtree(folder, ignore_errors=True)


def cost_of(folder: Path, best_by: str) -> float | None:
    """What the manifest of a whole checkpoint says of it, lower is better; None where it says nothing."""
    try:
        return cost_in(read_manifest(folder) or {}, best_by)
    except CheckpointError:
        return None


def cost_in(record: Mapping[str, Any], best_by: str) -> float | None:
    """Of a manifest or a line of metrics.jsonl: the loss, or a metric's score, of which higher is better."""
    if best_by == LOSS:
        return record.get("eval_loss")
    score = record.get("eval_scores", {}).get(best_by)
    return None if score is None else -score


def whole_checkpoints(run_folder: Path) -> list[Path]:
    """Oldest first."""
    folders = (run_folder / "checkpoints").glob("step-*")
    return sorted((path for path in folders if is_whole(path)), key=step_of)


def torn_checkpoints(run_folder: Path) -> list[Path]:
    """What a kill in the middle of writing left: hidden folders, and such that have no manifest."""
    folders = (run_folder / "checkpoints").iterdir() if (run_folder / "checkpoints").is_dir() else ()
    return sorted(p for p in folders if step_of(p) >= 0 and not is_whole(p))


def is_whole(folder: Path) -> bool:
    return not folder.name.startswith(".") and step_of(folder) >= 0 and (folder / MANIFEST).is_file()


def checkpoint_folder(run_folder: Path, step: int) -> Path:
    return run_folder / "checkpoints" / f"step-{step:06d}"


def step_of(folder: Path) -> int:
    """The step in the name of a checkpoint, or of what is left of one; -1 for any other name."""
    match = re.fullmatch(r"step-(\d+)|\.step-(\d+)\.(partial|old)", folder.name)
    return int(match[1] or match[2]) if match else -1


def write_model(
    folder: Path, loaded: LoadedModel, plan: PartsPlan, state: dict[str, Tensor] | None = None
) -> None:
    """What other tools load: the model or adapter, the processor or tokenizer, the chat template.

    `state` are the tensors to write where the model's own are shards or go on changing, as `model_state`
    names them.
    """
    state = model_state(loaded, plan) if state is None else state
    if plan.has_adapters:
        save_file(
            {name: tensor.contiguous() for name, tensor in state.items()},
            folder / "adapter_model.safetensors",
            metadata={"format": "pt"},
        )
        adapter_config(plan, loaded.name).save_pretrained(folder)
    elif lacks_tower(loaded.model) or state.keys() != state_names(loaded.model):
        with_base_weights(loaded, state).save_pretrained(folder)
    else:
        loaded.model.save_pretrained(folder, state_dict=dict(state))
    loaded.processor.save_pretrained(folder)


def state_names(model: nn.Module) -> set[str]:
    """The keys of the model's state_dict, which a thread beside the training must not ask for: with FSDP2
    that cuts the weights back into shards, under the layers that run.
    """
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for path, module in model.named_modules(remove_duplicate=False):
        saved = module._buffers.keys() - module._non_persistent_buffers_set
        names |= {f"{path}.{name}" if path else name for name in saved if module._buffers[name] is not None}
    return names


def with_base_weights(loaded: LoadedModel, trained: dict[str, Tensor]) -> PreTrainedModel:
    """The trained tensors in the base as its folder holds it: frozen parts are saved as they were given."""
    model = loaded.model
    settings = ModelConfig(path=loaded.path, dtype=str(loaded.dtype).removeprefix("torch."))  # type: ignore[arg-type]
    whole = read_model(type(model), Path(loaded.path), model.config, settings)
    with torch.no_grad():
        for name, tensor in trained.items():
            whole.get_parameter(name).copy_(tensor)
    whole.generation_config = model.generation_config
    return whole
