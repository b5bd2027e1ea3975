"""The plan put into effect: adapters, gradients, modes, and the adapter as PEFT reads it.

In: a model and its PartsPlan. Out: the same model, in which exactly the planned tensors train, and an adapter
state that plain PEFT loads. This is the only file that says requires_grad or peft. Which tensors those are
is decided in model/plan.py, how parts are found in model/find.py; both are offered from here, too.

peft is imported where adapters are made: without it a plan is checked 0.3 s sooner.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from partwise.errors import PlanError
from partwise.model.find import FoundPart, contains, find_parts, shorten
from partwise.model.names import ADAPTER_PREFIX
from partwise.model.plan import resolve_plan
from partwise.records import LoraSettings, PartsPlan

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel

__all__ = [
    "FoundPart",
    "PartRow",
    "adapter_config",
    "adapter_state",
    "adapter_tensors",
    "adapters_off",
    "apply_plan",
    "find_parts",
    "frozen_copy",
    "parts_table",
    "resolve_plan",
    "set_train_mode",
    "verify_plan",
]


def apply_plan(model: PreTrainedModel, plan: PartsPlan, whole: PartsPlan | None = None) -> None:
    """Adds the adapters, opens exactly the planned tensors, and puts frozen parts in eval mode.

    `whole` is the plan of all stages where this is one of several: the adapters are those of all.

    Raises: PlanError where the model already has adapters, or the result is not the plan.
    """
    whole = whole or plan
    if whole.has_adapters:
        if getattr(model, "peft_config", None):
            raise PlanError("the model already has adapters. Merge them first, or load the model anew.")
        from peft import inject_adapter_in_model

        # Without modules_to_save: parts in mode full train in place and keep their names.
        inject_adapter_in_model(_lora_config(whole), model)
    trainable = set(plan.trainable)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trainable)
    set_train_mode(model, plan)
    verify_plan(model, plan)


def frozen_copy(model: PreTrainedModel) -> PreTrainedModel:
    """The model once more in memory, as it is now; nothing of it trains."""
    return copy.deepcopy(model).eval().requires_grad_(False)


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """A block in which no adapter does anything; what trains stays marked as such."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    trains = {parameter: parameter.requires_grad for layer in layers for parameter in layer.parameters()}
    switch_adapters(layers, trains, is_on=False)
    try:
        yield
    finally:
        switch_adapters(layers, trains, is_on=True)


def switch_adapters(layers: Sequence[Any], trains: Mapping[nn.Parameter, bool], is_on: bool) -> None:
    for layer in layers:
        layer.enable_adapters(is_on)
    for (
        parameter,
        is_open,
    ) in trains.items():  # PEFT freezes what it switches off, and opens all that it switches on
        parameter.requires_grad_(is_open)


def verify_plan(model: PreTrainedModel, plan: PartsPlan, moment: str = "the plan was applied") -> None:
    """Raises: PlanError with the names, where the tensors that train are not the planned ones."""
    real = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    planned = set(plan.trainable)
    extra, missing = sorted(real - planned), sorted(planned - real)
    if not extra and not missing:
        return
    messages = []
    for part in plan.parts:
        stated = f"{part.part} is {part.mode} by the plan, but"
        outside = "" if part.mode == "frozen" else " outside the plan"
        if names := [n for n in extra if _part_of(plan, n) == part.part]:
            messages.append(
                f"{stated} {len(names)} of its tensors{outside} train after {moment}: {shorten(names)}"
            )
        if names := [n for n in missing if n in part.trainable]:
            messages.append(
                f"{stated} {len(names)} of its tensors do not train after {moment}: {shorten(names)}"
            )
    raise PlanError(
        f"{'; '.join(messages)}. Something else changed requires_grad or the modules; do not train."
    )


def _part_of(plan: PartsPlan, name: str) -> str:
    matches = [
        (len(path), part.part) for part in plan.parts for path in part.module_paths if contains(path, name)
    ]
    return max(matches)[1] if matches else ""


