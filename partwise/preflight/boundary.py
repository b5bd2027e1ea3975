"""What passes between the parts during a forward pass: its dtype, and whether a frozen tower keeps a graph.

In: a model with its plan applied. Out: what its modules gave while the block ran, seen by forward hooks that
are removed at its end. Nothing is judged here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from partwise.model.find import deepest_path
from partwise.records import PartsPlan

TOWERS = ("vision_tower", "audio_tower")


@dataclass
class Crossings:
    """`dtypes` by part: of the tensors that its module gave. `backward` by frozen tower: modules of it that
    the backward pass would go through."""

    dtypes: dict[str, set[torch.dtype]] = field(default_factory=dict)
    backward: dict[str, set[str]] = field(default_factory=dict)


@contextmanager
def watched(model: nn.Module, plan: PartsPlan) -> Iterator[Crossings]:
    """A block whose forward passes are recorded."""
    crossings = Crossings()
    owner = {path: part.part for part in plan.parts for path in part.module_paths}
    frozen = {part.part for part in plan.parts if part.part in TOWERS and not part.trainable}
    head = model.get_output_embeddings()
    handles = []
    for name, module in model.named_modules():
        if name in owner and module is not head:
            handles.append(module.register_forward_hook(_dtype_hook(crossings, owner[name])))
        path = deepest_path(name, owner)
        if (
            path is not None
            and owner[path] in frozen
            and next(module.parameters(recurse=False), None) is not None
        ):
            handles.append(module.register_forward_hook(_graph_hook(crossings, owner[path], name)))
    try:
        yield crossings
    finally:
        for handle in handles:
            handle.remove()


def _dtype_hook(crossings: Crossings, part: str) -> Any:
    def record(module: nn.Module, arguments: Any, output: Any) -> None:
        dtypes = {tensor.dtype for tensor in output_tensors(output) if tensor.is_floating_point()}
        crossings.dtypes.setdefault(part, set()).update(dtypes)

    return record


def _graph_hook(crossings: Crossings, part: str, name: str) -> Any:
    def record(module: nn.Module, arguments: Any, output: Any) -> None:
        if any(tensor.requires_grad for tensor in output_tensors(output)):
            crossings.backward.setdefault(part, set()).add(name)

    return record


def output_tensors(output: Any) -> list[Tensor]:
    """The result of a module's forward: the tensor, the first of a tuple, or the last hidden state."""
    if isinstance(output, Tensor):
        return [output]
    hidden = getattr(output, "last_hidden_state", None)
    if hidden is not None:
        return [hidden]
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        return [output[0]]
    return []
