"""Model folders as transformers objects, strictly: no weight is random, ignored or reshaped in silence.

In: the `model` section of the config, or a path. Out: config, processor, model. Everything a user can get
wrong about a folder is a CheckpointError with the way out. Not done here: freezing and adapters
(model/parts.py), and turning off the key-value cache, which each training call does itself.
"""

from __future__ import annotations

import re
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
    as_checkpoint_error,
    check_config_file,
    check_tokenizer_files,
    find_model_folder,
    has_processor_files,
    model_name,
    read_json,
    shorten,
)
from partwise.model.videoless import without_video
from partwise.model.weights import read_model

MEDIA_TOKEN = re.compile(
    r"((image|video|audio|vision)(_start|_end|_begin|_pad)?|[be]o[iav])_token_(id|index)"
)

SAME_MODEL = "Copy its files again from the model that it was made from."


@dataclass(frozen=True)
class LoadedModel:
    """A model with its processor (a tokenizer for text-only models) and the local folder they came from.

    `name` is how an adapter finds the model again from anywhere: the hub name, or the absolute folder.
    `dtype` is the type that it runs in and is saved in; shards of its weights may have another.
    """

    model: PreTrainedModel
    processor: ProcessorMixin | PreTrainedTokenizerBase
    path: str
    name: str
    dtype: torch.dtype


def load_model_config(path: str | Path, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The config of a model folder. Raises: CheckpointError when there is none that can be used."""
    folder = find_model_folder(path)
    check_config_file(folder, trust_remote_code)
    with as_checkpoint_error(folder / "config.json", "it makes no config", SAME_MODEL):
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)


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
    if has_processor_files(folder):
        with as_checkpoint_error(folder, "its processor cannot be loaded", SAME_MODEL):
            processor = _processor_class(folder).from_pretrained(folder, trust_remote_code=trust_remote_code)
        if not isinstance(processor, ProcessorMixin):
            raise CheckpointError(
                f"{folder}: its processor files name no processor class (found {type(processor).__name__}). "
                f"Copy {' or '.join(PROCESSOR_FILES)} from the model that this one was made from."
            )
    else:
        _refuse_images_without_processor(folder, trust_remote_code)
        with as_checkpoint_error(folder, "its tokenizer cannot be loaded", SAME_MODEL):
            processor = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    if chat_template is not None:
        _set_chat_template(processor, chat_template)
    return processor


def _processor_class(folder: Path) -> Any:
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


def empty_model(
    path: str | Path, trust_remote_code: bool = False, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """The model on the meta device: its modules and shapes, no weights read and no memory used.

    With a `dtype` its tensors have the types that they have after loading: not all buffers have the weights'.
    """
    folder = find_model_folder(path)
    config = load_model_config(folder, trust_remote_code)
    auto_class = _auto_class(config, folder)
    with as_checkpoint_error(folder, "its model cannot be built", SAME_MODEL), torch.device("meta"):
        return auto_class.from_config(config, trust_remote_code=trust_remote_code, dtype=dtype)


def load_model(settings: ModelConfig, device: str | torch.device = "cpu") -> LoadedModel:
    """The model of a folder on `device`, in eval mode, with exactly the weights of its files.

    Raises: CheckpointError when the folder is not whole, or its weights do not fit the model exactly.
    """
    folder = find_model_folder(settings.path, with_weights=True)
    config = load_model_config(folder, settings.trust_remote_code)
    processor = load_processor(folder, settings.trust_remote_code, settings.chat_template)
    model = read_model(_auto_class(config, folder), folder, config, settings)
    return loaded_model(model.to(device), processor, folder, settings)


def load_skeleton(settings: ModelConfig) -> LoadedModel:
    """The same on the meta device, without reading weights: for a rank that is given its share of them."""
    folder = find_model_folder(settings.path)
    processor = load_processor(folder, settings.trust_remote_code, settings.chat_template)
    model = empty_model(settings.path, settings.trust_remote_code, getattr(torch, settings.dtype))
    model.set_attn_implementation(settings.attention)
    return loaded_model(model.eval(), processor, folder, settings)


def loaded_model(model: Any, processor: Any, folder: Path, settings: ModelConfig) -> LoadedModel:
    dtype = getattr(torch, settings.dtype)
    return LoadedModel(model, processor, str(folder), model_name(settings.path), dtype)


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
        f"{folder}: a model of type {config.model_type!r} generates no text from text or images, so it "
        "cannot be fine-tuned here. Give the folder of a language model or of a model for images and text."
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
