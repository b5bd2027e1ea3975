"""An adapter folder -> its base model with the adapter on it, or merged into it.

In: a PEFT adapter folder, Partwise's or anyone's. Out: a LoadedModel. A Partwise folder knows the
fingerprint of its base; another base is an error, because it would load and answer wrongly. It also knows
which parts of the base were quantised, and the adapter meets the weights that it was trained on.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel

from partwise.config import ModelConfig
from partwise.errors import CheckpointError
from partwise.lineage.manifest import read_manifest
from partwise.lineage.origin import match_base, model_record
from partwise.model.find import find_parts
from partwise.model.folder import find_model_folder, model_name, read_json
from partwise.model.load import LoadedModel, empty_model, load_model, load_processor
from partwise.model.plan import block_linears
from partwise.model.quantize import dequantize_linears, quantize_linears
from partwise.records import Quantization

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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


def quantize_again(
    model: PreTrainedModel, folder: Path, compute_dtype: torch.dtype, device: str | torch.device
) -> None:
    """Puts the layers of the base into 4 bits that were so while the adapter was trained."""
    for part, quantization in trained_quantization(read_manifest(folder) or {}).items():
        modules = block_linears(model, find_parts(model)[part])
        quantize_linears(model, Quantization(modules=modules, **quantization), device, compute_dtype)


def add_adapter(loaded: LoadedModel, folder: Path, trust_remote_code: bool) -> LoadedModel:
    processor = load_processor(str(folder), trust_remote_code)
    with warnings.catch_warnings():
        # PEFT 0.21 asks for a property that transformers 5.23 warns of. Remove it when PEFT asks for
        # is_activation_checkpointing.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
        model = PeftModel.from_pretrained(loaded.model, str(folder), is_trainable=False).eval()
    return LoadedModel(model=model, processor=processor, path=str(folder), name=loaded.name)


def merge_adapter(folder: Path, trust_remote_code: bool = False, accept_base: bool = False) -> LoadedModel:
    """The base with the adapter merged in fp32 on the CPU, as a plain transformers model in fp32.

    A base that was quantised is dequantised first: the adapter was trained on those weights.
    """
    loaded = open_base(folder, "float32", trust_remote_code, accept_base)
    quantize_again(loaded.model, folder, torch.float32, "cpu")
    dequantize_linears(loaded.model, torch.float32)
    loaded.model.to(torch.float32)
    merged = add_adapter(loaded, folder, trust_remote_code)
    return replace(merged, model=merged.model.merge_and_unload(safe_merge=True))


def find_base(folder: Path, trust_remote_code: bool = False, accept_base: bool = False) -> Base:
    """The base model that an adapter folder names, compared with the weights it was trained on.

    Raises:
        CheckpointError: no base is named, it cannot be found, or it is another one now and not accepted.
    """
    file = folder / "adapter_config.json"
    path = str(read_json(file).get("base_model_name_or_path") or "")
    if not path:
        raise CheckpointError(
            f"{file}: base_model_name_or_path is empty, so the base is unknown. "
            "Write the base model's folder there."
        )
    try:
        base_folder = find_model_folder(path, with_weights=True)
    except CheckpointError as error:
        raise CheckpointError(
            f"{file}: the base model {path} that it names is neither a folder here nor a hub model that can "
            "be fetched. Put the base model there, or write where it is now as base_model_name_or_path."
        ) from error
    record = model_record(base_folder, model_name(path), empty_model(path, trust_remote_code))
    return Base(path, record, match_base(folder, record, accept_base))
