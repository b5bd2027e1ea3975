"""A model that rank 0 has -> the same model in ZeRO-3's shards on all ranks.

In: on rank 0 the model, on the others the same modules on the meta device. Out: on every rank the same
parameters, of which it holds a shard each. No rank ever has more than one whole tensor on its device. Modules
that are kept whole lie on all ranks, out of DeepSpeed's sight: it waits in each module for all ranks, so it
must not know one that a rank may skip.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn


def partition(
    model: nn.Module, kept_whole: Sequence[nn.Module], device: torch.device, config: dict[str, Any]
) -> None:
    """Partition the model's parameters, except those of `kept_whole`. All ranks must call it."""
    for module in model.modules():
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = receive(arrive(buffer, device))
    for parameter in arriving((module for root in kept_whole for module in root.modules()), device):
        receive(parameter)
    with hidden(model, kept_whole):
        deepspeed.zero.Init(module=Arriving(list(model.modules()), device), config_dict_or_path=config)


@contextmanager
def hidden(model: nn.Module, modules: Sequence[nn.Module]) -> Iterator[None]:
    """A block in which these modules are not part of the model."""
    hidden_ids = {id(module) for module in modules}
    places = [
        (parent, key, child)
        for parent in model.modules()
        for key, child in parent._modules.items()
        if id(child) in hidden_ids
    ]
    for parent, key, _ in places:
        parent._modules[key] = None
    try:
        yield
    finally:
        for parent, key, child in places:
            parent._modules[key] = child


class Arriving(nn.Module):
    """The parameters of some modules for DeepSpeed: each arrives when the one before is in shards."""

    def __init__(self, modules: list[nn.Module], device: torch.device) -> None:
        super().__init__()
        self.arriving = lambda: arriving(modules, device)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        return self.arriving()


def arriving(modules: Iterable[nn.Module], device: torch.device) -> Iterator[nn.Parameter]:
    """Each parameter once, on the device; tied ones stay tied. Only rank 0's have their values."""
    arrived: dict[nn.Parameter, nn.Parameter] = {}
    for module in modules:
        for key, parameter in module._parameters.items():
            if parameter is None:
                continue
            if parameter not in arrived:
                arrived[parameter] = arrive(parameter, device)
                yield arrived[parameter]
            module._parameters[key] = arrived[parameter]


def arrive(tensor: Any, device: torch.device) -> Any:
    """The tensor, on the device; in place of one on the meta device a new one, without values."""
    if not tensor.is_meta:
        tensor.data = tensor.data.to(device).contiguous()
        return tensor
    new = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    return nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new


def receive(tensor: Tensor) -> Tensor:
    """The tensor with rank 0's values."""
    dist.broadcast(tensor.data.view(-1).view(torch.uint8), 0)
    return tensor
