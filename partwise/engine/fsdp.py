"""torch's FSDP2: weights, gradients, masters and moments in shards, gathered a layer at a time.

In: on rank 0 the model, on the others the same on the meta device. Each decoder layer is a unit, so is each
block of a vision tower that trains; embeddings, head and what else remains are the root's. Weights that
train are held in fp32 and are their own masters; they are gathered in the type of the run and their gradients
summed in fp32. A vision side that is wholly frozen stays whole on each rank: one without an image skips it.
With `offload`, shards and their gradients lie on the host, and so do the masters and AdamW's moments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from partwise.engine.ranks import Ranks
from partwise.engine.receive import Receiver
from partwise.engine.single import Engine, Stretch, frozen_vision
from partwise.model.find import find_parts
from partwise.model.head import TokenLoss

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from partwise.records import PartsPlan


class Fsdp(Engine):
    name = "fsdp"
    runs_together = True
    shards_masters = True
    shards_weights = True
    device: torch.device  # that runs the model and talks to other ranks, wherever the shards lie

    def __init__(self, ranks: Ranks | None = None, offload: bool = False) -> None:
        super().__init__(ranks)
        self.offload = offload

    @property
    def num_sharing(self) -> int:
        return mesh_shape(self.ranks.size, self.ranks.local_size)[-1]

    def spread(
        self, model: PreTrainedModel, plan: PartsPlan, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.dtype, self.device = dtype, device
        self.runs_vision = plan.trains_vision
        self.mesh = make_mesh(self.ranks.size, self.ranks.local_size, device)
        receiver = Receiver(model, self.ranks, device)
        whole = set()
        for module in frozen_vision(model, plan):
            receiver.receive(module)
            whole |= set(module.parameters())
        settings: dict[str, Any] = {
            "mesh": self.mesh,
            "mp_policy": MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False),
            "ignored_params": whole,
            "offload_policy": offload_policy(device) if self.offload else OffloadPolicy(),
        }
        for unit in units(model, self.runs_vision):
            receiver.receive(unit)
            widen(unit)
            fully_shard(unit, **settings)
        receiver.receive(model)
        widen(model)
        self.net = fully_shard(TokenLoss(model), **settings)

    def loss_sum(self, model: PreTrainedModel, inputs: dict[str, Any], labels: Tensor) -> Tensor:
        return self._forward(inputs, labels)

    def token_losses(self, model: PreTrainedModel, inputs: dict[str, Any], labels: Tensor) -> Tensor:
        return self._forward(inputs, labels, each=True)

    def logits(self, model: PreTrainedModel, inputs: dict[str, Any]) -> Tensor:
        return self._forward(inputs, None)

    def _forward(self, inputs: dict[str, Any], labels: Tensor | None, each: bool = False) -> Tensor:
        result = self.net(inputs, labels, each)
        if not torch.is_grad_enabled():
            self._reshard()  # the root waits for a backward pass that does not come
        return result

    def _reshard(self) -> None:
        for module in self.net.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def backward(self, loss: Tensor) -> None:
        # Gradients are averaged over ranks, not summed.
        super().backward(loss * self.ranks.size)

    def make_masters(
        self, parameters: Mapping[str, nn.Parameter], make_adamw: Callable[[Mapping[str, Tensor]], Any]
    ) -> tuple[dict[str, Tensor], Any]:
        self.parameters = parameters
        masters = {name: self.local(parameter) for name, parameter in parameters.items()}
        return masters, make_adamw(masters)

    def finish_gradients(self, masters: Mapping[str, Tensor]) -> set[str]:
        self._reshard()  # a unit of which nothing trains is not resharded by its backward pass
        reached = {name for name, parameter in self.parameters.items() if parameter.grad is not None}
        for name in reached:
            masters[name].grad = self.local(self.parameters[name].grad)
            self.parameters[name].grad = None
        return reached

    def stretch(self, name: str, parameter: nn.Parameter) -> Stretch:
        if not isinstance(parameter, DTensor):
            return super().stretch(name, parameter)
        _, offsets = compute_local_shape_and_global_offset(
            parameter.shape, parameter.device_mesh, parameter.placements
        )
        row = parameter.shape.numel() // max(1, parameter.shape[0])
        return Stretch(offsets[0] * row, tuple(parameter.shape))

    def write_weights(self, parameters: Sequence[nn.Parameter], masters: Sequence[Tensor]) -> None:
        """Nothing: the master is the weight's own memory."""

    def total(self, values: Tensor) -> Tensor:
        total = self.ranks.sum(values.to(self.device), self.mesh.get_group(self.mesh.ndim - 1))
        return total.to(values.device)

    def total_norms(self, norms: Tensor) -> Tensor:
        return self.total(norms.double() ** 2).sqrt().to(norms.dtype)

    def local(self, tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor

    def whole(self, tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        if not isinstance(tensor, DTensor):
            return tensor.cpu()
        whole = tensor.to(self.device).full_tensor()
        return (whole.to(self.dtype) if whole.is_floating_point() else whole).cpu()


def offload_policy(device: torch.device) -> OffloadPolicy:
    """Shards on the host. Each backward pass ends with their gradients there: FSDP2 waits for the copies."""
    return CPUOffloadPolicy(pin_memory=device.type == "cuda")


def make_mesh(size: int, local_size: int, device: torch.device) -> DeviceMesh:
    shape = mesh_shape(size, local_size)
    return init_device_mesh(device.type, shape, mesh_dim_names=("copies", "shards")[-len(shape) :])


def mesh_shape(size: int, local_size: int) -> tuple[int, ...]:
    """Shards within a node, copies across nodes; on one node, or on nodes of one rank, shards over all."""
    if 1 < local_size < size and size % local_size == 0:
        return size // local_size, local_size
    return (size,)


def units(model: PreTrainedModel, with_vision: bool) -> Iterator[nn.Module]:
    """The blocks that are gathered one at a time."""
    for part, found in find_parts(model).items():
        if part == "language_model" or with_vision:
            yield from (model.get_submodule(path) for _, path in found.layers)


def widen(module: nn.Module) -> None:
    """Weights that train in fp32."""
    for parameter in module.parameters():
        if parameter.requires_grad and not isinstance(parameter, DTensor):
            parameter.data = parameter.data.float()
