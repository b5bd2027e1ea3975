"""AdamW whose moments rest in 8 bits between steps.

In: parameter groups as torch.optim.AdamW takes them. Out: the same update, made by torch's own fused kernel
in fp32, a piece of a tensor at a time; only what is kept of the moments is rounded. Of the second moment the
square root is kept: the squares span twice as many decades, more than 8-bit codes have. Small tensors keep
fp32 moments.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from partwise.model.codes import CODE_BLOCK, LEAST_CODED, decode, encode

PIECE = 1 << 24  # elements: what is computed from whole tensors takes little memory at a time

# The kinds of a tensor's state: its step count, and the moments in fp32, or what is kept of them in 8 bits.
PLAIN_KINDS = ("exp_avg", "exp_avg_sq")
PACKED_KINDS = ("exp_avg_codes", "exp_avg_scales", "root_codes", "root_scales")
STATE_KINDS = ("step", *PLAIN_KINDS, *PACKED_KINDS)


class PackedAdamW(torch.optim.AdamW):
    """AdamW with 8-bit moments for tensors of at least LEAST_CODED elements."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update of all tensors with a gradient; none, moments included, where `found_inf` is 1."""
        for group in self.param_groups:
            reached = [tensor for tensor in group["params"] if tensor.grad is not None]
            for tensor in reached:
                if not self.state[tensor]:
                    self.state[tensor] = new_state(tensor)
            small = [tensor for tensor in reached if "exp_avg" in self.state[tensor]]
            self._update_small(group, small)
            for tensor in reached:
                if "exp_avg" not in self.state[tensor]:
                    self._update_packed(group, tensor)

    def _update_small(self, group: dict[str, Any], tensors: list[Tensor]) -> None:
        states = [self.state[tensor] for tensor in tensors]
        steps, means, squares = ([state[kind] for state in states] for kind in ("step", *PLAIN_KINDS))
        self._update(group, tensors, [tensor.grad for tensor in tensors], means, squares, steps)

    def _update_packed(self, group: dict[str, Any], tensor: Tensor) -> None:
        state = self.state[tensor]
        pieces = zip(
            tensor.view(-1).split(PIECE),
            tensor.grad.reshape(-1).split(PIECE),
            packed_pieces(state),
            strict=True,
        )
        for piece, gradient, packed in pieces:
            mean, square = unpack(*packed)
            step = state["step"].clone()
            self._update(group, [piece], [gradient], [mean], [square], [step])
            for kept, new in zip(packed, pack(mean, square), strict=True):
                # Where nothing was updated, rounding once more would still change what is kept.
                kept.copy_(torch.where(self.found_inf > 0, kept, new))
        state["step"] = step

    def _update(self, group: dict[str, Any], *tensors: list[Any]) -> None:
        parameters, gradients, means, squares, steps = tensors
        beta1, beta2 = group["betas"]
        adamw(
            parameters,
            gradients,
            means,
            squares,
            [],
            steps,
            fused=True,
            found_inf=self.found_inf,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def is_packed(tensor: Tensor) -> bool:
    """Whether its moments are kept in 8 bits."""
    return tensor.numel() >= LEAST_CODED and tensor.dtype == torch.float32 and tensor.is_contiguous()


def new_state(tensor: Tensor) -> dict[str, Tensor]:
    """The state of a tensor before its first step."""
    step = torch.zeros((), dtype=torch.float32, device=tensor.device)
    if not is_packed(tensor):
        return {"step": step, "exp_avg": torch.zeros_like(tensor), "exp_avg_sq": torch.zeros_like(tensor)}
    state = {"step": step}
    num_blocks = -(-tensor.numel() // CODE_BLOCK)
    for kind, is_signed in (("exp_avg", True), ("root", False)):
        zero, _ = encode(torch.zeros(1, device=tensor.device), is_signed)
        state[f"{kind}_codes"] = zero.repeat(tensor.numel())
        state[f"{kind}_scales"] = torch.zeros(num_blocks, device=tensor.device)
    return state


def moments(state: dict[str, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """The two moments of one tensor in pieces: flat, fp32 as AdamW uses them."""
    if "exp_avg" in state:
        yield from zip(*(state[kind].reshape(-1).split(PIECE) for kind in PLAIN_KINDS), strict=True)
    else:
        yield from (unpack(*packed) for packed in packed_pieces(state))


def packed_pieces(state: dict[str, Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """Views of what is kept of the moments, PIECE elements at a time, in the order of PACKED_KINDS."""
    sizes = (PIECE, PIECE // CODE_BLOCK) * 2
    yield from zip(
        *(state[kind].split(size) for kind, size in zip(PACKED_KINDS, sizes, strict=True)), strict=True
    )


def pack(mean: Tensor, square: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What is kept of the moments, in the order of PACKED_KINDS."""
    root = square.sqrt_()
    root_codes, root_scales = encode(root, is_signed=False)
    # A divisor that is rounded to zero would make the next step as long as eps lets it be.
    root_codes.clamp_(min=(root > 0).to(torch.uint8))
    return (*encode(mean, is_signed=True), root_codes, root_scales)


def packed_state(mean: Tensor, square: Tensor) -> dict[str, Tensor]:
    """What is kept of the moments of a whole tensor, by kind."""
    return dict(zip(PACKED_KINDS, pack(mean, square), strict=True))


def unpack(
    mean_codes: Tensor, mean_scales: Tensor, root_codes: Tensor, root_scales: Tensor
) -> tuple[Tensor, Tensor]:
    root = decode(root_codes, root_scales, is_signed=False)
    return decode(mean_codes, mean_scales, is_signed=True), root.square_()
