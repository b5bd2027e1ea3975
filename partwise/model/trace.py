"""How many bytes a part keeps for its backward pass: counted in a forward pass on the meta device.

In: a model on the meta device with the plan applied, and the shape of one row. Out: the bytes that autograd
saves, weights not counted. No weight is read and nothing is computed: tensors have shapes alone. Kernels of
attention do not run there, so a stand-in names what they keep. What the allocator adds is not counted.

Letters: B rows, H heads, T tokens, S tokens that are looked at, K width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from partwise.model.tower import attention_setting

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class KeepAttention(torch.autograd.Function):
    """An attention of shapes alone, which keeps what a real kernel keeps for its backward pass.

    `has_mask`: the kernel turns a dense mask into one of the weights' type, in each layer anew.
    """

    @staticmethod
    def forward(
        ctx: Any, query_BHTK: Tensor, key_BHSK: Tensor, value_BHSK: Tensor, is_eager: bool, has_mask: bool
    ) -> Tensor:
        output_BHTK = torch.empty_like(query_BHTK)
        scores_BHTS = query_BHTK.new_empty(*query_BHTK.shape[:3], key_BHSK.shape[2])
        if is_eager:
            extra = [scores_BHTS.float(), scores_BHTS]
        else:
            extra = [query_BHTK.new_empty(query_BHTK.shape[:3], dtype=torch.float32), output_BHTK]
        if has_mask and not is_eager:
            extra.append(torch.empty_like(scores_BHTS[:, 0]))
        ctx.save_for_backward(query_BHTK, key_BHSK, value_BHSK, *extra)
        return output_BHTK

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise NotImplementedError("attention of shapes alone has no backward pass")


def keep_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, None]:
    return attend(module, query, key, value, is_eager=False), None


def keep_eager_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, None]:
    return attend(module, query, key, value, is_eager=True), None


def keep_packed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, None]:
    """Flash attention over packs takes no mask, and shared keys as they are."""
    return KeepAttention.apply(query, key, value, False, False).transpose(1, 2), None


def attend(module: nn.Module, query_BHTK: Tensor, key: Tensor, value: Tensor, is_eager: bool) -> Tensor:
    """Keys and values are copied to the heads that share them, as both kernels have it under a mask.

    A decoder has a mask where rows are padded or hold images; the attention of a tower has none.
    """
    num_shared = query_BHTK.shape[1] // key.shape[1]
    if num_shared > 1:
        key, value = (t.repeat_interleave(num_shared, dim=1) for t in (key, value))
    has_mask = getattr(module, "is_causal", True)
    return KeepAttention.apply(query_BHTK, key, value, is_eager, has_mask).transpose(1, 2)


ATTENTIONS = {"sdpa": "partwise_keep", "eager": "partwise_keep_eager", "packed": "partwise_keep_packed"}
AttentionInterface.register(ATTENTIONS["sdpa"], keep_attention)
AttentionInterface.register(ATTENTIONS["eager"], keep_eager_attention)
AttentionInterface.register(ATTENTIONS["packed"], keep_packed_attention)


def saved_bytes(model: PreTrainedModel, run: Callable[[], Tensor]) -> int:
    """Bytes that the backward pass of `run` would read, each storage once, without parameters and buffers."""
    seen = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    kept: list[Tensor] = []  # while they live, no other storage takes their identity
    total = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal total
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            kept.append(tensor.detach())
            total += storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept.append(run())
    return total


@contextmanager
def counted_attention(model: PreTrainedModel, attention: str) -> Iterator[None]:
    """A block in which the model's attention is the stand-in of `attention`."""
    before = model.config._attn_implementation
    model.set_attn_implementation(attention_setting(model, ATTENTIONS[attention]))
    try:
        yield
    finally:
        model.set_attn_implementation(attention_setting(model, before))


def decoder_bytes(model: PreTrainedModel, num_tokens: int, learns_below: bool, attention: str) -> int:
    """Bytes that the decoder keeps for one row. `learns_below`: a gradient leaves through its inputs."""
    width = model.get_input_embeddings().weight.shape[1]
    inputs = torch.empty(1, num_tokens, width, dtype=model.dtype, device="meta", requires_grad=learns_below)
    decoder = model.get_decoder()
    with counted_attention(model, attention):
        return saved_bytes(model, lambda: decoder(inputs_embeds=inputs, use_cache=False).last_hidden_state)


def tower_bytes(model: PreTrainedModel, pixel_shape: tuple[int, ...], attention: str) -> int:
    """Bytes that an image tower, all of it open, keeps for one tile of (channels, height, width)."""
    pixels = torch.empty(1, *pixel_shape, dtype=model.dtype, device="meta", requires_grad=True)
    tower = model.get_encoder("image")
    with counted_attention(model, attention):
        return saved_bytes(model, lambda: tower(pixel_values=pixels).last_hidden_state)
