"""Weights that rank 0 read -> all ranks, a tensor at a time.

In: on rank 0 the model with its weights, anywhere, and on the others the same modules on the meta device.
Out: parameters and buffers on each rank's device, with rank 0's values. A tensor that modules share is
received once and stays shared. What is made of a tensor before the next one comes, such as shards, is the
caller's business: so no rank need ever hold the whole model.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from partwise.engine.ranks import Ranks


class Receiver:
    """Of one model; each of its modules is received once. All ranks must ask for the same, in one order."""

    def __init__(self, model: nn.Module, ranks: Ranks, device: torch.device) -> None:
        self.device = device
        facts = tensor_facts(model)
        first = ranks.from_first(facts)
        assert not ranks.any(facts != first), f"not rank 0's model: {sorted(set(facts) ^ set(first))[:3]}"
        self.waiting = set(model.modules())
        self.arrived: dict[Tensor, Tensor] = {}

    def receive(self, module: nn.Module) -> None:
        """All tensors of the module, and of those in it, that were not received before."""
        for child in [child for child in module.modules() if child in self.waiting]:
            self.receive_buffers(child)
            for parameter in self.arriving(child):
                send_first(parameter)
            self.waiting.discard(child)

    def receive_buffers(self, module: nn.Module) -> None:
        """The module's own buffers."""
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = send_first(self._arrive(buffer))

    def arriving(self, module: nn.Module) -> Iterator[nn.Parameter]:
        """The module's own parameters on the device, those alone that are new; only rank 0's have values."""
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            is_new = parameter not in self.arrived
            module._parameters[name] = arrived = self._arrive(parameter)
            if is_new:
                yield arrived

    def _arrive(self, tensor: Any) -> Any:
        """The tensor on the device; in place of one on the meta device a new one, without values."""
        if tensor not in self.arrived:
            if not tensor.is_meta:
                tensor.data = tensor.data.to(self.device).contiguous()
                arrived = tensor
            else:
                arrived = torch.empty(tensor.shape, dtype=tensor.dtype, device=self.device)
                if isinstance(tensor, nn.Parameter):
                    arrived = nn.Parameter(arrived, tensor.requires_grad)
            self.arrived[tensor] = arrived
        return self.arrived[tensor]


def send_first(tensor: Tensor) -> Tensor:
    """The tensor with rank 0's values."""
    dist.broadcast(tensor.data.view(-1).view(torch.uint8), 0)
    return tensor


def tensor_facts(model: nn.Module) -> list[tuple[str, str, tuple[int, ...]]]:
    """What must be the same on all ranks before values are sent: names, types, shapes; tied tensors once."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return [(name, str(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors]
