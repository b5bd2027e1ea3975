"""An adapter folder -> its base model with the adapter on it, or merged into it.

In: a PEFT adapter folder, Partwise's or anyone's. Out: a LoadedModel. A Partwise folder knows the
fingerprint of its base; another base is an error, because it would load and answer wrongly. It also knows
which parts of the base were quantised, and the adapter meets the weights that it was trained on.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel

from partwise.config import ModelConfig
from partwise.errors import CheckpointError
from partwise.lineage.fingerprint import base_fingerprint
from partwise.lineage.manifest import read_manifest
from partwise.model.find import find_parts
from partwise.model.folder import find_model_folder, read_json
from partwise.model.load import LoadedModel, load_model, load_processor
from partwise.model.plan import block_linears
from partwise.model.quantize import dequantize_linears, quantize_linears
from partwise.records import Quantization

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file()


def open_adapter(
    folder: Path,
    dtype: str = "bfloat16",
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
) -> LoadedModel:
    """The base model with the adapter on it, in eval mode.

    Raises:
        CheckpointError: the base is missing, is another one, or the adapter's weights are incomplete.
        ConfigError: the base was quantised, and bitsandbytes is not installed.
    """
    loaded = open_base(folder, dtype, trust_remote_code)
    quantize_again(loaded.model, folder, getattr(torch, dtype), device)
    loaded.model.to(device, getattr(torch, dtype))
    return add_adapter(loaded, folder, trust_remote_code)


def open_base(folder: Path, dtype: str, trust_remote_code: bool) -> LoadedModel:
    """The base that an adapter folder names, on the CPU; a base to quantise in the type it was trained in."""
    manifest = read_manifest(folder) or {}
    if trained_quantization(manifest):
        dtype = manifest["dtype"]
    settings = ModelConfig(path=base_path(folder), dtype=dtype, trust_remote_code=trust_remote_code)  # type: ignore[arg-type]
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


def merge_adapter(folder: Path, trust_remote_code: bool = False) -> LoadedModel:
    """The base with the adapter merged in fp32 on the CPU, as a plain transformers model in fp32.

    A base that was quantised is dequantised first: the adapter was trained on those weights.
    """
    loaded = open_base(folder, "float32", trust_remote_code)
    quantize_again(loaded.model, folder, torch.float32, "cpu")
    dequantize_linears(loaded.model, torch.float32)
    loaded.model.to(torch.float32)
    merged = add_adapter(loaded, folder, trust_remote_code)
    return replace(merged, model=merged.model.merge_and_unload(safe_merge=True))


def base_path(folder: Path) -> str:
    """The base model that an adapter folder names, compared with the fingerprint it was trained on.

    Raises:
        CheckpointError: no base is named, it cannot be found, or it is another one now.
    """
    file = folder / "adapter_config.json"
    base = str(read_json(file).get("base_model_name_or_path") or "")
    if not base:
        raise CheckpointError(
            f"{file}: base_model_name_or_path is empty, so the base is unknown. "
            "Write the base model's folder there."
        )
    try:
        found = base_fingerprint(find_model_folder(base, with_weights=True))
    except CheckpointError as error:
        raise CheckpointError(
            f"{file}: the base model {base} that it names is neither a folder here nor a hub model that can "
            "be fetched. Put the base model there, or write where it is now as base_model_name_or_path."
        ) from error
    manifest = read_manifest(folder)
    recorded = manifest["base"]["fingerprint"] if manifest else None
    if recorded and found != recorded:
        raise CheckpointError(
            f"{folder}: the adapter was trained on another base than what {base} holds now "
            f"(fingerprint {recorded[:12]}, found {found[:12]}). "
            "Put the original base model back at that path."
        )
    return base
