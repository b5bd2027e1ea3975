"""What a step asks of the way in which weights and gradients lie on the ranks.

`Engine` is one process that holds everything; the others override what is different for them. A master is
what AdamW updates on this rank: a whole tensor, or this rank's shard of one. A shard is always a stretch of
the flattened tensor, so that a checkpoint of one engine is read by every other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from partwise.engine.ranks import Ranks
from partwise.model.compile import uncompiled
from partwise.model.find import contains
from partwise.model.head import TokenLoss

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from partwise.records import PartsPlan


class Stretch(NamedTuple):
    """Where a shard begins in its flattened tensor, and that tensor's shape."""

    start: int
    shape: tuple[int, ...]


class Engine:
    """One process. `model` and `plan` are known from `spread` on, in engines that spread."""

    name = "single"
    runs_together = False  # whether all ranks must run the same modules, micro-batch by micro-batch
    runs_vision = False  # whether the vision side is one of them
    shards_masters = False  # whether a rank has shards of what AdamW updates
    shards_weights = False  # whether a rank alone cannot run the model
    dtype: torch.dtype | None = None  # that the model runs in, where its weights have another
    device: torch.device | None = None  # and where, for the same reason

    def __init__(self, ranks: Ranks | None = None) -> None:
        self.ranks = ranks or Ranks()

    @property
    def num_sharing(self) -> int:
        """Ranks that share one copy of what is in shards."""
        return self.ranks.size

    def spread(
        self, model: PreTrainedModel, plan: PartsPlan, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Put the model, with its plan applied, the way the engine trains it.

        Where weights are sharded, rank 0 has them, anywhere, and the others have a model on the meta device.
        """

    def loss_sum(self, model: PreTrainedModel, inputs: dict[str, Any], labels: Tensor) -> Tensor:
        """The summed token loss of one micro-batch, with its graph."""
        return TokenLoss(model)(inputs, labels)

    def token_losses(self, model: PreTrainedModel, inputs: dict[str, Any], labels: Tensor) -> Tensor:
        """The loss of each target token of one micro-batch, row by row, with its graph."""
        return TokenLoss(model)(inputs, labels, each=True)

    def logits(self, model: PreTrainedModel, inputs: dict[str, Any]) -> Tensor:
        """The model's own logits. Where weights are sharded, all ranks must call it."""
        with uncompiled():
            return model(**inputs).logits

    def backward(self, loss: Tensor) -> None:
        """Gradients of one micro-batch's share of the loss.

        Text-only rows have no graph when only the vision side trains.
        """
        if loss.grad_fn is not None:
            loss.backward()

    def make_masters(
        self, parameters: Mapping[str, nn.Parameter], make_adamw: Callable[[Mapping[str, Tensor]], Any]
    ) -> tuple[dict[str, Tensor], Any]:
        """The masters by name, and the AdamW that was made of them."""
        masters = {name: make_master(parameter) for name, parameter in parameters.items()}
        return masters, make_adamw(masters)

    def finish_gradients(self, masters: Mapping[str, Tensor]) -> set[str]:
        """Gradients summed over ranks, in the masters' grad; the names that have one on any rank."""
        return {name for name, master in masters.items() if master.grad is not None}

    def update(self, adamw: Any, masters: Mapping[str, Tensor], max_grad_norm: float, norm: Tensor) -> None:
        """Clip by the global norm and update; gradients are gone afterwards."""
        torch.nn.utils.clip_grads_with_norm_(masters.values(), max_grad_norm, norm)
        adamw.step()

    def state(self, adamw: Any, name: str, master: Tensor) -> dict[str, Tensor]:
        """AdamW's state of this rank's shard: step count and moments; empty before the first update."""
        return adamw.state.get(master, {})

    def load_state(self, adamw: Any, name: str, master: Tensor, state: dict[str, Tensor]) -> None:
        """Put a saved state in the place of AdamW's."""
        adamw.state[master] = state

    def stretch(self, name: str, parameter: nn.Parameter) -> Stretch:
        """Which part of the parameter this rank's master is."""
        return Stretch(0, tuple(parameter.shape))

    def write_weights(self, parameters: Sequence[nn.Parameter], masters: Sequence[Tensor]) -> None:
        """Round masters into the weights that the model runs with."""
        pairs = [pair for pair in zip(parameters, masters, strict=True) if pair[0] is not pair[1]]
        if pairs:
            torch._foreach_copy_(*map(list, zip(*pairs, strict=True)))

    def finish_load(self) -> None:
        """Called once after masters were loaded: what `write_weights` leaves to do for all together."""

    def total(self, values: Tensor) -> Tensor:
        """Sums over all shards of what was counted on this rank's, on the device."""
        return values

    def total_norms(self, norms: Tensor) -> Tensor:
        """Norms over all shards of what has these norms on this rank's."""
        return norms

    def local(self, tensor: Tensor) -> Tensor:
        """The numbers of a parameter or buffer that lie on this rank."""
        return tensor.detach()

    def whole(self, tensor: Tensor) -> Tensor:
        """The whole parameter or buffer. Where weights are sharded, a copy; all ranks must ask for it."""
        return tensor.detach()


def frozen_vision(model: nn.Module, plan: PartsPlan) -> list[nn.Module]:
    """The outermost modules of a vision side of which nothing trains; none where some of it does.

    A bare parameter of another module stays with that one.
    """
    if plan.trains_vision:
        return []
    modules = dict(model.named_modules())
    paths = [path for part in plan.parts if part.part != "language_model" for path in part.module_paths]
    return [
        modules[path]
        for path in paths
        if path in modules and not any(other != path and contains(other, path) for other in paths)
    ]


def make_master(parameter: nn.Parameter) -> Tensor:
    """The tensor that the optimizer updates: the parameter itself, or an fp32 copy of a 16-bit one.

    A copy collects gradients in fp32 as each backward pass makes them, and the 16-bit gradient is freed.
    """
    if parameter.dtype.itemsize >= 4:
        return parameter
    master = parameter.detach().float()

    def move_gradient(parameter: Tensor) -> None:
        if master.grad is None:
            master.grad = parameter.grad.float()
        else:
            master.grad += parameter.grad
        parameter.grad = None

    parameter.register_post_accumulate_grad_hook(move_gradient)
    return master
