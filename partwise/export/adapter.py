"""An adapter folder -> its base model with the adapter on it.

In: a PEFT adapter folder, Partwise's or anyone's. Out: a LoadedModel. A Partwise folder knows the
fingerprint of its base; another base is an error, because it would load and answer wrongly.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.utils import load_peft_weights
from transformers import PreTrainedModel

from partwise.config import ModelConfig
from partwise.data.template import end_of_turn
from partwise.errors import CheckpointError
from partwise.lineage.fingerprint import base_fingerprint
from partwise.lineage.manifest import read_manifest
from partwise.model.find import shorten as shorten_names
from partwise.model.folder import as_checkpoint_error, find_model_folder, read_json
from partwise.model.load import LoadedModel, load_model, load_processor
from partwise.model.stops import stop_at


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
    """
    base = base_path(folder)
    settings = ModelConfig(path=base, dtype=dtype, trust_remote_code=trust_remote_code)  # type: ignore[arg-type]
    loaded = load_model(settings, device=device)
    processor = load_processor(str(folder), trust_remote_code)
    stop_at(loaded.model, end_of_turn(processor))
    model = put_on(loaded.model, folder)
    return LoadedModel(model=model, processor=processor, path=str(folder), name=loaded.name)


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
