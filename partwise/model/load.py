"""Model folders as transformers objects, strictly: no weight is random, ignored or reshaped in silence.

In: the `model` section of the config, or a path. Out: config, processor, model. Everything a user can get
wrong about a folder is a CheckpointError with the way out. Not done here: freezing and adapters
(model/parts.py), and turning off the key-value cache, which each training call does itself.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.utils import is_torchvision_available

from partwise.config import ModelConfig
from partwise.errors import CheckpointError, ConfigError
from partwise.model.folder import (
    PROCESSOR_FILES,
    check_config_file,
    check_tokenizer_files,
    find_model_folder,
    has_processor_files,
    read_json,
    read_tensor_names,
    shorten,
)
from partwise.model.videoless import without_video

MEDIA_TOKEN = re.compile(
    r"((image|video|audio|vision)(_start|_end|_begin|_pad)?|[be]o[iav])_token_(id|index)"
)

# What other tools put before every name when they save a model that is still wrapped.
WRAPPER_PREFIXES = ("module.", "base_model.model.", "_orig_mod.", "model.")


@dataclass(frozen=True)
class LoadedModel:
    """A model with its processor (a tokenizer for text-only models) and the local folder they came from."""

    model: PreTrainedModel
    processor: ProcessorMixin | PreTrainedTokenizerBase
    path: str


def load_model_config(path: str | Path, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The config of a model folder. Raises: CheckpointError when there is none that can be used."""
    folder = find_model_folder(path)
    check_config_file(folder, trust_remote_code)
    with _as_checkpoint_error(folder / "config.json"):
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)


def load_processor(
    path: str | Path, trust_remote_code: bool = False, chat_template: str | None = None
) -> ProcessorMixin | PreTrainedTokenizerBase:
    """The processor of a model or adapter folder, or its tokenizer where the model takes text alone.

    `chat_template` is a file that replaces the folder's own template.

    Raises: CheckpointError for a folder without tokenizer, or without processor for a model that takes
    images; ConfigError for a chat template that cannot be read.
    """
    folder = find_model_folder(path)
    check_tokenizer_files(folder)
    options = {"trust_remote_code": trust_remote_code, "local_files_only": True}
    if has_processor_files(folder):
        with _as_checkpoint_error(folder, "its processor cannot be loaded"):
            processor = _processor_class(folder, trust_remote_code).from_pretrained(folder, **options)
        if not isinstance(processor, ProcessorMixin):
            raise CheckpointError(
                f"{folder}: its processor files name no processor class (found {type(processor).__name__}). "
                f"Copy {' or '.join(PROCESSOR_FILES)} from the model that this one was made from."
            )
    else:
        _refuse_images_without_processor(folder, trust_remote_code)
        with _as_checkpoint_error(folder, "its tokenizer cannot be loaded"):
            processor = AutoTokenizer.from_pretrained(folder, **options)
    if chat_template is not None:
        _set_chat_template(processor, chat_template)
    return processor


def _processor_class(folder: Path, trust_remote_code: bool) -> Any:
    """AutoProcessor, or the folder's processor class without its video part where torchvision is missing."""
    if is_torchvision_available():
        return AutoProcessor
    for name in (*PROCESSOR_FILES, "tokenizer_config.json"):
        file = folder / name
        class_name = read_json(file).get("processor_class", "") if file.is_file() else ""
        processor_class = getattr(transformers, class_name, None)
        if processor_class is not None:
            has_video = "video_processor" in processor_class.get_attributes()
            return without_video(processor_class) if has_video else AutoProcessor
    return AutoProcessor


def _refuse_images_without_processor(folder: Path, trust_remote_code: bool) -> None:
    if not (folder / "config.json").is_file():
        return
    config = load_model_config(folder, trust_remote_code)
    if _auto_class(config, folder) is AutoModelForImageTextToText:
        raise CheckpointError(
            f"{folder} has no processor (neither {' nor '.join(PROCESSOR_FILES)}), but its model "
            f"({config.model_type}) takes images. Copy the processor files from the model that this one was "
            "made from."
        )


def _set_chat_template(processor: Any, file: str) -> None:
    try:
        template = Path(file).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.chat_template: {file} cannot be read: {shorten(error)}") from error
    processor.chat_template = template
    if isinstance(processor, ProcessorMixin):
        processor.tokenizer.chat_template = template


