"""The weights of a folder in their model: all of them, no other, each in its place.

In: a checked folder, its config and the auto class that makes the model. Out: the model with its weights.
transformers reports what does not fit and goes on with random weights; here that report is an error, with
the change that would make the weights fit where one can be found. Not done here: devices, processors.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from partwise.config import ModelConfig
from partwise.errors import CheckpointError
from partwise.model.folder import as_checkpoint_error, read_tensor_names, shorten

# What other tools put before every name when they save a model that is still wrapped.
WRAPPER_PREFIXES = ("module.", "base_model.model.", "_orig_mod.")


def read_model(
    auto_class: Any, folder: Path, config: PreTrainedConfig, settings: ModelConfig
) -> PreTrainedModel:
    """The model on the CPU in eval mode, with exactly the weights of the folder's files.

    Raises: CheckpointError when the files are not whole, when a weight of the model is missing in them, a
    tensor has no place in the model, shapes differ, or weights that the config ties are not equal.
    """
    names = read_tensor_names(folder)
    model, report = _read(auto_class, folder, config, settings)
    if not any(report.values()):
        return model
    message = _describe_differences(folder, model, report)
    del model
    raise CheckpointError(f"{message} {_way_out(auto_class, folder, config, settings, names, report)}")


def _read(
    auto_class: Any,
    folder: Path,
    config: PreTrainedConfig,
    settings: ModelConfig,
    key_mapping: dict[str, str] | None = None,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model, and a report of what did not fit by kind; everything did when all its values are empty."""
    way_out = "Copy or download the weights again."
    with as_checkpoint_error(folder, "its weights cannot be loaded", way_out), _without_load_report():
        try:
            model, report = auto_class.from_pretrained(
                folder,
                config=deepcopy(config),
                dtype=getattr(torch, settings.dtype),
                attn_implementation=settings.attention,
                trust_remote_code=settings.trust_remote_code,
                key_mapping=key_mapping,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                weights_only=True,
            )
        except UnpicklingError as error:
            raise CheckpointError(
                f"{folder}: its pickled weights hold more than tensors, and loading that would run code. "
                "Convert them to safetensors where you trust them, and give that folder."
            ) from error
    tied = model.all_tied_weights_keys
    report["missing_keys"] = set(report["missing_keys"]) - set(tied)
    report["untied_keys"] = set(model.get_expanded_tied_weights_keys(all_submodels=True)) - set(tied)
    return model, report


def _describe_differences(folder: Path, model: PreTrainedModel, report: dict[str, Any]) -> str:
    kinds = []
    if missing := sorted(report["missing_keys"]):
        kinds.append(f"{len(missing)} missing in the files, which would be random ({_first(missing)})")
    if unexpected := sorted(report["unexpected_keys"]):
        kinds.append(f"{len(unexpected)} in the files without a place in the model ({_first(unexpected)})")
    if mismatched := sorted(report["mismatched_keys"]):
        shapes = [f"{name} {tuple(found)} instead of {tuple(wanted)}" for name, found, wanted in mismatched]
        kinds.append(f"{len(mismatched)} of another shape ({_first(shapes)})")
    if untied := sorted(report["untied_keys"]):
        kinds.append(
            f"{len(untied)} that the config ties to the embeddings but the files do not ({_first(untied)})"
        )
    kinds += [shorten(message) for message in report.get("error_msgs", ())]
    return f"{folder}: the weights do not fit {type(model).__name__}: {'; '.join(kinds)}."


def _first(names: list[str], count: int = 3) -> str:
    rest = len(names) - count
    return ", ".join(names[:count]) + (f" and {rest} more" if rest > 0 else "")


def _way_out(
    auto_class: Any,
    folder: Path,
    config: PreTrainedConfig,
    settings: ModelConfig,
    names: frozenset[str],
    report: dict[str, Any],
) -> str:
    if any("lora_" in name for name in names):
        return (
            "The files hold adapter tensors that were not merged: merge the adapter and save the model again."
        )
    for prefix in WRAPPER_PREFIXES:
        if names and all(name.startswith(prefix) for name in names):
            _, renamed = _read(auto_class, folder, config, settings, {f"^{re.escape(prefix)}": ""})
            if not any(renamed.values()):
                return (
                    f"Every name in the files begins with {prefix!r}: the model was saved while it was "
                    f"wrapped. Without that prefix all {len(names)} tensors fit: save the inner model, or "
                    "rename them."
                )
    if set(report["missing_keys"]) == {"lm_head.weight"} and not report["unexpected_keys"]:
        return (
            "config.json says tie_word_embeddings: false, so the head needs weights of its own. If the head "
            "shares the embeddings, set tie_word_embeddings: true there; else copy the whole weights again."
        )
    if report["untied_keys"]:
        return (
            "If the head was trained apart from the embeddings, set tie_word_embeddings: false in "
            "config.json; else copy the whole weights again."
        )
    return (
        "config.json and the weights belong to different models, or the weights are not whole. Copy both "
        "from the same model."
    )


@contextmanager
def _without_load_report() -> Iterator[None]:
    """Drops transformers' table of keys that do not fit: what it would print, load_model raises."""
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(_is_error)
    try:
        yield
    finally:
        logger.removeFilter(_is_error)


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
