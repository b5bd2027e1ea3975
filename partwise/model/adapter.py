"""Training goes on with an adapter folder: does it fit the plan, and its tensors into the model.

In: a PEFT adapter folder, Partwise's or another tool's, and the plan of the run. Out: the model with the
plan applied, holding the folder's adapters and whole modules. The plan decides what trains; a folder that
holds other adapters than it names, or scales them otherwise, is an error that says so.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file

from partwise.errors import CheckpointError
from partwise.model.find import shorten
from partwise.model.folder import adapter_file, read_header, read_json
from partwise.model.names import ADAPTER_PREFIX, name_finder
from partwise.model.parts import adapter_state
from partwise.records import PartsPlan

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_adapter(model: PreTrainedModel, plan: PartsPlan, folder: Path) -> None:
    """Copies the folder's tensors into a model to which the plan was applied.

    Raises:
        CheckpointError: names, shapes or scales are not those of the plan.
    """
    check_adapter(model, plan, folder)
    state, name_of = adapter_state(model, plan), name_finder(model)
    with torch.no_grad():
        for name, tensor in load_file(adapter_file(folder)).items():
            state[ADAPTER_PREFIX + name_of(name)].copy_(tensor)


def check_adapter(model: PreTrainedModel, plan: PartsPlan, folder: Path) -> None:
    """Whether `load_adapter` will work; the model may be on the meta device.

    Raises:
        CheckpointError: as `load_adapter`.
    """
    header, _ = read_header(adapter_file(folder))
    check_scales(plan, folder)
    name_of = name_finder(model)
    found = {ADAPTER_PREFIX + name_of(name): tuple(t["shape"]) for name, t in header.items()}
    planned = {key: tuple(tensor.shape) for key, tensor in adapter_state(model, plan).items()}
    check_names(plan, folder, set(planned), set(found))
    for key, shape in planned.items():
        if found[key] != shape:
            raise CheckpointError(
                f"{folder} does not fit the plan: {key} is {found[key]} in it and {shape} in this run. Use "
                "the lora_rank and the base that it was trained with."
            )


def check_names(plan: PartsPlan, folder: Path, planned: set[str], found: set[str]) -> None:
    """Raises: CheckpointError where the folder holds other tensors than the plan trains."""
    told = [
        f"{len(names)} of {part} that {what} ({shorten(sorted(names), 2)})"
        for what, differing in (
            ("the plan trains are not in it", planned - found),
            ("it holds do not train by the plan", found - planned),
        )
        for part, names in by_part(plan, differing).items()
    ]
    if told:
        raise CheckpointError(
            f"{folder} does not fit the plan: {'; '.join(told)}. Give each part the mode, layers and "
            "lora_targets that the adapter was trained with."
        )


def by_part(plan: PartsPlan, keys: set[str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for key in keys:
        name = key.removeprefix(ADAPTER_PREFIX)
        groups.setdefault(plan.part_of(name) or "no part", []).append(name)
    return dict(sorted(groups.items()))


def check_scales(plan: PartsPlan, folder: Path) -> None:
    """Raises: CheckpointError where the folder's adapters are scaled otherwise than the plan's."""
    config = read_json(folder / "adapter_config.json")
    for part in plan.parts:
        for target in part.lora_targets:
            assert part.lora is not None
            wanted = {
                "lora_alpha": part.lora.alpha,
                "use_rslora": part.lora.use_rslora,
                "use_dora": part.lora.use_dora,
            }
            found = {
                "lora_alpha": float(pattern_value(config, "alpha_pattern", "lora_alpha", target)),
                "use_rslora": bool(config.get("use_rslora")),
                "use_dora": bool(config.get("use_dora")),
            }
            for name, value in found.items():
                if value != wanted[name]:
                    raise CheckpointError(
                        f"{folder}: its adapters have {name} {value}, and the plan's have {wanted[name]} "
                        f"({target}). They would be another function: set parts.{part.part}.{name}: {value}."
                    )


def pattern_value(config: dict[str, Any], pattern: str, general: str, target: str) -> Any:
    """A setting of one target module, by the rule by which PEFT picks it."""
    # Only a run that goes on with an adapter needs it: without, a plan is checked before peft is imported.
    from peft.utils.other import get_pattern_key

    patterns = config.get(pattern) or {}
    return patterns.get(get_pattern_key(list(patterns), target), config.get(general, 8))
