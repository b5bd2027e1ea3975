"""Weights that one rank read -> all ranks, a module at a time.

In: on rank 0 the model with its weights, on every other the same model on the meta device. Out: the module's
parameters and buffers on each rank's device, as rank 0 has them. No rank but the first ever holds more of the
model than the module that is being received and what was made of those before it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from partwise.engine.ranks import Ranks


class Receiver:
    """Of one model. A tensor that modules share is received once and stays shared."""

    def __init__(self, model: nn.Module, ranks: Ranks, device: torch.device) -> None:
        self.ranks = ranks
        self.device = device
        # A weight may have another type than the meta model gives it, such as one that is kept in fp32.
        self.dtypes: dict[str, torch.dtype] = ranks.from_first(
            {name: tensor.dtype for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
        )
        # Modules not received yet, by their path; and what became of each tensor, beside it.
        self.paths = {module: path for path, module in model.named_modules()}
        self.received: dict[int, tuple[Tensor, Tensor]] = {}

    def receive(self, module: nn.Module) -> None:
        """All tensors of the module, and of those in it, that were not received before."""
        for child in module.modules():
            path = self.paths.pop(child, None)
            for tensors in () if path is None else (child._parameters, child._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None:
                        tensors[name] = self._receive(f"{path}.{name}" if path else name, tensor)

    def _receive(self, name: str, tensor: Tensor) -> Any:
        if id(tensor) not in self.received:
            here = tensor.detach()
            if self.ranks.is_first:
                here = here.to(self.device)
            else:
                here = torch.empty(here.shape, dtype=self.dtypes[name], device=self.device)
            dist.broadcast(here, src=0)
            if isinstance(tensor, nn.Parameter):
                here = nn.Parameter(here, requires_grad=tensor.requires_grad)
            self.received[id(tensor)] = tensor, here
        return self.received[id(tensor)][1]
