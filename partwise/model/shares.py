"""What a rank holds of weights, masters, moments and gradients under each engine, from shapes alone.

In: the tensors of the model as the plan trains them, and how many ranks share one copy of it. Out: a Share,
in bytes. What passes is what a rank has for a moment beside its share: gathered weights, and gradients on
their way to their shards. Activations are estimate.py's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch

from partwise.model.codes import CODE_BLOCK, LEAST_CODED
from partwise.model.find import deepest_path, find_parts
from partwise.model.head import is_plain_linear
from partwise.model.quantize import nf4_bytes
from partwise.records import PartsPlan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# DeepSpeed's: elements that are summed at a time, and that stay gathered in stage 3.
BUCKET_ELEMENTS = 50_000_000
LIVE_ELEMENTS = 1_000_000_000


@dataclass(frozen=True)
class Weight:
    """One tensor of a model. `rest_bytes` is what it takes whole between two uses, in 4 bits for example.

    `unit` is the layer that it is gathered with, "" for what is gathered for the whole pass. `is_apart`: no
    engine shards it, because it is quantized or of a vision side that is wholly frozen.
    """

    num_elements: int
    itemsize: int
    rest_bytes: int
    trains: bool
    unit: str = ""
    is_apart: bool = False


@dataclass(frozen=True)
class Weights:
    """All tensors of a model. `itemsize` is of the type it runs in.

    `head_elements` are those of a head that trains. `sums_head`: its gradient is summed over chunks of rows
    in fp32 and then rounded to its own type; not where it is called as a module.
    """

    tensors: tuple[Weight, ...]
    itemsize: int
    head_elements: int
    sums_head: bool
    optimizer_states: str

    @property
    def trained(self) -> list[Weight]:
        return [tensor for tensor in self.tensors if tensor.trains]

    @property
    def shardable(self) -> list[Weight]:
        return [tensor for tensor in self.tensors if not tensor.is_apart]


@dataclass(frozen=True)
class Passing:
    """Bytes of a moment. `gathered_bytes`: whole weights beside the shards, during the whole step.

    Gradients: `head_bytes` stand beside the logits, `head_copy_bytes` beside these when the logits are gone;
    then `waiting_bytes` during the whole backward pass, `layer_bytes` while a layer runs backward, and
    `last_bytes` when all activations are gone.
    """

    gathered_bytes: int = 0
    waiting_bytes: int = 0
    head_bytes: int = 0
    head_copy_bytes: int = 0
    layer_bytes: int = 0
    last_bytes: int = 0


@dataclass(frozen=True)
class Share:
    """Bytes that a rank holds on its device. `masters_bytes` are of weights that train and are not fp32 in
    the model; `host_bytes` are what it holds on the host instead.
    """

    weights_bytes: int
    masters_bytes: int
    moments_bytes: int
    gradients_bytes: int
    passing: Passing
    host_bytes: int = 0

    @property
    def fixed_bytes(self) -> int:
        """What does not depend on the rows: all but what passes."""
        return self.weights_bytes + self.masters_bytes + self.moments_bytes + self.gradients_bytes


def pass_whole(weights: Weights) -> Passing:
    """The gradient of a head, in fp32 and then in its own type."""
    return Passing(**head_gradient(weights))


def head_gradient(weights: Weights) -> dict[str, int]:
    if not weights.sums_head:
        return {"head_bytes": weights.itemsize * weights.head_elements}
    wide = max(4, weights.itemsize)
    copy = weights.itemsize if weights.itemsize < wide else 0
    return {"head_bytes": wide * weights.head_elements, "head_copy_bytes": copy * weights.head_elements}


def pass_units(weights: Weights) -> Passing:
    """FSDP2: a layer is gathered while the one before it runs, the root's own weights for the whole step.

    Gradients come in the type of the run, and are summed from an fp32 buffer.
    """
    layer, root = unit_elements(weights.shardable)
    trained_layer, trained_root = unit_elements(weights.trained)
    return Passing(
        gathered_bytes=weights.itemsize * (2 * layer + root),
        waiting_bytes=weights.itemsize * trained_root,
        layer_bytes=(weights.itemsize + 4) * trained_layer,
        last_bytes=(weights.itemsize + 4) * trained_root,
        **head_gradient(weights),
    )


def pass_buckets(weights: Weights) -> Passing:
    """DeepSpeed's stage 2: gradients fill a bucket, a larger one goes alone; both are summed in fp32."""
    counts = [tensor.num_elements for tensor in weights.trained]
    return Passing(
        **head_gradient(weights),
        layer_bytes=(weights.itemsize + 4) * min(BUCKET_ELEMENTS, sum(counts)),
        last_bytes=(weights.itemsize + 4) * max(counts, default=0),
    )


def pass_live(weights: Weights) -> Passing:
    """Stage 3: the same, and weights stay gathered as long as there are not too many."""
    layer, root = unit_elements(weights.shardable)
    num_live = min(LIVE_ELEMENTS, sum(tensor.num_elements for tensor in weights.shardable))
    buckets = pass_buckets(weights)
    return Passing(
        gathered_bytes=weights.itemsize * max(2 * layer + root, num_live),
        **head_gradient(replace(weights, sums_head=False)),
        layer_bytes=buckets.layer_bytes,
        last_bytes=buckets.last_bytes,
    )


class Layout(NamedTuple):
    """What an engine cuts into shards. `has_copies`: a 16-bit weight stands beside its master."""

    cuts_weights: bool
    cuts_states: bool
    has_copies: bool
    passing: Callable[[Weights], Passing]


