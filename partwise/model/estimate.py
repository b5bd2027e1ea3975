"""How much memory a training step takes, part by part of it, from shapes alone.

In: the model on the meta device, the plan, and the shape of the longest row. Out: a Footprint, which gives
the predicted peak for any number of rows in a micro-batch and any share of layers that are recomputed, alone
and on several ranks (shares.py). No weight is read. Which device it must fit, and what to do when it does
not, is said in preflight/memory.py. docs/memory.md compares it with measured peaks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from partwise.config import ModelConfig
from partwise.model.find import find_parts
from partwise.model.head import MODULE_CHUNK, Chunk, chunk_of, logit_softcap
from partwise.model.load import empty_model
from partwise.model.parts import apply_plan
from partwise.model.shares import Share, Weights, packed_bytes, read_weights, share_of
from partwise.model.trace import compiled_decoder_bytes, decoder_bytes, tower_bytes
from partwise.records import PartsPlan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# While a layer runs backward, gradients of its activations stand beside the activations themselves.
LAYER_BACKWARD_FRACTION = 0.5


@dataclass(frozen=True)
class RowShape:
    """The longest row. A tile is what the tower sees at once: (channels, height, width), or (values,).

    `most_rows`: no micro-batch ever has as much as more of such rows.
    """

    num_tokens: int
    num_target_tokens: int
    tile_shape: tuple[int, ...] = ()
    num_tiles: int = 0
    most_rows: int | None = None


@dataclass(frozen=True)
class Kept:
    """Bytes that a stack of layers keeps per row: all of them, its inputs alone, and one layer's share."""

    all_bytes: int = 0
    input_bytes: int = 0
    layer_bytes: int = 0

    def bytes(self, recomputed: float) -> int:
        """`recomputed`: the share of the layers that keep their inputs alone."""
        saved = self.all_bytes - min(self.input_bytes, self.all_bytes)
        return self.all_bytes - int(recomputed * saved)


@dataclass(frozen=True)
class Footprint:
    """The bytes of a training step on one rank. Those of activations are per row of its micro-batch.

    `largest_dequantized_bytes` is the layer in 4 bits that is multiplied with, at full width for that moment.
    """

    weights: Weights
    share: Share
    decoder: Kept
    tower: Kept
    tower_trains: bool
    largest_dequantized_bytes: int
    num_target_tokens: int
    vocab_size: int
    chunk: Chunk
    most_rows: int | None = None

    def on_ranks(self, engine: str, num_ranks: int, offload_optimizer: bool = False) -> Footprint:
        """The same step on each of `num_ranks` ranks that share one copy of the model."""
        share = share_of(self.weights, engine, num_ranks, offload_optimizer)
        # It gathers the head's weight around a call of the head.
        return replace(self, share=share, chunk=MODULE_CHUNK if engine == "zero3" else self.chunk)

    @property
    def fixed_bytes(self) -> int:
        """What does not depend on the rows."""
        return self.share.fixed_bytes

    def at_most(self, num_rows: int) -> int:
        """As many rows as a micro-batch really has where it has room for `num_rows`."""
        return min(num_rows, self.most_rows or num_rows)

    def activations_bytes(self, num_rows: int, recomputed: float) -> int:
        tower = self.tower.bytes(recomputed) if self.tower_trains else 0
        return self.at_most(num_rows) * (self.decoder.bytes(recomputed) + tower)

    def head_bytes(self, num_rows: int) -> int:
        """The loss: a chunk of logits, and the gradient of a head that trains."""
        rows = min(self.chunk.num_rows, self.at_most(num_rows) * self.num_target_tokens)
        logits = rows * self.vocab_size * self.chunk.logit_bytes
        return max(logits, self.share.passing.head_copy_bytes) + self.share.passing.head_bytes

    def layer_bytes(self, num_rows: int, recomputed: float) -> int:
        """The layer that runs: its gradients, and its own activations where they were not kept."""
        layer = max(self.decoder.layer_bytes, self.tower.layer_bytes)
        activations = int(self.at_most(num_rows) * layer * (LAYER_BACKWARD_FRACTION + (recomputed > 0)))
        return activations + self.largest_dequantized_bytes + self.share.passing.layer_bytes

    def peak_bytes(self, num_rows: int, recomputed: float) -> int:
        """The predicted peak of a step with `num_rows` such rows in each micro-batch of a rank.

        `recomputed` is the share of layers that are computed again in the backward pass, 0 to 1.
        """
        passing = self.share.passing
        layer = passing.waiting_bytes + self.layer_bytes(num_rows, recomputed)
        running = max(self.head_bytes(num_rows), layer)
        backward = self.activations_bytes(num_rows, recomputed) + running
        return self.fixed_bytes + passing.gathered_bytes + max(backward, passing.last_bytes)

    def largest_num_rows(self, limit_bytes: int, recomputed: float, most: int) -> int:
        """The most rows, up to `most`, whose peak is below the limit; 0 where not even one row fits."""
        fitting = (n for n in range(most, 0, -1) if self.peak_bytes(n, recomputed) < limit_bytes)
        return next(fitting, 0)


