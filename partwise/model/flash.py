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
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from partwise.records import Pack


class Stretches(NamedTuple):
    """Pieces that fill a tensor of tokens: where each starts, and the last one ends (int32); the longest."""

    starts: Tensor
    longest: int


@dataclass(frozen=True)
class PackLayout:
    """A Pack on the device, made once for all layers. `queries` and `keys` (M,) are the tokens of B."""

    pack: Pack
    documents: Stretches
    runs: Stretches
    queries: Tensor
    keys: Tensor

    @staticmethod
    def of(pack: Pack, device: torch.device) -> PackLayout:
        keys = [token for start, end in pack.image_runs for token in range(end - 1, start, -1)]
        keys_M = torch.tensor(keys, dtype=torch.long).to(device, non_blocking=True)
        documents = stretches([end - start for start, end in pack.documents], device)
        runs = stretches([end - start - 1 for start, end in pack.image_runs], device)
        return PackLayout(pack, documents, runs, keys_M - 1, keys_M)


def stretches(lengths: list[int], device: torch.device) -> Stretches:
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    return Stretches(starts.to(device, non_blocking=True), max(lengths, default=0))


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


class PackAttention(torch.autograd.Function):
    """A and B, merged: (T, H, K)."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout: PackLayout,
        scale: float,
        window: int | None,
        kernel: Kernel,
    ) -> Tensor:
        output, lse = kernel.forward(query, key, value, layout.documents, scale, window)
        if layout.pack.image_runs:
            queries, keys = layout.queries, layout.keys
            later, later_lse = kernel.forward(
                query[queries], key[keys], value[keys], layout.runs, scale, window=None
            )
            merged, merged_lse = merge(output[queries], lse[:, queries], later, later_lse)
            output.index_copy_(0, queries, merged.to(output.dtype))
            lse.index_copy_(1, queries, merged_lse)
        ctx.save_for_backward(query, key, value, output, lse)
        ctx.layout, ctx.scale, ctx.window, ctx.kernel = layout, scale, window, kernel
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        query, key, value, output, lse = ctx.saved_tensors
        layout, scale, kernel = ctx.layout, ctx.scale, ctx.kernel
        gradient = gradients[0].contiguous()
        shares = kernel.backward(
            gradient, query, key, value, output, lse, layout.documents, scale, ctx.window
        )
        if layout.pack.image_runs:
            queries, keys = layout.queries, layout.keys
            later = kernel.backward(
                gradient[queries],
                query[queries],
                key[keys],
                value[keys],
                output[queries],
                lse[:, queries].contiguous(),
                layout.runs,
                scale,
                window=None,
            )
            for share, places, more in zip(shares, (queries, keys, keys), later, strict=True):
                share.index_add_(0, places, more)
        return (*shares, None, None, None, None)


def merge(first: Tensor, first_lse: Tensor, second: Tensor, second_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp over the keys of both, from those over each; (M, H, K) and (H, M)."""
    lse = torch.logaddexp(first_lse, second_lse)
    weights = ((part - lse).exp().T[..., None] for part in (first_lse, second_lse))
    return sum(weight * part for weight, part in zip(weights, (first, second), strict=True)), lse
