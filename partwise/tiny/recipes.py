"""The families of tiny models: for each its config, processor and tokens at a size that trains on a CPU.

In: sizes where the defaults do not fit. Out: a `TinyModel`, built from the family's own transformers
classes, with the structure that sets the family apart (sliding windows, tiles, grids, tied heads). Not
done here: weights and files; write.py makes them.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any

from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    Gemma3TextConfig,
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
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Qwen2VLProcessor,
    SiglipVisionConfig,
)
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import (
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLVisionConfig,
)
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLTextConfig, Qwen2VLVisionConfig

from partwise.errors import ConfigError
from partwise.model.videoless import without_video
from partwise.tiny.tokenizer import (
    GEMMA3_TOKENS,
    LLAMA3_TOKENS,
    MISTRAL_TOKENS,
    QWEN_TOKENS,
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


def _qwen(
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerFast,
    processor_class: type[ProcessorMixin],
    image_size: int,
) -> TinyModel:
    """An image keeps its shape and gets at most `image_size` squared pixels."""
    vision = config.vision_config
    image_processor = Qwen2VLImageProcessorPil(
        size={
            "shortest_edge": (vision.patch_size * vision.spatial_merge_size) ** 2,
            "longest_edge": image_size**2,
        },
        patch_size=vision.patch_size,
        temporal_patch_size=vision.temporal_patch_size,
        merge_size=vision.spatial_merge_size,
    )
    processor = without_video(processor_class)(
        image_processor, tokenizer, chat_template=tokenizer.chat_template
    )
    settings = image_processor.to_dict()
    del settings["image_processor_type"]
    processor.video_settings = {**settings, "video_processor_type": "Qwen2VLVideoProcessor"}
    return TinyModel(model_class, config, processor, QWEN_TOKENS)


def _qwen_text(tokenizer: PreTrainedTokenizerFast) -> Sizes:
    return {
        **TEXT_SIZES,
        **_token_ids(tokenizer),
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
    }


def _qwen_media_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    names = {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    return {key: tokenizer.convert_tokens_to_ids(token) for key, token in names.items()}


def qwen2_vl(text: Sizes | None = None, vision: Sizes | None = None, image_size: int = 56) -> TinyModel:
    """Qwen2-VL: images of any shape as a grid of patches, merged two by two; positions in three axes."""
    tokenizer = build_tokenizer(QWEN_TOKENS)
    text_config = _sub_config(Qwen2VLTextConfig, _qwen_text(tokenizer), text, "text")
    tower = {
        "depth": 2,
        "embed_dim": 64,
        "num_heads": 4,
        "mlp_ratio": 2,
        "hidden_size": text_config.hidden_size,
        "initializer_range": INIT_STD,
    }
    config = Qwen2VLConfig(
        text_config=text_config,
        vision_config=_sub_config(Qwen2VLVisionConfig, tower, vision, "vision"),
        **_qwen_media_ids(tokenizer),
    )
    return _qwen(Qwen2VLForConditionalGeneration, config, tokenizer, Qwen2VLProcessor, image_size)


def qwen2_5_vl(text: Sizes | None = None, vision: Sizes | None = None, image_size: int = 56) -> TinyModel:
    """Qwen2.5-VL: as Qwen2-VL, with attention in windows in all but the last layer of the vision tower."""
    tokenizer = build_tokenizer(QWEN_TOKENS)
    text_config = _sub_config(Qwen2_5_VLTextConfig, _qwen_text(tokenizer), text, "text")
    tower = {
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 4,
        "window_size": 56,
        "fullatt_block_indexes": [1],
        "out_hidden_size": text_config.hidden_size,
        "initializer_range": INIT_STD,
    }
    config = Qwen2_5_VLConfig(
        text_config=text_config,
        vision_config=_sub_config(Qwen2_5_VLVisionConfig, tower, vision, "vision"),
        **_qwen_media_ids(tokenizer),
    )
    return _qwen(Qwen2_5_VLForConditionalGeneration, config, tokenizer, Qwen2_5_VLProcessor, image_size)