def planned_model(settings: ModelConfig, plan: PartsPlan, whole: PartsPlan | None = None) -> PreTrainedModel:
    """The model of the run on the meta device: its weight type, its adapters, and what trains.

    `whole` is the plan of all stages where this is one of several.
    """
    model = empty_model(settings.path, settings.trust_remote_code)
    model = model.to(getattr(torch, settings.dtype))
    apply_plan(model, plan, whole)
    return model


def estimate_footprint(
    model: PreTrainedModel,
    plan: PartsPlan,
    row: RowShape,
    attention: str,
    optimizer_states: str,
    compiled: bool = False,
) -> Footprint:
    """The footprint, on one rank alone, of a model on the meta device that the plan was applied to.

    `compiled`: of the decoder's layers; a tower's are counted as if they were not, which is more.

    Raises:
        NotImplementedError, RuntimeError: the forward pass needs values, not shapes alone.
    """
    weights = read_weights(model, plan, optimizer_states)
    packed = packed_bytes(model, plan)
    head = model.get_output_embeddings()
    return Footprint(
        weights=weights,
        share=share_of(weights, "single"),
        decoder=decoder_kept(model, plan, row, attention, compiled),
        tower=tower_kept(model, row, attention) if row.num_tiles else Kept(),
        tower_trains="vision_tower" in plan and bool(plan["vision_tower"].trainable),
        largest_dequantized_bytes=max((p.numel() * p.dtype.itemsize for p in packed), default=0),
        num_target_tokens=row.num_target_tokens,
        vocab_size=head.weight.shape[0],
        chunk=chunk_of(head, logit_softcap(model)),
        most_rows=row.most_rows,
    )


def decoder_kept(
    model: PreTrainedModel, plan: PartsPlan, row: RowShape, attention: str, compiled: bool
) -> Kept:
    embeddings = model.get_input_embeddings().weight
    has_graph = plan.trains_vision or embeddings.requires_grad
    count = compiled_decoder_bytes if compiled else decoder_bytes
    total = count(model, row.num_tokens, has_graph, attention)
    num_layers = plan["language_model"].num_layers
    width = embeddings.shape[1] * embeddings.dtype.itemsize
    return Kept(total, num_layers * row.num_tokens * width, total // num_layers)


def tower_kept(model: PreTrainedModel, row: RowShape, attention: str) -> Kept:
    """What the tower would keep, all of it open. A frozen one has one layer's share alive at a time."""
    found = find_parts(model)["vision_tower"]
    if len(row.tile_shape) == 3:
        total = row.num_tiles * tower_bytes(model, row.tile_shape, attention)
        width, num_patches = tower_width(model, row.tile_shape)
        inputs = len(found.layers) * row.num_tiles * num_patches * width * model.dtype.itemsize
    else:
        block = model.get_submodule(found.layers[0][1])
        linears = [m for m in block.modules() if isinstance(m, torch.nn.Linear)]
        per_patch = sum(m.in_features + m.out_features for m in linears) * model.dtype.itemsize
        total = len(found.layers) * row.num_tiles * per_patch
        inputs = len(found.layers) * row.num_tiles * linears[0].in_features * model.dtype.itemsize
    return Kept(total, inputs, total // max(1, len(found.layers)))


def tower_width(model: PreTrainedModel, tile_shape: tuple[int, ...]) -> tuple[int, int]:
    """Width of a tower that takes whole tiles, and patches of a tile."""
    config = model.config.vision_config
    return config.hidden_size, (tile_shape[1] // config.patch_size) * (tile_shape[2] // config.patch_size)
