"""Layers of towers and decoder compiled by torch: fewer, larger kernels, and less kept for the backward pass.

In: a model to which a plan was applied. Out: the same model, whose layers run compiled from their next
forward on. The compiler keeps the inputs of matrix products for the backward pass and computes again what
lies between them: norms, rotations, activations, adapters' sums. Layers of one shape share a graph; lengths
of packs are symbols in it, so that no pack compiles anew.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib.util import find_spec
from inspect import signature
from typing import TYPE_CHECKING

import torch

from partwise.model.find import find_parts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Layers are one function to the compiler; it keeps this many variants: kinds of layers, each of them with
# and without gradients, and the first one, into which no gradient goes.
MAX_VARIANTS = 64


def compile_layers(model: PreTrainedModel, backend: str | Callable = "inductor") -> None:
    """Compile each block of each part in place, when it first runs.

    Not blocks that cut their rows at `cu_seqlens`, as those of Qwen's towers do: these lengths are read on
    the host, where every graph would end.
    """
    # torch.compile is configured by these module attributes; it has no arguments for them.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_VARIANTS)
    # Scales of attention are constants; as symbols they make the compiler begin anew.
    torch._dynamo.config.specialize_float = True
    # Else two lengths that happen to be equal at first are taken to be equal always.
    torch.fx.experimental._config.use_duck_shape = False
    for part in find_parts(model).values():
        for _, path in part.layers:
            block = model.get_submodule(path)
            if "cu_seqlens" not in signature(block.forward).parameters:
                block.compile(dynamic=True, backend=backend)


def forget_compiled() -> None:
    """Let go of all graphs, and of the models that they hold: the variants of the next model count anew."""
    torch.compiler.reset()


def uncompiled() -> AbstractContextManager[None]:
    """A block in which modules run as they are written, so that hooks inside of layers are called."""
    return torch.compiler.set_stance("force_eager")


def can_compile() -> bool:
    """Whether torch can compile for the GPU here. On a CPU it gains little, and takes minutes."""
    return torch.cuda.is_available() and find_spec("triton") is not None
