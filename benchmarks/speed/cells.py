"""What is measured: for each cell the model's shape, the method, the mixture of rows, and the goal."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from benchmarks.speed.mixtures import MIXTURES
from benchmarks.step import GEMMA_3_4B
from partwise.tiny.recipes import TEXT_SIZES, VISION_SIZES

LORA_RANK = 16
LLAMA_3_8B = {
    "text": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "initializer_range": 0.02,
    }
}
# For tests: Gemma-3's structure at a size that a CPU trains in seconds.
TINY = {
    "text": {
        **TEXT_SIZES,
        "sliding_window": 64,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "vision": VISION_SIZES,
    "image_size": 56,
    "mm_tokens": 16,
}


@dataclass(frozen=True)
class Model:
    """A family of partwise.tiny with the sizes of a real model; `title` is what a reader knows it by."""

    title: str
    family: str
    sizes: dict[str, Any]

    @property
    def sees_images(self) -> bool:
        return "vision" in self.sizes


GEMMA = Model("Gemma-3-4B", "gemma3", GEMMA_3_4B)
LLAMA = Model("Llama-3.1-8B", "llama", LLAMA_3_8B)
TINY_GEMMA = Model("tiny Gemma-3", "gemma3", TINY)

ADAPTERS = {"mode": "lora", "lora_rank": LORA_RANK}
# What trains, in the words of Partwise's config; contenders open the same parts.
PARTS: dict[str, dict[str, Any]] = {
    "full": {"language_model": "full"},
    "lora": {"language_model": ADAPTERS},
    "qlora": {"language_model": {**ADAPTERS, "quantization": "nf4"}},
    "projector": {"projector": "full"},
    "full with vision": {"vision_tower": "full", "projector": "full", "language_model": "full"},
}


@dataclass(frozen=True)
class Cell:
    """`goal` is in tokens per second on one H200, the floor at `floor.PEAK_RATE`.

    `rivals` is the cell whose contenders this one is held against, where only Partwise has what it measures.
    """

    model: Model
    method: str
    mixture: str
    rows_per_step: int
    max_seq_len: int
    goal: int | None = None
    eight_bit_states: bool = False
    features_are_cached: bool = False
    rivals: str | None = None

    @property
    def title(self) -> str:
        cached = ", features from a cache" if self.features_are_cached else ""
        states = ", 8-bit states" if self.eight_bit_states else ""
        return f"{self.model.title}, {self.method}{states}: {MIXTURES[self.mixture].title}{cached}"


QUESTIONS = Cell(GEMMA, "lora", "questions", rows_per_step=32, max_seq_len=2048, goal=20_000)
CAPTIONS = Cell(GEMMA, "projector", "captions", rows_per_step=64, max_seq_len=512, goal=18_000)
LONG_LLAMA = Cell(LLAMA, "lora", "4k", rows_per_step=2, max_seq_len=4096, goal=17_000)
CELLS = {
    "C1": Cell(GEMMA, "full", "text", rows_per_step=32, max_seq_len=2048, goal=24_000),
    "C2": Cell(GEMMA, "full", "8k", rows_per_step=2, max_seq_len=8192),
    "C3": Cell(GEMMA, "lora", "text", rows_per_step=32, max_seq_len=2048, goal=33_000),
    "C4": QUESTIONS,
    "C5": Cell(GEMMA, "lora", "mixed", rows_per_step=8, max_seq_len=8192, goal=26_000),
    "C6": Cell(GEMMA, "lora", "32k", rows_per_step=1, max_seq_len=32768, goal=26_000),
    "C7": replace(QUESTIONS, method="qlora", goal=18_500),
    "C8": CAPTIONS,
    "C8-cached": replace(CAPTIONS, goal=40_000, features_are_cached=True, rivals="C8"),
    "C9": Cell(GEMMA, "full with vision", "questions", rows_per_step=16, max_seq_len=2048, goal=8_000),
    "C10": replace(QUESTIONS, goal=38_000, features_are_cached=True, rivals="C4"),
    "C11": LONG_LLAMA,
    "C11-full": replace(LONG_LLAMA, method="full", goal=None, eight_bit_states=True),
    "tiny": Cell(TINY_GEMMA, "lora", "tiny", rows_per_step=4, max_seq_len=256),
    "tiny-full": Cell(TINY_GEMMA, "full with vision", "tiny", rows_per_step=4, max_seq_len=256),
    "tiny-text": Cell(TINY_GEMMA, "lora", "tiny text", rows_per_step=4, max_seq_len=256),
}
