"""Adapters and their base -> one whole model, weight by weight in fp32.

In: a plain model and adapter folders with a weight each. Out: the same model, in which each weight that an
adapter touches is base + sum of weight * (what the adapter alone makes of it - base), and what rounding to
the model's type took away. PEFT itself says what an adapter makes of a weight, so LoRA, DoRA, rsLoRA and
modules trained in full are all the same here. Beside model and adapters, one weight at a time is held.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from partwise.errors import CheckpointError
from partwise.export.adapter import put_on

ADAPTER = "default"


@dataclass(frozen=True)
class Adapter:
    """An adapter off its base. `layers` and `saved` go by the weight's name in the plain model.

    `weight` is its share in a merge: 1 is the adapter as it was trained.
    """

    folder: Path
    weight: float
    layers: dict[str, LoraLayer]
    saved: dict[str, Tensor]

    def touches(self, name: str) -> bool:
        return name in self.layers or name in self.saved

    def merged(self, name: str, base: Tensor) -> Tensor:
        """What the adapter alone, at weight 1, makes of a weight; both in fp32."""
        if name in self.saved:
            return self.saved[name].float()
        layer: Any = self.layers[name]
        own = layer.base_layer
        stand_in = copy.copy(own)
        stand_in._parameters = {**own._parameters, "weight": nn.Parameter(base.clone(), requires_grad=False)}
        layer.base_layer = stand_in
        try:
            layer.merge(adapter_names=[ADAPTER])
        finally:
            layer.merged_adapters.clear()
            layer.base_layer = own
        return stand_in.weight.data


@dataclass
class Rounding:
    """What the merged weights lost when they were rounded to their type, against how far they moved."""

    dtype: torch.dtype
    moved: dict[str, float] = field(default_factory=dict)
    lost: dict[str, float] = field(default_factory=dict)
    num_changed: int = 0

    def add(self, name: str, base: Tensor, merged: Tensor) -> None:
        rounded = merged.to(self.dtype)
        self.moved[name] = float((merged - base).norm())
        self.lost[name] = float((rounded.float() - merged).norm())
        self.num_changed += int(not torch.equal(rounded, base.to(self.dtype)))

    @property
    def fraction(self) -> float:
        """||rounded - merged|| / ||merged - base|| over all weights."""
        return _norm(self.lost.values()) / _norm(self.moved.values())

    @property
    def worst(self) -> tuple[str, float]:
        """The weight that lost the largest share of its update, and that share."""
        shares = {name: self.lost[name] / moved for name, moved in self.moved.items() if moved}
        name = max(shares, key=shares.__getitem__)
        return name, shares[name]


def _norm(values: Any) -> float:
    return sum(value**2 for value in values) ** 0.5


def take_adapter(model: PreTrainedModel, folder: Path, weight: float = 1.0) -> Adapter:
    """The adapter of a folder, read with PEFT on its base; the model is as before.

    Raises:
        CheckpointError: the folder is not whole, or holds something that cannot be merged weight by weight.
    """
    wrapped = put_on(model, folder)
    config = wrapped.peft_config[ADAPTER]
    layers: dict[str, LoraLayer] = {}
    saved: dict[str, Tensor] = {}
    originals: dict[str, nn.Module] = {}
    for path, module in wrapped.get_base_model().named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            originals[path] = module.original_module
            state = module.modules_to_save[ADAPTER].state_dict()
            saved.update({f"{path}.{name}": tensor for name, tensor in state.items()})
        elif type(module).__name__ != "ParamWrapper" and isinstance(module, LoraLayer):
            layers[f"{path}.weight"] = module
        elif isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            raise CheckpointError(_cannot_merge(folder, type(module).__name__))
    if getattr(config, "bias", "none") != "none" or getattr(config, "lora_bias", False):
        raise CheckpointError(_cannot_merge(folder, "trained biases"))
    wrapped.unload()
    for path, original in originals.items():
        model.set_submodule(path, original)
    return Adapter(folder, weight, layers, saved)


def _cannot_merge(folder: Path, what: str) -> str:
    return (
        f"{folder}: {what} cannot be merged here, only LoRA (with rsLoRA and DoRA) on weights and "
        "modules_to_save. Merge it with PEFT's merge_and_unload."
    )


@torch.no_grad()
def merge_into(model: PreTrainedModel, adapters: Sequence[Adapter], dtype: torch.dtype) -> Rounding:
    """Puts the adapters into the model's weights, which then have the values that `dtype` can hold.

    Raises:
        CheckpointError: nothing changes, or a merged weight is not finite.
    """
    state = model.state_dict()
    rounding = Rounding(dtype)
    for name in [name for name in state if any(adapter.touches(name) for adapter in adapters)]:
        base = state[name].float()
        merged = _merged_weight(name, base, [adapter for adapter in adapters if adapter.touches(name)])
        if not torch.isfinite(merged).all():
            raise CheckpointError(
                f"{name} is not finite after merging {_names(adapters)}: an adapter is broken. Use an older "
                "checkpoint."
            )
        rounding.add(name, base, merged)
        state[name].copy_(merged.to(dtype))
    if not any(rounding.moved.values()):
        raise CheckpointError(
            f"merged, the model equals its base bit for bit: {_names(adapters)} learned nothing, or the "
            "weights cancel. Look at the run's loss and at --weights."
        )
    if not rounding.num_changed:
        raise CheckpointError(
            f"merged in {str(dtype).removeprefix('torch.')}, the model equals its base bit for bit: the "
            f"update of {_names(adapters)} is smaller than that type can hold. Add --dtype float32, or keep "
            "the adapter (--to adapter)."
        )
    return rounding


def _merged_weight(name: str, base: Tensor, adapters: Sequence[Adapter]) -> Tensor:
    if len(adapters) == 1 and adapters[0].weight == 1.0:
        return adapters[0].merged(name, base)
    total = base.clone()
    for adapter in adapters:
        total += adapter.weight * (adapter.merged(name, base) - base)
    return total


def _names(adapters: Sequence[Adapter]) -> str:
    return ", ".join(str(adapter.folder) for adapter in adapters)