LAYOUTS = {
    "single": Layout(False, False, True, pass_whole),
    "ddp": Layout(False, False, True, pass_whole),
    "fsdp": Layout(True, True, False, pass_units),
    "zero2": Layout(False, True, True, pass_buckets),
    "zero3": Layout(True, True, True, pass_live),
}


def share_of(weights: Weights, engine: str, num_ranks: int = 1, offload_optimizer: bool = False) -> Share:
    """What each of `num_ranks` ranks that share one copy holds; shards are taken to be equal.

    `offload_optimizer`: all shards lie in the host's memory, which fsdp alone can do.
    """
    assert engine == "fsdp" or not offload_optimizer, engine
    layout = LAYOUTS[engine]
    state_ranks = num_ranks if layout.cuts_states else 1
    trained = weights.trained
    shards = [-(-tensor.num_elements // state_ranks) for tensor in trained]
    num_small = sum(n for n, tensor in zip(shards, trained, strict=True) if tensor.itemsize < 4)
    moments_bytes = sum(moment_bytes(n, weights.optimizer_states) for n in shards)
    share = Share(
        weights_bytes=sum(weight_bytes(tensor, layout, num_ranks) for tensor in weights.tensors),
        masters_bytes=4 * num_small,
        moments_bytes=moments_bytes,
        gradients_bytes=4 * sum(shards),
        passing=layout.passing(weights),
    )
    return move_to_host(share, weights, num_ranks) if offload_optimizer else share


def move_to_host(share: Share, weights: Weights, num_ranks: int) -> Share:
    """The same with all shards on the host, where FSDP2 pins those of weights and gradients.

    Beside what passes anyway, shards of a layer come as they lie there, and those of gradients go in fp32.
    """
    pinned = 0
    for tensor in weights.shardable:
        num_elements = -(-tensor.num_elements // num_ranks)
        itemsize = 4 if tensor.trains else tensor.itemsize
        pinned += pinned_bytes(itemsize * num_elements) + tensor.trains * pinned_bytes(4 * num_elements)
    layer, _ = unit_elements(weights.shardable)
    trained_layer, trained_root = unit_elements(weights.trained)
    return Share(
        weights_bytes=sum(tensor.rest_bytes for tensor in weights.tensors if tensor.is_apart),
        masters_bytes=0,
        moments_bytes=0,
        gradients_bytes=0,
        passing=replace(
            share.passing,
            layer_bytes=share.passing.layer_bytes + 4 * -(-(layer + trained_layer) // num_ranks),
            last_bytes=share.passing.last_bytes + 4 * -(-trained_root // num_ranks),
        ),
        host_bytes=pinned + share.moments_bytes,
    )


def pinned_bytes(num_bytes: int) -> int:
    """What a tensor takes in pinned memory: torch's blocks there are powers of two."""
    return 1 << max(0, num_bytes - 1).bit_length()


def weight_bytes(tensor: Weight, layout: Layout, num_ranks: int) -> int:
    """What a rank holds of a weight between two uses, beside its master."""
    if tensor.trains and tensor.itemsize < 4 and not layout.has_copies:
        return 0
    if tensor.is_apart or not layout.cuts_weights:
        return tensor.rest_bytes
    return tensor.itemsize * -(-tensor.num_elements // num_ranks)


def unit_elements(tensors: Iterable[Weight]) -> tuple[int, int]:
    """Elements of the largest unit, and of what is in none."""
    counts: Counter[str] = Counter()
    for tensor in tensors:
        counts[tensor.unit] += tensor.num_elements
    return max((count for unit, count in counts.items() if unit), default=0), counts[""]


def moment_bytes(num_elements: int, optimizer_states: str) -> int:
    """The bytes of one tensor's two moments between two steps."""
    if optimizer_states == "float32" or num_elements < LEAST_CODED:
        return 8 * num_elements
    return 2 * num_elements + 2 * 4 * -(-num_elements // CODE_BLOCK)


def read_weights(model: PreTrainedModel, plan: PartsPlan, optimizer_states: str) -> Weights:
    """The weights of a model on the meta device that the plan was applied to."""
    packed = packed_bytes(model, plan)
    found = find_parts(model)
    layers = [path for part in found.values() for _, path in part.layers]
    aside = {
        name
        for part in found.values()
        if part.part != "language_model" and not plan.trains_vision
        for name in part.parameter_names
        if name not in part.module_paths  # a bare parameter is another module's
    }
    head = model.get_output_embeddings()
    return Weights(
        tensors=tuple(
            Weight(
                num_elements=p.numel(),
                itemsize=p.dtype.itemsize,
                rest_bytes=packed.get(p, p.numel() * p.dtype.itemsize),
                trains=p.requires_grad,
                unit=deepest_path(name, layers) or "",
                is_apart=p in packed or name in aside,
            )
            for name, p in model.named_parameters()
        ),
        itemsize=model.dtype.itemsize,
        head_elements=head.weight.numel() if head.weight.requires_grad else 0,
        sums_head=is_plain_linear(head),
        optimizer_states=optimizer_states,
    )


def packed_bytes(model: PreTrainedModel, plan: PartsPlan) -> dict[torch.nn.Parameter, int]:
    """The weights that the plan holds in 4 bits, at full width here, and their bytes then."""
    packed = {}
    for part in plan.parts:
        if part.quantization:
            for name in part.quantization.modules:
                weight = model.get_submodule(name).weight  # an adapter's is that of the layer below it
                packed[weight] = nf4_bytes(weight.numel(), part.quantization.is_double)
    return packed
