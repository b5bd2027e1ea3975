"""An adapter folder -> its base model with the adapter on it, or merged into it.

In: a PEFT adapter folder, Partwise's or anyone's. Out: a LoadedModel. A Partwise folder knows the
fingerprint of its base; another base is an error, because it would load and answer wrongly.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from peft import PeftModel

from partwise.config import ModelConfig
from partwise.errors import CheckpointError
from partwise.model.load import LoadedModel, load_model, load_processor
from partwise.training.checkpoint import base_fingerprint, read_manifest


def is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file()


def open_adapter(folder: Path, dtype: str = "bfloat16", device: str | torch.device = "cpu") -> LoadedModel:
    """The base model with the adapter on it, in eval mode.

    Raises:
        CheckpointError: the base is missing, is another one, or the adapter's weights are incomplete.
    """
    base = base_path(folder)
    loaded = load_model(ModelConfig(path=str(base), dtype=dtype), device=device)  # type: ignore[arg-type]
    model = PeftModel.from_pretrained(loaded.model, str(folder), is_trainable=False).eval()
    processor = load_processor(str(folder))
    return LoadedModel(model=model, processor=processor, path=str(folder))


def merge_adapter(folder: Path) -> LoadedModel:
    """The base with the adapter merged in fp32 on the CPU, as a plain transformers model in fp32."""
    loaded = open_adapter(folder, dtype="float32")
    return LoadedModel(
        model=loaded.model.merge_and_unload(safe_merge=True), processor=loaded.processor, path=str(folder)
    )


def base_path(folder: Path) -> str:
    """The base model that an adapter folder names, compared with the fingerprint it was trained on."""
    settings = json.loads((folder / "adapter_config.json").read_text())
    base = settings.get("base_model_name_or_path")
    if not base:
        raise CheckpointError(
            f"{folder / 'adapter_config.json'}: base_model_name_or_path is empty, so the base is unknown. "
            "Write the base model's folder there."
        )
    manifest = read_manifest(folder)
    recorded = manifest["base"]["fingerprint"] if manifest else None
    if recorded and Path(base).is_dir() and base_fingerprint(base) != recorded:
        raise CheckpointError(
            f"{folder}: the adapter was trained on another base than what {base} holds now "
            f"(fingerprint {recorded[:12]}, found {base_fingerprint(base)[:12]}). "
            "Put the original base model back at that path."
        )
    return str(base)