def empty_model(path: str | Path, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model on the meta device: its modules and shapes, no weights read and no memory used."""
    config = deepcopy(load_model_config(path, trust_remote_code))
    auto_class = _auto_class(config, find_model_folder(path))
    with _as_checkpoint_error(Path(path), "its model cannot be built"), torch.device("meta"):
        return auto_class.from_config(config, trust_remote_code=trust_remote_code)


def load_model(settings: ModelConfig, device: str | torch.device = "cpu") -> LoadedModel:
    """The model of a folder on `device`, in eval mode, with exactly the weights of its files.

    Raises: CheckpointError when the folder is not whole, or when a weight of the model is missing in the
    files, a tensor of the files has no place in the model, or their shapes differ.
    """
    folder = find_model_folder(settings.path, with_weights=True)
    config = load_model_config(folder, settings.trust_remote_code)
    processor = load_processor(folder, settings.trust_remote_code, settings.chat_template)
    names = read_tensor_names(folder)
    model, report = _read_model(folder, config, settings)
    if any(report.values()):
        message = _describe_differences(folder, model, report)
        del model
        raise CheckpointError(message + " " + _way_out(folder, config, settings, names, report))
    return LoadedModel(model.to(device), processor, str(folder))


def _auto_class(config: PreTrainedConfig, folder: Path) -> Any:
    auto_map = getattr(config, "auto_map", None) or {}
    choices = (
        (AutoModelForImageTextToText, transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING),
        (AutoModelForCausalLM, transformers.MODEL_FOR_CAUSAL_LM_MAPPING),
    )
    for auto_class, mapping in choices:
        if type(config) in mapping or auto_class.__name__ in auto_map:
            return auto_class
    raise CheckpointError(
        f"{folder}: a model of type {config.model_type!r} generates no text from text or images, so it cannot "
        "be fine-tuned here. Give the folder of a language model or of a model for images and text."
    )


def _read_model(
    folder: Path, config: PreTrainedConfig, settings: ModelConfig, key_mapping: dict[str, str] | None = None
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model and transformers' report of what did not fit; nothing did not when its values are empty."""
    with _as_checkpoint_error(folder, "its weights cannot be loaded"), _without_load_report():
        return _auto_class(config, folder).from_pretrained(
            folder,
            config=deepcopy(config),
            dtype=getattr(torch, settings.dtype),
            attn_implementation=settings.attention,
            trust_remote_code=settings.trust_remote_code,
            key_mapping=key_mapping,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            weights_only=True,
            local_files_only=True,
        )


def _describe_differences(folder: Path, model: PreTrainedModel, report: dict[str, Any]) -> str:
    kinds = []
    if missing := sorted(report["missing_keys"]):
        kinds.append(f"{len(missing)} missing in the files, which would be random ({_first(missing)})")
    if unexpected := sorted(report["unexpected_keys"]):
        kinds.append(f"{len(unexpected)} in the files without a place in the model ({_first(unexpected)})")
    if mismatched := sorted(report["mismatched_keys"]):
        shapes = [f"{name} {tuple(found)} instead of {tuple(wanted)}" for name, found, wanted in mismatched]
        kinds.append(f"{len(mismatched)} of another shape ({_first(shapes)})")
    kinds += [shorten(message) for message in report.get("error_msgs", ())]
    return f"{folder}: the weights do not fit {type(model).__name__}: {'; '.join(kinds)}."


def _first(names: list[str], count: int = 3) -> str:
    rest = len(names) - count
    return ", ".join(names[:count]) + (f" and {rest} more" if rest > 0 else "")


def _way_out(
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
            _, renamed = _read_model(folder, config, settings, {f"^{re.escape(prefix)}": ""})
            if not any(renamed.values()):
                return (
                    f"Every name in the files begins with {prefix!r}: the model was saved while it was "
                    f"wrapped. Without that prefix all {len(names)} tensors fit: save the inner model, or rename them."
                )
    if set(report["missing_keys"]) == {"lm_head.weight"} and not report["unexpected_keys"]:
        return (
            "config.json says tie_word_embeddings: false, so the head needs weights of its own. If the head "
            "shares the embeddings, set tie_word_embeddings: true there; else copy the whole weights again."
        )
    return (
        "config.json and the weights belong to different models, or the weights are not whole. Copy both "
        "from the same model."
    )


def media_token_ids(config: PreTrainedConfig, processor: Any) -> frozenset[int]:
    """The ids that stand for images, video or audio in input_ids, and their begin and end marks.

    The config and the processor name different ones: Gemma-3's processor calls the begin mark its image
    token, and only the config has the soft token that fills the image's place.
    """
    sources = [config.to_dict(), vars(processor)]
    tokenizer = getattr(processor, "tokenizer", None)
    for token_type in ("image", "video", "audio", "boi", "eoi"):
        sources.append({f"{token_type}_token_id": getattr(tokenizer, f"{token_type}_token_id", None)})
    return frozenset(
        value
        for source in sources
        for key, value in source.items()
        if MEDIA_TOKEN.fullmatch(key) and isinstance(value, int) and value >= 0
    )


@contextmanager
def _without_load_report() -> Iterator[None]:
    """Drops transformers' table of keys that do not fit: what it would print, load_model raises."""
    logger = logging.getLogger("transformers.modeling_utils")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def _as_checkpoint_error(where: Path, what: str = "it cannot be read") -> Iterator[None]:
    """Whatever a library raises about a folder's content becomes one CheckpointError."""
    try:
        yield
    except Exception as error:
        raise CheckpointError(f"{where}: {what}: {shorten(error)}") from error
