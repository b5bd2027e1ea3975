"""Facts about model types where the general rules are wrong or say too little. No torch, no logic.

The general rule (model/find.py) takes the towers and the decoder from transformers' own accessors and the
projector from the names below. A row adds what that rule cannot see. Paths are relative to the base model,
the module that holds the parts (`model` in most classes).
"""

from __future__ import annotations

from dataclasses import dataclass, field

# Modules or bare parameters, beside a tower or directly inside it, that carry its features to the decoder.
PROJECTOR_NAMES = (
    "multi_modal_projector",
    "connector",
    "projector",
    "mm_projector",
    "aligner",
    "merger",
    "deepstack_merger_list",
    "vision_projection",
    "language_projection",
    "embed_vision",
    "embed_audio",
    "image_newline",
)

ATTENTION_NAMES = frozenset(
    {"self_attn", "attn", "attention", "self_attention", "cross_attn", "linear_attn", "encoder_attn"}
)
MLP_NAMES = frozenset(
    {"mlp", "feed_forward", "ffn", "block_sparse_moe", "experts", "shared_expert", "shared_experts"}
)


@dataclass(frozen=True)
class Family:
    """Paths that belong to a part beside what the general rule finds, or why the model has no parts."""

    vision_tower: tuple[str, ...] = ()
    audio_tower: tuple[str, ...] = ()
    projector: tuple[str, ...] = ()
    no_parts: str = ""


_QFORMER = ("qformer", "query_tokens", "language_projection")

FAMILIES: dict[str, Family] = {
    "blip-2": Family(projector=_QFORMER),
    "deepseek_vl_hybrid": Family(
        vision_tower=(
            "high_res_vision_model",
            "high_res_vision_neck",
            "high_res_vision_proj",
            "high_res_vision_alpha",
        )
    ),
    "ernie4_5_vl_moe": Family(projector=("resampler_model",)),
    "fuyu": Family(projector=("vision_embed_tokens",)),
    "glm46v": Family(projector=("visual.downsample",)),
    "glm4v": Family(projector=("visual.downsample",)),
    "glm4v_moe": Family(projector=("visual.downsample",)),
    "glm5_next": Family(projector=("visual.downsample",)),
    "glm_ocr": Family(projector=("visual.downsample",)),
    "glmga": Family(projector=("visual.downsample",)),
    "instructblip": Family(projector=_QFORMER),
    "instructblipvideo": Family(projector=_QFORMER),
    "janus": Family(no_parts="it also generates images, and that half belongs to no part"),
    "kosmos-2": Family(projector=("image_to_text_projection",)),
    "kosmos-2.5": Family(projector=("image_to_text_projection",)),
    "muse_glimmer": Family(projector=("vision_adapter",)),
    "muse_spark": Family(projector=("vision_adapter",)),
    "ovis2": Family(projector=("visual_embeddings_table",)),
    "pi0": Family(no_parts="it is a robot policy, not a language model"),
    "qwen3_omni_moe_thinker": Family(projector=("visual.merger_list",)),
    "unlimited_ocr": Family(projector=("view_separator",)),
    "video_llava": Family(vision_tower=("video_tower",)),
}

# Classes that read config.vision_feature_layer as an index into the tower's hidden_states, so that the
# layers after it never get a gradient.
FEATURES_FROM_HIDDEN_STATES = frozenset({"llava", "llava_next", "llava_next_video", "llava_onevision"})

# Types whose tower ends where the projector begins, so that features can be kept between them
# (model/tower.py): what a type's projector averages the patches with, by path, or "" where it does not. In
# others, such as qwen2_vl, the projector is a part of the tower. Held by tests/parity/test_features.py.
CACHED_TYPES = {"gemma3": "multi_modal_projector.avg_pool", "llava": "", "llava_next": ""}


@dataclass(frozen=True)
class TowerEnd:
    """Children of a tower that run after its last layer.

    `norm` makes last_hidden_state, `pooling` only the pooled output, which no language model reads.
    """

    norm: tuple[str, ...] = field(default=())
    pooling: tuple[str, ...] = field(default=())


# By the model type of the tower's own config.
TOWER_ENDS: dict[str, TowerEnd] = {
    "clip_vision_model": TowerEnd(pooling=("post_layernorm",)),
    "siglip_vision_model": TowerEnd(norm=("post_layernorm",), pooling=("head",)),
    "siglip2_vision_model": TowerEnd(norm=("post_layernorm",), pooling=("head",)),
}

# Types, of a model and of its decoder, whose attention over packs is their own mask exactly: causal, in a
# window where a layer has one, in both directions within images where IMAGE_RUN_FIELDS has them, and nothing
# else (model/attention.py; held by tests/parity/test_packing.py).
PACKED_TYPES = frozenset(
    {
        "gemma3",
        "gemma3_text",
        "llama",
        "llava",
        "llava_next",
        "mistral",
        "qwen2",
        "qwen2_5_vl",
        "qwen2_5_vl_text",
        "qwen2_vl",
        "qwen2_vl_text",
    }
)
# The token field whose runs of ones see each other in both directions.
IMAGE_RUN_FIELDS = {"gemma3": "token_type_ids"}

# Types whose own forward squashes its logits by final_logit_softcapping of the text config. Others, such as
# the image-and-text gemma3, have the key in their config and do not read it.
LOGIT_SOFTCAP_TYPES = frozenset(
    {
        "gemma2",
        "gemma3_text",
        "gemma3n",
        "gemma3n_text",
        "gemma4",
        "gemma4_text",
        "gemma4_unified",
        "gemma4_unified_text",
        "nanochat",
        "paligemma",
        "vaultgemma",
    }
)
