"""Attention within each document of a pack, without a mask of all tokens by all tokens.

In: queries, keys and values of a row of several documents, and where these and their images lie. Out: what
attention gives for each document alone, with the model's own mask: causal, in a window where the layer has
one, and in both directions within each image of Gemma-3. Rows that are no pack get transformers' own masks
and SDPA. It is registered with transformers under PACKED; models are not changed otherwise.

On a GPU in 16 bits that is flash attention over the whole pack (flash.py), elsewhere one document after the
other.

Letters: B rows (1), H heads, T tokens of the pack, K width of a head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from partwise.families import PACKED_TYPES
from partwise.model.flash import PackLayout, pack_attention
from partwise.records import Pack

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

PACKED = "partwise_packed"
FLASH_DTYPES = (torch.bfloat16, torch.float16)
MAX_FLASH_WIDTH = 256


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
        return pack_attention(*rows, pack.table, pack.sizes, scale, sliding_window)[0][None], None
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
