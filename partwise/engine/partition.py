"""A model that rank 0 has -> the same model in ZeRO-3's shards on all ranks.

In: on rank 0 the model, on the others the same modules on the meta device. Out: on every rank the same
parameters, of which it holds a shard each. No rank ever has more than one whole tensor on its device. Modules
that are kept whole lie on all ranks, out of DeepSpeed's sight: it waits in each module for all ranks, so it
must not know one that a rank may skip.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
from torch import nn

from partwise.engine.ranks import Ranks
from partwise.engine.receive import Receiver


def partition(
    model: nn.Module,
    kept_whole: Sequence[nn.Module],
    ranks: Ranks,
    device: torch.device,
    config: dict[str, Any],
) -> None:
    """Partition the model's parameters, except those of `kept_whole`. All ranks must call it."""
    receiver = Receiver(model, ranks, device)
    for module in kept_whole:
        receiver.receive(module)
    with hidden(model, kept_whole):
        modules = list(model.modules())
        for module in modules:
            receiver.receive_buffers(module)
        deepspeed.zero.Init(module=Arriving(receiver, modules), config_dict_or_path=config)


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

    def __init__(self, receiver: Receiver, modules: list[nn.Module]) -> None:
        super().__init__()
        self.arriving = lambda: (p for module in modules for p in receiver.arriving(module))

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        return self.arriving()
