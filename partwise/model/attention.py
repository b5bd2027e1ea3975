"""Attention within each document of a pack, without a mask of all tokens by all tokens.

In: queries, keys and values of a row of several documents, and where these and their images lie. Out: what
attention gives for each document alone, with the model's own mask: causal, in a window where the layer has
one, and in both directions within each image of Gemma-3. Rows that are no pack get transformers' own masks
and SDPA. It is registered with transformers under PACKED; models are not changed otherwise.

On a GPU in 16 bits the mask is split into two problems that flash attention solves exactly:
- A: each token looks at the tokens before it and at itself, in its document and window.
- B: each image token looks at the image's later tokens. Read backwards, with queries moved on by one, that is
  a causal problem. Image of 3, tokens 0 1 2: query 1 sees key 2, query 0 sees keys 2 and 1.
A key of B is never outside the window, which has no end to the right. Both are merged by their log-sum-exp;
with the merged output and log-sum-exp, the backward pass of each gives its own share of the gradients.

Letters: B rows (1), H heads, T tokens of the pack, K width of a head, M queries of B.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from partwise.families import PACKED_TYPES
from partwise.records import Example, Pack

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

PACKED = "partwise_packed"
FLASH_DTYPES = (torch.bfloat16, torch.float16)
MAX_FLASH_WIDTH = 256


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


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    pack: PackLayout | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: (B, H, T, K) each -> (B, T, H, K). `pack` is from the step."""
    if pack is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if not dropout and suits_flash(query):
        rows = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        return PackAttention.apply(*rows, pack, scale, sliding_window, FlashKernel())[None], None
    return attend_documents(query, key, value, pack.pack, scale, sliding_window, dropout), None


def suits_flash(query: Tensor) -> bool:
    width = query.shape[-1]
    return query.is_cuda and query.dtype in FLASH_DTYPES and width % 8 == 0 and width <= MAX_FLASH_WIDTH


def attend_documents(
    query: Tensor, key: Tensor, value: Tensor, pack: Pack, scale: float, window: int | None, dropout: float
) -> Tensor:
    """One document after the other: on a CPU, in fp32, or with dropout. (B, T, H, K)."""
    outputs = [
        scaled_dot_product_attention(
            query[:, :, start:end],
            key[:, :, start:end],
            value[:, :, start:end],
            attn_mask=(mask := document_mask(pack, start, end, window, query.device)),
            is_causal=mask is None,
            dropout_p=dropout,
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        for start, end in pack.documents
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2)


def document_mask(
    pack: Pack, start: int, end: int, window: int | None, device: torch.device
) -> Tensor | None:
    """Which keys each query of the document sees, (length, length); None where that is plainly causal."""
    length = end - start
    runs = [(first - start, last - start) for first, last in pack.image_runs if start <= first < end]
    is_cut = window is not None and window < length
    if not runs and not is_cut:
        return None
    mask = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    for first, last in runs:
        mask[first:last, first:last] = True
    return mask.triu(1 - window) if window is not None else mask


AttentionInterface.register(PACKED, attend)
AttentionMaskInterface.register(PACKED, sdpa_mask)


def packing_obstacle(config: PreTrainedConfig, attention: str) -> str:
    """Why rows of a model cannot be packed under `model.attention`; "" where they can."""
    decoder = config.get_text_config()
    types = {config.model_type, decoder.model_type}
    if not types <= PACKED_TYPES or getattr(config, "auto_map", None):
        return f"Partwise does not have the attention mask of {config.model_type} models for packs"
    if getattr(decoder, "use_bidirectional_attention", False):
        return "its decoder looks at later tokens"
    if getattr(decoder, "attn_logit_softcapping", None) is not None:
        return "its decoder squashes the scores of attention"
    return "" if attention == "sdpa" else f"model.attention is {attention}"


def use_packed_attention(model: PreTrainedModel) -> None:
    """The decoder attends by PACKED; towers keep their own attention."""
    has_towers = "text_config" in model.config.sub_configs
    model.set_attn_implementation({"text_config": PACKED} if has_towers else PACKED)


def takes_packs(model: PreTrainedModel) -> bool:
    return model.config.get_text_config()._attn_implementation == PACKED


def plain_attention(model: PreTrainedModel) -> str:
    """The model's attention as plain transformers knows it, for rows that are no pack."""
    used = model.config._attn_implementation
    return "sdpa" if used == PACKED else used


def grid_positions(model: PreTrainedModel, example: Example) -> Tensor:
    """The example's positions along time, height and width, (3, 1, T), from the model's own rule.

    `model` may be on the meta device: only its config is read.
    """
    grids = {name: value for name, value in example.media.items() if name.endswith("_grid_thw")}
    if not grids:
        return torch.arange(len(example.input_ids)).expand(3, 1, -1)
    fields = {name: field[None] for name, field in example.token_fields.items()}
    return model.base_model.get_rope_index(example.input_ids[None], **fields, **grids)[0]
