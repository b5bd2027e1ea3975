"""Exact attention over packs on a GPU: two causal problems for flash attention, merged.

In: queries, keys and values of a pack, and where its documents and images lie. Out: attention under the
model's mask, without a mask of all tokens by all tokens. The mask is split into two problems:
- A: each token looks at the tokens before it and at itself, in its document and window.
- B: each image token looks at the image's later tokens. Read backwards, with queries moved on by one, that is
  a causal problem. Image of 3, tokens 0 1 2: query 1 sees key 2, query 0 sees keys 2 and 1.
A key of B is never outside the window, which has no end to the right. Both are merged by their log-sum-exp;
with the merged output and log-sum-exp, the backward pass of each gives its own share of the gradients.

Letters: H heads, T tokens of the pack, K width of a head, M queries of B.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from partwise.model.transfer import to_device
from partwise.records import Pack


class Stretches(NamedTuple):
    """Pieces that fill a tensor of tokens: where each starts, and the last one ends (int32); the longest."""

    starts: Tensor
    longest: int


@dataclass(frozen=True)
class PackLayout:
    """A Pack on the device, made once for all layers, in tensors alone: a compiled layer serves every pack.

    `table` (int32, on the device) is where documents start, where runs start, and the keys of B; `sizes`
    (on the host) tells them apart: the numbers of both and the longest of each.
    """

    pack: Pack
    table: Tensor
    sizes: Tensor

    @staticmethod
    def of(pack: Pack, device: torch.device) -> PackLayout:
        documents = [end - start for start, end in pack.documents]
        runs = [end - start - 1 for start, end in pack.image_runs]
        keys = [token for start, end in pack.image_runs for token in range(end - 1, start, -1)]
        table = torch.tensor([0, *accumulate(documents), 0, *accumulate(runs), *keys], dtype=torch.int32)
        sizes = torch.tensor([len(documents), max(documents), len(runs), max(runs, default=0)])
        return PackLayout(pack, to_device(table, device), sizes)


def read_layout(table: Tensor, sizes: Tensor) -> tuple[Stretches, Stretches, Tensor, Tensor]:
    """The stretches of A and of B, and the tokens of B: queries and keys, (M,)."""
    num_documents, longest, num_runs, longest_run = sizes.tolist()
    starts, run_starts, keys = table.tensor_split([num_documents + 1, num_documents + num_runs + 2])
    keys_M = keys.long()
    return Stretches(starts, longest), Stretches(run_starts, longest_run), keys_M - 1, keys_M


class Kernel(Protocol):
    """Causal attention within each stretch, (T, H, K) each; keys and values may have fewer heads.

    `window` is how many keys a query sees, itself included. The log-sum-exp of a row of scaled scores is
    (H, T).
    """

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, pieces: Stretches, scale: float, window: int | None
    ) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp."""

    def backward(
        self,
        gradient: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output: Tensor,
        lse: Tensor,
        pieces: Stretches,
        scale: float,
        window: int | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of query, key and value.

        Output and log-sum-exp may be over more keys than these: the gradients are then these keys' share.
        """


class FlashKernel:
    """The flash attention that torch brings with it."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, pieces: Stretches, scale: float, window: int | None
    ) -> tuple[Tensor, Tensor]:
        starts, longest = pieces
        output, lse, *_ = torch.ops.aten._flash_attention_forward(
            query,
            key,
            value,
            starts,
            starts,
            longest,
            longest,
            0.0,
            True,
            False,
            scale=scale,
            window_size_left=-1 if window is None else window - 1,
            window_size_right=0,
        )
        return output, lse

    def backward(
        self,
        gradient: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output: Tensor,
        lse: Tensor,
        pieces: Stretches,
        scale: float,
        window: int | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        starts, longest = pieces
        return torch.ops.aten._flash_attention_backward(
            gradient,
            query,
            key,
            value,
            output,
            lse,
            starts,
            starts,
            longest,
            longest,
            0.0,
            True,
            # The state of dropout: there is none, and nobody reads it.
            torch.empty(2, dtype=torch.uint64, device=query.device),
            torch.empty(0, device=query.device),
            scale=scale,
            window_size_left=-1 if window is None else window - 1,
            window_size_right=0,
        )


def merge(first: Tensor, first_lse: Tensor, second: Tensor, second_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp over the keys of both, from those over each; (M, H, K) and (H, M)."""
    lse = torch.logaddexp(first_lse, second_lse)
    weights = ((part - lse).exp().T[..., None] for part in (first_lse, second_lse))
    return sum(weight * part for weight, part in zip(weights, (first, second), strict=True)), lse


def attend_split(
    kernel: Kernel,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    table: Tensor,
    sizes: Tensor,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """A and B, merged: output (T, H, K) and log-sum-exp (H, T)."""
    documents, runs, queries, keys = read_layout(table, sizes)
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    output, lse = kernel.forward(query, key, value, documents, scale, window)
    if len(keys):
        later, later_lse = kernel.forward(query[queries], key[keys], value[keys], runs, scale, window=None)
        merged, merged_lse = merge(output[queries], lse[:, queries], later, later_lse)
        output.index_copy_(0, queries, merged.to(output.dtype))
        lse.index_copy_(1, queries, merged_lse)
    return output, lse


def differentiate_split(
    kernel: Kernel,
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    table: Tensor,
    sizes: Tensor,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value: the sums of what A and B give."""
    documents, runs, queries, keys = read_layout(table, sizes)
    gradient, query, key, value = (t.contiguous() for t in (gradient, query, key, value))
    shares = kernel.backward(gradient, query, key, value, output, lse, documents, scale, window)
    if len(keys):
        later = kernel.backward(
            gradient[queries],
            query[queries],
            key[keys],
            value[keys],
            output[queries],
            lse[:, queries].contiguous(),
            runs,
            scale,
            window=None,
        )
        for share, places, more in zip(shares, (queries, keys, keys), later, strict=True):
            share.index_add_(0, places, more)
    return shares


# As operators of torch, so that a compiled layer calls them without looking inside.
LAYOUT_SCHEMA = "Tensor table, Tensor sizes, float scale, int? window"
pack_attention = torch.library.custom_op(
    "partwise::pack_attention",
    partial(attend_split, FlashKernel()),
    mutates_args=(),
    device_types="cuda",
    schema=f"(Tensor query, Tensor key, Tensor value, {LAYOUT_SCHEMA}) -> (Tensor, Tensor)",
)
pack_attention_backward = torch.library.custom_op(
    "partwise::pack_attention_backward",
    partial(differentiate_split, FlashKernel()),
    mutates_args=(),
    device_types="cuda",
    schema="(Tensor gradient, Tensor query, Tensor key, Tensor value, Tensor output, Tensor lse, "
    f"{LAYOUT_SCHEMA}) -> (Tensor, Tensor, Tensor)",
)


@pack_attention.register_fake
def _shapes(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    num_tokens, num_heads, _width = query.shape
    dtype = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty(query.shape), query.new_empty(num_heads, num_tokens, dtype=dtype)


@pack_attention_backward.register_fake
def _gradient_shapes(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Any:
    return tuple(tensor.new_empty(tensor.shape) for tensor in (query, key, value))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, table, sizes, ctx.scale, ctx.window = inputs
    ctx.save_for_backward(query, key, value, *output, table, sizes)


def _differentiate(ctx: Any, gradient: Tensor, _of_lse: Tensor) -> Any:
    shares = pack_attention_backward(gradient, *ctx.saved_tensors, ctx.scale, ctx.window)
    return *shares, None, None, None, None


pack_attention.register_autograd(_differentiate, setup_context=_keep)
