"""How many bytes a part keeps for its backward pass: counted in a forward pass on the meta device.

In: a model on the meta device with the plan applied, and the shape of one row. Out: the bytes that autograd
saves, or a compiled layer, weights not counted. No weight is read and nothing is computed: tensors have
shapes alone. Kernels of attention do not run there, so a stand-in names what they keep. What the allocator
adds is not counted.

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


class Ledger:
    """Bytes of storages that are kept, each counted once; weights and buffers of the model count nothing."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.seen = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
        self.held: list[Tensor] = []  # while they live, no other storage takes their identity
        self.num_bytes = 0

    def add(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.seen:
            self.seen.add(storage._cdata)
            self.held.append(tensor.detach())
            self.num_bytes += storage.nbytes()
        return tensor

    def keep(self, *tensors: Tensor) -> None:
        """Those that a gradient goes through."""
        for tensor in tensors:
            if tensor.requires_grad:
                self.add(tensor)


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
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    return attend(module, query, key, value, is_eager=False, **kwargs), None


def keep_eager_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    return attend(module, query, key, value, is_eager=True, **kwargs), None


def keep_packed_attention(
    _module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *_: Any,
    ledger: Ledger | None = None,
    **__: Any,
) -> tuple[Tensor, None]:
    """Flash attention over packs takes no mask, and shared keys as they are."""
    output = KeepAttention.apply(query, key, value, False, False)
    if ledger is not None:
        ledger.keep(query, key, value, output)
    return output.transpose(1, 2), None


def attend(
    module: nn.Module,
    query_BHTK: Tensor,
    key: Tensor,
    value: Tensor,
    is_eager: bool,
    ledger: Ledger | None = None,
    **_: Any,
) -> Tensor:
    """Keys and values are copied to the heads that share them, as both kernels have it under a mask.

    A decoder has a mask where rows are padded or hold images; the attention of a tower has none.
    """
    num_shared = query_BHTK.shape[1] // key.shape[1]
    if num_shared > 1:
        key, value = (t.repeat_interleave(num_shared, dim=1) for t in (key, value))
    has_mask = getattr(module, "is_causal", True)
    output = KeepAttention.apply(query_BHTK, key, value, is_eager, has_mask)
    if ledger is not None:
        ledger.keep(query_BHTK, key, value, output)
    return output.transpose(1, 2)


ATTENTIONS = {"sdpa": "partwise_keep", "eager": "partwise_keep_eager", "packed": "partwise_keep_packed"}
AttentionInterface.register(ATTENTIONS["sdpa"], keep_attention)
AttentionInterface.register(ATTENTIONS["eager"], keep_eager_attention)
AttentionInterface.register(ATTENTIONS["packed"], keep_packed_attention)


def saved_bytes(model: PreTrainedModel, run: Callable[[], Tensor]) -> int:
    """Bytes that the backward pass of `run` would read, each storage once, without parameters and buffers."""
    ledger = Ledger(model)
    with torch.autograd.graph.saved_tensors_hooks(ledger.add, lambda tensor: tensor):
        ledger.held.append(run())
    return ledger.num_bytes


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
    inputs, decoder = decoder_inputs(model, num_tokens, learns_below), model.get_decoder()
    with counted_attention(model, attention):
        return saved_bytes(model, lambda: decoder(inputs_embeds=inputs, use_cache=False).last_hidden_state)


def decoder_inputs(model: PreTrainedModel, num_tokens: int, learns_below: bool) -> Tensor:
    width = model.get_input_embeddings().weight.shape[1]
    return torch.empty(1, num_tokens, width, dtype=model.dtype, device="meta", requires_grad=learns_below)


def compiled_decoder_bytes(
    model: PreTrainedModel, num_tokens: int, learns_below: bool, attention: str
) -> int:
    """The same where layers are compiled: what goes into linear layers and attention, and comes out of them.

    The compiler computes again what lies between, from these and from the two sums that go through a layer.
    """
    ledger, inputs, decoder = (
        Ledger(model),
        decoder_inputs(model, num_tokens, learns_below),
        model.get_decoder(),
    )

    def keep_both(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        ledger.keep(args[0], output)

    def keep_sums(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        ledger.keep(args[0], torch.empty_like(args[0], requires_grad=args[0].requires_grad))

    handles = [module.register_forward_hook(keep_both) for module in outer_linears(decoder)]
    handles += [layer.register_forward_pre_hook(keep_sums) for layer in decoder.layers]
    try:
        with counted_attention(model, attention):
            decoder(inputs_embeds=inputs, use_cache=False, ledger=ledger)
    finally:
        for handle in handles:
            handle.remove()
    return ledger.num_bytes


def outer_linears(module: nn.Module) -> list[nn.Module]:
    """Linear layers, those with adapters as one: the sums that adapters make are not kept."""
    outer = {path: m for path, m in module.named_modules() if hasattr(m, "base_layer")}
    plain = {path: m for path, m in module.named_modules() if isinstance(m, nn.Linear)}
    inside = [path for path in plain if any(path.startswith(f"{other}.") for other in outer)]
    return [*outer.values(), *(m for path, m in plain.items() if path not in inside)]


def tower_bytes(model: PreTrainedModel, pixel_shape: tuple[int, ...], attention: str) -> int:
    """Bytes that an image tower, all of it open, keeps for one tile of (channels, height, width)."""
    pixels = torch.empty(1, *pixel_shape, dtype=model.dtype, device="meta", requires_grad=True)
    tower = model.get_encoder("image")
    with counted_attention(model, attention):
        return saved_bytes(model, lambda: tower(pixel_values=pixels).last_hidden_state)
