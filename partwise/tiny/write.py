"""Tiny random models: the real classes and file layout of a family, at a size that trains on a CPU.

In: the name of a family, a folder, a seed, and sizes where the defaults do not fit. Out: a whole Hugging
Face folder (config, generation config, safetensors, tokenizer, processor, chat template) that is bitwise
the same for the same arguments. The weights are random and made to be trained from scratch. Not done
here: loading; model/load.py treats the folder like any other.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from transformers import Gemma3ForConditionalGeneration, GenerationConfig, PreTrainedModel

from partwise.errors import ConfigError
from partwise.tiny import recipes
from partwise.tiny.recipes import INIT_STD, TinyModel

FAMILIES: dict[str, Callable[..., TinyModel]] = {
    "gemma3": recipes.gemma3,
    "gemma3-text": recipes.gemma3_text,
    "llava": recipes.llava,
    "llava-next": recipes.llava_next,
    "qwen2-vl": recipes.qwen2_vl,
    "qwen2.5-vl": recipes.qwen2_5_vl,
    "llama": recipes.llama,
}


def write_tiny(family: str, folder: str | Path, seed: int = 0, **sizes: Any) -> Path:
    """Write a tiny random model of `family` to `folder` and return the folder.

    `sizes` are the keyword arguments of the family's function: `text` and `vision` go over the values of
    the text and vision config, `image_size` is in pixels.

    Raises: ConfigError for an unknown family or size, and for a folder that is not empty.
    """
    if family not in FAMILIES:
        near = get_close_matches(family, FAMILIES, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ConfigError(
            f"There is no tiny model of the family {family!r}.{hint} Known: {', '.join(FAMILIES)}."
        )
    known = inspect.signature(FAMILIES[family]).parameters
    if unknown := [name for name in sizes if name not in known]:
        raise ConfigError(f"A tiny {family} has no size {unknown[0]!r}. It takes: {', '.join(known)}.")
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(
            f"{folder} exists and is not an empty folder; nothing was written. Choose another folder or "
            "remove this one."
        )
    tiny = FAMILIES[family](**sizes)
    model = _random_model(tiny, seed)
    model.save_pretrained(folder)
    tiny.processor.save_pretrained(folder)
    return folder


@torch.no_grad()
def _random_model(tiny: TinyModel, seed: int) -> PreTrainedModel:
    """The model in float32, the same for the same seed; torch's own random state is left as it was."""
    tokenizer = getattr(tiny.processor, "tokenizer", tiny.processor)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = tiny.model_class(tiny.config)
        if isinstance(model, Gemma3ForConditionalGeneration):
            # Its own initial value is zero, and the norm after it has no usable gradient there.
            model.model.multi_modal_projector.mm_input_projection_weight.normal_(std=INIT_STD)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.convert_tokens_to_ids(list(tiny.special.stops)),
        pad_token_id=tokenizer.pad_token_id,
    )
    return model
