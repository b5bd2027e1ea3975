"""An adapter folder -> its base model with the adapter on it.

In: a PEFT adapter folder, Partwise's or anyone's. Out: a LoadedModel. A Partwise folder knows the
fingerprint of its base; another base is an error, because it would load and answer wrongly. It also knows
which parts of the base were quantised, and the adapter meets the weights that it was trained on.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.utils import load_peft_weights
from transformers import PreTrainedModel

from partwise.config import ModelConfig
from partwise.data.template import end_of_turn
from partwise.errors import CheckpointError
from partwise.lineage.manifest import read_manifest
from partwise.lineage.origin import match_base, model_record
from partwise.model.find import find_parts
from partwise.model.find import shorten as shorten_names
from partwise.model.folder import as_checkpoint_error, find_model_folder, model_name, read_json
from partwise.model.load import LoadedModel, empty_model, load_model, load_processor
from partwise.model.plan import block_linears
from partwise.model.quantize import plain_arguments, quantize_linears
from partwise.model.stops import stop_at
from partwise.records import Quantization


@dataclass(frozen=True)
class Base:
    """The base model of an adapter: what the adapter calls it, its record, and what was accepted of it."""

    path: str
    record: dict[str, Any]
    accepted: dict[str, Any] | None


def open_adapter(
    folder: Path,
    dtype: str = "bfloat16",
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
    accept_base: bool = False,
) -> LoadedModel:
    """The base model with the adapter on it, in eval mode.

    Raises:
        CheckpointError: the base is missing, is another one, or the adapter's weights are incomplete.
        ConfigError: the base was quantised, and bitsandbytes is not installed.
    """
    loaded = open_base(folder, dtype, trust_remote_code, accept_base)
    quantize_again(loaded.model, folder, getattr(torch, dtype), device)
    loaded.model.to(device, getattr(torch, dtype))
    return add_adapter(loaded, folder, trust_remote_code)


def open_base(folder: Path, dtype: str, trust_remote_code: bool, accept_base: bool = False) -> LoadedModel:
    """The base that an adapter folder names, on the CPU; a base to quantise in the type it was trained in."""
    manifest = read_manifest(folder) or {}
    if trained_quantization(manifest):
        dtype = manifest["dtype"]
    base = find_base(folder, trust_remote_code, accept_base).path
    settings = ModelConfig(path=base, dtype=dtype, trust_remote_code=trust_remote_code)  # type: ignore[arg-type]
    return load_model(settings)


def trained_quantization(manifest: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Part -> how its layers were quantised; empty where none was."""
    plan = manifest.get("plan", {})
    return {name: part["quantization"] for name, part in plan.items() if part.get("quantization")}


def trained_arguments(model: PreTrainedModel, folder: Path) -> dict[str, Any] | None:
    """How plain transformers quantises the base as training did; None where it was not quantised."""
    trained = trained_quantization(read_manifest(folder) or {})
    names = [name for part in trained for name in block_linears(model, find_parts(model)[part])]
    is_double = any(settings["is_double"] for settings in trained.values())
    return plain_arguments(model, names, is_double) if names else None


def quantize_again(
    model: PreTrainedModel, folder: Path, compute_dtype: torch.dtype, device: str | torch.device
) -> None:
    """Puts the layers of the base into 4 bits that were so while the adapter was trained."""
    for part, quantization in trained_quantization(read_manifest(folder) or {}).items():
        modules = block_linears(model, find_parts(model)[part])
        quantize_linears(model, Quantization(modules=modules, **quantization), device, compute_dtype)


def add_adapter(loaded: LoadedModel, folder: Path, trust_remote_code: bool) -> LoadedModel:
    processor = load_processor(str(folder), trust_remote_code)
    stop_at(loaded.model, end_of_turn(processor))
    model = put_on(loaded.model, folder)
    return replace(loaded, model=model, processor=processor, path=str(folder))


def put_on(model: PreTrainedModel, folder: Path) -> PeftModel:
    """The model with the adapter on it, in eval mode; adapters compute in fp32.

    Raises:
        CheckpointError: the adapter's file is incomplete, or has tensors without a place in the model.
    """
    with warnings.catch_warnings():
        # PEFT 0.21 asks for a property that transformers 5.23 warns of. Remove it when PEFT asks for
        # is_activation_checkpointing. Of missing keys it warns only: they are an error below.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
        warnings.filterwarnings("ignore", message="Found missing adapter keys")
        with as_checkpoint_error(folder, "PEFT cannot load its adapter", "Copy the whole folder again."):
            wrapped = PeftModel.from_pretrained(model, str(folder), is_trainable=False).eval()
    stored = set(load_peft_weights(str(folder), device="cpu"))
    wanted = set(get_peft_model_state_dict(wrapped))
    if stored != wanted:
        raise CheckpointError(
            f"{folder}: the adapter file does not fit adapter_config.json and the base: "
            f"{len(wanted - stored)} tensors are missing ({shorten_names(sorted(wanted - stored))}), "
            f"{len(stored - wanted)} have no place ({shorten_names(sorted(stored - wanted))}). Copy the "
            "whole adapter folder again."
        )
    return wrapped


def find_base(folder: Path, trust_remote_code: bool = False, accept_base: bool = False) -> Base:
    """The base model that an adapter folder names, compared with the weights it was trained on.

    Raises:
        CheckpointError: no base is named, it cannot be found, or it is another one now and not accepted.
    """
    path = base_path(folder)
    model = empty_model(path, trust_remote_code)
    record = model_record(find_model_folder(path, with_weights=True), model_name(path), model)
    return Base(path, record, match_base(folder, record, accept_base))


def base_path(folder: Path) -> str:
    """What an adapter folder calls its base; there is such a model, though its weights were not looked at.

    Raises:
        CheckpointError: no base is named, or it cannot be found.
    """
    file = folder / "adapter_config.json"
    path = str(read_json(file).get("base_model_name_or_path") or "")
    if not path:
        raise CheckpointError(
            f"{file}: base_model_name_or_path is empty, so the base is unknown. "
            "Write the base model's folder there."
        )
    try:
        find_model_folder(path, with_weights=True)
    except CheckpointError as error:
        raise CheckpointError(
            f"{file}: the base model {path} that it names is neither a folder here nor a hub model that can "
            "be fetched. Put the base model there, or write where it is now as base_model_name_or_path."
        ) from error
    return path
