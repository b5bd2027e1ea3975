"""The fewest seconds that a step can take: the operations that its result needs, at a GPU's own rate.

Counted are matrix products alone, two operations for each multiply and add. Every weight of a decoder layer
is used once in the forward pass, once to carry the gradient on, and once more where it trains itself.
Attention counts the pairs of tokens that the model's mask lets see each other; its backward pass has five
products for the forward's two. The head counts target tokens only. A frozen vision tower runs forward.
Not counted: anything that is recomputed, moved, padded, or done element by element.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from benchmarks.speed.cells import LORA_RANK, Cell
from benchmarks.speed.mixtures import Lengths, draw_rows

PEAK_RATE = 790e12  # operations a second: a bfloat16 product of 8,192 squared on an H200, measured
BACKWARD_ATTENTION = 2.5  # backward products for each forward one: the scores once more, and four gradients


def floor_seconds(cell: Cell, rows: Iterable[Lengths]) -> float:
    return sum(row_operations(cell, row) for row in rows) / PEAK_RATE


def floor_tokens_per_second(cell: Cell, num_rows: int = 20_000) -> float:
    """Over the mixture as it is, rather than over the rows of one run."""
    rows = draw_rows(cell.mixture, num_rows)
    return sum(row.num_tokens for row in rows) / floor_seconds(cell, rows)


def row_operations(cell: Cell, row: Lengths) -> float:
    text = cell.model.sizes["text"]
    weights_train = cell.method.startswith("full")
    uses = 3 if weights_train else 2
    operations = 2 * uses * decoder_weights(text) * row.num_tokens
    operations += 2 * uses * text["vocab_size"] * text["hidden_size"] * row.num_targets
    if cell.method in ("lora", "qlora"):
        operations += 2 * 3 * adapter_weights(text, LORA_RANK) * row.num_tokens
    heads = text["num_attention_heads"] * text["head_dim"]
    operations += (1 + BACKWARD_ATTENTION) * 4 * heads * seen_pairs(cell.model.sizes, row)
    if row.num_images and not cell.features_are_cached:
        trains = cell.method == "full with vision"
        operations += row.num_images * tower_operations(cell.model.sizes, trains)
    return operations


def linear_layers(text: dict[str, Any]) -> list[tuple[int, int]]:
    """Inputs and outputs of the linear layers of one decoder layer."""
    width, inner = text["hidden_size"], text["intermediate_size"]
    queries = text["num_attention_heads"] * text["head_dim"]
    keys = text["num_key_value_heads"] * text["head_dim"]
    attention = [(width, queries), (width, keys), (width, keys), (queries, width)]
    return [*attention, (width, inner), (width, inner), (inner, width)]


def decoder_weights(text: dict[str, Any]) -> int:
    return text["num_hidden_layers"] * sum(inputs * outputs for inputs, outputs in linear_layers(text))


def adapter_weights(text: dict[str, Any], rank: int) -> int:
    return text["num_hidden_layers"] * sum(rank * (ins + outs) for ins, outs in linear_layers(text))


def seen_pairs(sizes: dict[str, Any], row: Lengths) -> float:
    """Query and key positions that may see each other, over all decoder layers."""
    text, length = sizes["text"], row.num_tokens
    causal = length * (length + 1) / 2
    window = min(text.get("sliding_window", length), length)
    windowed = window * length - window * (window - 1) / 2
    kinds = text.get("layer_types") or ["full_attention"] * text["num_hidden_layers"]
    # Tokens of an image see those after them, too.
    image = sizes.get("mm_tokens", 0)
    forward = row.num_images * image * (image - 1) / 2
    return sum((causal if kind == "full_attention" else windowed) + forward for kind in kinds)


def tower_operations(sizes: dict[str, Any], trains: bool) -> float:
    """SigLIP on one image, and the projection of what it returns."""
    vision = sizes["vision"]
    width, inner, layers = vision["hidden_size"], vision["intermediate_size"], vision["num_hidden_layers"]
    patches = (sizes["image_size"] // vision["patch_size"]) ** 2
    weights = layers * (4 * width * width + 2 * width * inner) + 3 * vision["patch_size"] ** 2 * width
    linear = 2 * patches * weights + 2 * sizes["mm_tokens"] * width * sizes["text"]["hidden_size"]
    attention = layers * 4 * width * patches * patches
    return linear * (3 if trains else 1) + attention * (1 + BACKWARD_ATTENTION if trains else 1)
