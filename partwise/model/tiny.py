"""Tiny random models: the real classes and file layout of a family, at a size that trains on a CPU.

In: the name of a family, a folder, a seed, and sizes where the defaults do not fit. Out: a whole Hugging
Face folder (config, generation config, safetensors, tokenizer, processor, chat template) that is bitwise
the same for the same arguments. The weights are random and made to be trained from scratch. Not done
here: loading; model/load.py treats the folder like any other.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    Gemma3TextConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaProcessor,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    SiglipVisionConfig,
)

from partwise.errors import ConfigError
from partwise.model.tokenizer import (
    GEMMA3_TOKENS,
    LLAMA3_TOKENS,
    MISTRAL_TOKENS,
    VICUNA_TOKENS,
    SpecialTokens,
    build_tokenizer,
)

VOCAB_SIZE = 512
INIT_STD = 0.05

TEXT_SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "initializer_range": INIT_STD,
}

VISION_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "patch_size": 14,
}

Sizes = dict[str, Any]


@dataclass(frozen=True)
class TinyModel:
    """What a folder is written from: the class, its config, the processor (or tokenizer) and its tokens."""

    model_class: type[PreTrainedModel]
    config: PreTrainedConfig
    processor: ProcessorMixin | PreTrainedTokenizerFast
    special: SpecialTokens


def _sub_config(config_class: type[PreTrainedConfig], defaults: Sizes, sizes: Sizes | None, key: str) -> Any:
    """The sub-config with `sizes` over `defaults`. Raises: ConfigError for a key that the class lacks."""
    known = [field.name for field in fields(config_class)]
    for name in sizes or {}:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ConfigError(f"{key}.{name} is not a setting of {config_class.__name__}.{hint}")
    return config_class(**{**defaults, **(sizes or {})})


def _token_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int | None]:
    return {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _gemma3_text(tokenizer: PreTrainedTokenizerFast, text: Sizes | None) -> Gemma3TextConfig:
    defaults = {
        **TEXT_SIZES,
        **_token_ids(tokenizer),
        "query_pre_attn_scalar": 16,
        "sliding_window": 32,
        "sliding_window_pattern": 2,
    }
    return _sub_config(Gemma3TextConfig, defaults, text, "text")


def gemma3(
    text: Sizes | None = None, vision: Sizes | None = None, image_size: int = 56, mm_tokens: int = 4
) -> TinyModel:
    """Gemma-3 with SigLIP: every image becomes `mm_tokens` soft tokens between its begin and end tokens."""
    tokenizer = build_tokenizer(GEMMA3_TOKENS)
    config = Gemma3Config(
        text_config=_gemma3_text(tokenizer, text),
        vision_config=_sub_config(
            SiglipVisionConfig,
            {**VISION_SIZES, "image_size": image_size, "vision_use_head": False},
            vision,
            "vision",
        ),
        mm_tokens_per_image=mm_tokens,
        boi_token_index=tokenizer.convert_tokens_to_ids("<start_of_image>"),
        eoi_token_index=tokenizer.convert_tokens_to_ids("<end_of_image>"),
        image_token_index=tokenizer.convert_tokens_to_ids("<image_soft_token>"),
        eos_token_id=tokenizer.convert_tokens_to_ids(list(GEMMA3_TOKENS.stops)),
        initializer_range=INIT_STD,
    )
    processor = Gemma3Processor(
        Gemma3ImageProcessorPil(size={"height": image_size, "width": image_size}, do_pan_and_scan=False),
        tokenizer,
        chat_template=tokenizer.chat_template,
        image_seq_length=mm_tokens,
    )
    return TinyModel(Gemma3ForConditionalGeneration, config, processor, GEMMA3_TOKENS)


def gemma3_text(text: Sizes | None = None) -> TinyModel:
    """The text-only Gemma-3."""
    tokenizer = build_tokenizer(GEMMA3_TOKENS)
    return TinyModel(Gemma3ForCausalLM, _gemma3_text(tokenizer, text), tokenizer, GEMMA3_TOKENS)


def llama(text: Sizes | None = None) -> TinyModel:
    """Llama-3: grouped heads, an untied head, header tokens around the roles."""
    tokenizer = build_tokenizer(LLAMA3_TOKENS)
    defaults = {
        **TEXT_SIZES,
        **_token_ids(tokenizer),
        "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
        "eos_token_id": tokenizer.convert_tokens_to_ids(list(LLAMA3_TOKENS.stops)),
        "tie_word_embeddings": False,
    }
    config = _sub_config(LlamaConfig, defaults, text, "text")
    return TinyModel(LlamaForCausalLM, config, tokenizer, LLAMA3_TOKENS)


def _clip(vision: Sizes | None, image_size: int) -> CLIPVisionConfig:
    defaults = {**VISION_SIZES, "num_hidden_layers": 3, "image_size": image_size, "projection_dim": 64}
    return _sub_config(CLIPVisionConfig, defaults, vision, "vision")


def llava(text: Sizes | None = None, vision: Sizes | None = None, image_size: int = 56) -> TinyModel:
    """LLaVA-1.5: CLIP's last layer but one without its class token, a two-layer projector, Vicuna turns."""
    tokenizer = build_tokenizer(VICUNA_TOKENS)
    clip = _clip(vision, image_size)
    config = LlavaConfig(
        text_config=_sub_config(LlamaConfig, {**TEXT_SIZES, **_token_ids(tokenizer)}, text, "text"),
        vision_config=clip,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(image_size // clip.patch_size) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    processor = LlavaProcessor(
        CLIPImageProcessorPil(
            size={"shortest_edge": image_size}, crop_size={"height": image_size, "width": image_size}
        ),
        tokenizer,
        patch_size=clip.patch_size,
        vision_feature_select_strategy="default",
        chat_template=tokenizer.chat_template,
        num_additional_image_tokens=1,
    )
    return TinyModel(LlavaForConditionalGeneration, config, processor, VICUNA_TOKENS)


def llava_next(text: Sizes | None = None, vision: Sizes | None = None, image_size: int = 28) -> TinyModel:
    """LLaVA-1.6: an overview and tiles of `image_size` pixels, rows of features that end in a newline."""
    tokenizer = build_tokenizer(MISTRAL_TOKENS)
    clip = _clip(vision, image_size)
    tile, two = image_size, 2 * image_size
    pinpoints = [[tile, two], [two, tile], [two, two]]
    config = LlavaNextConfig(
        text_config=_sub_config(
            MistralConfig,
            {**TEXT_SIZES, **_token_ids(tokenizer), "sliding_window": None},
            text,
            "text",
        ),
        vision_config=clip,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=pinpoints,
        image_seq_length=(image_size // clip.patch_size) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    processor = LlavaNextProcessor(
        LlavaNextImageProcessorPil(
            size={"shortest_edge": image_size},
            crop_size={"height": image_size, "width": image_size},
            image_grid_pinpoints=pinpoints,
        ),
        tokenizer,
        patch_size=clip.patch_size,
        vision_feature_select_strategy="default",
        chat_template=tokenizer.chat_template,
        num_additional_image_tokens=1,
    )
    return TinyModel(LlavaNextForConditionalGeneration, config, processor, MISTRAL_TOKENS)


FAMILIES: dict[str, Callable[..., TinyModel]] = {
    "gemma3": gemma3,
    "gemma3-text": gemma3_text,
    "llava": llava,
    "llava-next": llava_next,
    "llama": llama,
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