def set_train_mode(model: PreTrainedModel, plan: PartsPlan) -> None:
    """Train mode for parts that train, eval mode for frozen ones. Call it again after model.eval()."""
    model.train()
    modules = dict(model.named_modules())
    paths = [(path, part.mode != "frozen") for part in plan.parts for path in part.module_paths]
    for path, trains in sorted(paths, key=lambda item: len(item[0])):
        if path in modules:
            modules[path].train(trains)
    # A layer recomputes only in train mode, and a frozen decoder must, when the projector below it trains.
    for module in modules.values():
        if getattr(module, "gradient_checkpointing", False):
            module.training = True


def _lora_config(plan: PartsPlan) -> LoraConfig:
    """The adapters of all parts in one config: the largest part's settings, and patterns for the others.

    Patterns are whole names: PEFT takes the first that matches, and its file does not keep their order.
    """
    parts = sorted(
        (part for part in plan.parts if part.lora), key=lambda part: len(part.lora_targets), reverse=True
    )
    from peft import LoraConfig

    settings: LoraSettings = parts[0].lora  # type: ignore[assignment]
    ranks, alphas = {}, {}
    for part in parts[1:]:
        if part.lora and (part.lora.rank, part.lora.alpha) != (settings.rank, settings.alpha):
            patterns = [re.escape(target) for target in part.lora_targets]
            ranks.update(dict.fromkeys(patterns, part.lora.rank))
            alphas.update(dict.fromkeys(patterns, part.lora.alpha))
    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        target_modules=[target for part in parts for target in part.lora_targets],
        rank_pattern=ranks,
        alpha_pattern=alphas,
    )


def adapter_config(plan: PartsPlan, base_path: str) -> LoraConfig:
    """What PEFT needs to load the adapter folder: base, ranks, targets, and the modules trained in full."""
    config = _lora_config(plan)
    config.base_model_name_or_path = base_path
    config.task_type = "CAUSAL_LM"
    config.inference_mode = True
    config.modules_to_save = _modules_to_save(plan) or None
    return config


def _modules_to_save(plan: PartsPlan) -> list[str]:
    """The smallest modules that own the tensors trained in full, none inside another.

    Small ones, because PEFT wraps each, and models reach into larger ones by attribute and type.
    """
    owners = {
        name.rpartition(".")[0] for part in plan.parts if part.mode == "full" for name in part.trainable
    }
    return sorted(o for o in owners if not any(o != other and contains(other, o) for other in owners))


def _state_names(model: PreTrainedModel, plan: PartsPlan) -> dict[str, str]:
    """Name in PEFT's file -> name in the model's state."""
    names = {}
    for part in plan.parts:
        if part.lora:
            for name in part.trainable:
                key = name.replace(".default.", ".")
                if ".lora_magnitude_vector." in key:
                    key = key.removesuffix(".weight")
                names[ADAPTER_PREFIX + key] = name
    for path in _modules_to_save(plan):
        for name in model.get_submodule(path).state_dict():
            names[f"{ADAPTER_PREFIX}{path}.{name}"] = f"{path}.{name}"
    return names


def adapter_tensors(model: PreTrainedModel, plan: PartsPlan) -> dict[str, torch.Tensor]:
    """The tensors of the adapter file in PEFT's layout: adapters, and modules trained in full whole."""
    state = model.state_dict(keep_vars=True)
    return {key: state[name] for key, name in _state_names(model, plan).items()}


def adapter_state(model: PreTrainedModel, plan: PartsPlan) -> dict[str, torch.Tensor]:
    """The same without graph."""
    return {key: tensor.detach() for key, tensor in adapter_tensors(model, plan).items()}


@dataclass(frozen=True)
class PartRow:
    """One line of `partwise parts`: a part, or how a plan treats it."""

    part: str
    module_paths: tuple[str, ...]
    num_parameters: int
    num_trainable: int | None
    mode: str | None
    dtypes: tuple[str, ...]
    num_layers: int


def parts_table(model: PreTrainedModel, plan: PartsPlan | None = None) -> list[PartRow]:
    """A row for each part of the model; with a plan also its mode and how many parameters train."""
    return [
        PartRow(
            part=part,
            module_paths=found.module_paths,
            num_parameters=plan[part].num_parameters if plan else found.num_parameters,
            num_trainable=plan[part].num_trainable if plan else None,
            mode=plan[part].mode if plan else None,
            dtypes=found.dtypes,
            num_layers=len(found.layers),
        )
        for part, found in find_parts(model).items()
    ]
