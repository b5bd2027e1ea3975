"""The plan: what happens to each part of a model in this run, by name, before anything is changed.

In: a model (real or on the meta device) and the config. Out: a PartsPlan that names every tensor that will
train, adapters included, every tensor that stays frozen although its mode would open it, and why. Modes and
ranges that do not fit the model are PlanErrors. Nothing of the model is touched; model/parts.py does that.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from torch import nn

from partwise.config import Config, PartConfig
from partwise.errors import PlanError
from partwise.families import ATTENTION_NAMES, FEATURES_FROM_HIDDEN_STATES, MLP_NAMES, TOWER_ENDS, TowerEnd
from partwise.model.find import FoundPart, contains, deepest_path, find_parts, shorten
from partwise.records import PART_NAMES, LoraSettings, PartPlan, PartsPlan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NOT_IN_AN_ADAPTER = (
    "it stands alone beside the adapters, and an adapter folder can only hold whole modules; "
    "without lora in any part it trains"
)


def resolve_plan(model: PreTrainedModel, config: Config) -> PartsPlan:
    """The plan of this config for this model. A part that the config does not name stays frozen.

    Raises: PlanError where a part, mode, range or target does not fit the model, or nothing would train.
    """
    found = find_parts(model)
    _check_names(config, found)
    uses_lora = any(s.mode == "lora" for part in found if (s := config.parts.settings(part)))
    parts = tuple(_plan_part(model, part, config, uses_lora) for part in found.values())
    plan = PartsPlan(parts)
    if not plan.trainable:
        raise PlanError(_nothing_trains(config, list(found)))
    _check_lora(plan, config)
    return plan


def _check_names(config: Config, found: dict[str, FoundPart]) -> None:
    for part in PART_NAMES:
        if config.parts.settings(part) and part not in found:
            raise PlanError(
                f"{config.where(f'parts.{part}')}: parts.{part}: the model has no {part}. Its parts are "
                f"{_join(list(found))}; remove the line."
            )


def _plan_part(model: PreTrainedModel, found: FoundPart, config: Config, uses_lora: bool) -> PartPlan:
    settings = config.parts.settings(found.part) or PartConfig(mode="frozen")
    where = f"{config.where(f'parts.{found.part}')}: parts.{found.part}"
    if settings.mode == "frozen":
        _check_frozen(settings, where)
    in_range = _names_in_range(found, settings.layers, where)
    dead = _dead_modules(model, found)
    held: dict[str, str] = {}
    trainable: list[str] = []
    targets: list[str] = []
    num_trainable = 0
    if settings.mode == "full":
        for name in in_range:
            reason = _reason_to_hold(model, name, found, dead, uses_lora)
            if reason:
                held[name] = reason
            else:
                trainable.append(name)
                num_trainable += model.get_parameter(name).numel()
    if settings.mode == "lora":
        for target in _lora_targets(model, found, in_range, settings, where):
            path = deepest_path(target, dead)
            if path is not None:
                held[f"{target}.weight"] = dead[path]
                continue
            targets.append(target)
            shapes = _adapter_shapes(model.get_submodule(target), settings)
            trainable += [f"{target}.{name}" for name in shapes]
            num_trainable += sum(shapes.values())
    return PartPlan(
        part=found.part,
        mode=settings.mode,
        module_paths=found.module_paths,
        num_parameters=found.num_parameters,
        num_trainable=num_trainable,
        num_layers=len(found.layers),
        trainable=tuple(trainable),
        held=held,
        learning_rate=_first(settings.learning_rate, config.train.learning_rate),
        weight_decay=_first(settings.weight_decay, config.train.weight_decay),
        lora=_lora_settings(settings) if settings.mode == "lora" else None,
        lora_targets=tuple(targets),
    )


def _first(own: float | None, general: float) -> float:
    return general if own is None else own


def _check_frozen(settings: PartConfig, where: str) -> None:
    """Raises: PlanError for a setting that cannot have an effect, because the part is frozen."""
    for name, field in PartConfig.model_fields.items():
        value = getattr(settings, name)
        if name != "mode" and value != field.default:
            raise PlanError(
                f"{where}.{name}: {value} has no effect, because the part is frozen. "
                "Remove it, or set mode: full or lora."
            )


def _lora_settings(settings: PartConfig) -> LoraSettings:
    return LoraSettings(
        rank=settings.lora_rank,
        alpha=_first(settings.lora_alpha, 2.0 * settings.lora_rank),
        dropout=settings.lora_dropout,
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
    )


def _adapter_shapes(linear: nn.Linear, settings: PartConfig) -> dict[str, int]:
    """Adapter parameters of one linear layer: name below the layer -> number of elements."""
    shapes = {
        "lora_A.default.weight": settings.lora_rank * linear.in_features,
        "lora_B.default.weight": settings.lora_rank * linear.out_features,
    }
    if settings.use_dora:
        shapes["lora_magnitude_vector.default.weight"] = linear.out_features
    return shapes


def parse_layers(text: str, num_layers: int) -> range:
    """Layer indices of a range such as "-12:" (the last twelve), "0:6" or "3", for `num_layers` layers.

    Raises: ValueError where it is not a range, is empty, or reaches beyond the layers.
    """
    match = re.fullmatch(r"\s*(-?\d+)?\s*(:)?\s*(-?\d+)?\s*", text)
    if not match or not (match[1] or match[3]) or (match[3] and not match[2]):
        raise ValueError('is not a range such as "-12:", "0:6" or "3"')
    start = int(match[1] or 0)
    stop = int(match[3]) if match[3] else num_layers
    if not -num_layers <= start < num_layers or not -num_layers <= stop <= num_layers:
        raise ValueError("reaches beyond them")
    start %= num_layers
    layers = range(start, (stop + num_layers if stop < 0 else stop) if match[2] else start + 1)
    if not layers:
        raise ValueError("is empty")
    return layers


def _names_in_range(found: FoundPart, text: str | None, where: str) -> list[str]:
    """Parameter names of the part, or of its layers in the range when there is one."""
    if text is None:
        return list(found.parameter_names)
    if not found.layers:
        raise PlanError(f'{where}.layers: "{text}": {found.part} has no layers. Remove layers.')
    num = len(found.layers)
    try:
        indices = parse_layers(text, num)
    except ValueError as error:
        raise PlanError(
            f'{where}.layers: "{text}" {error}: {found.part} has {num} layers, 0 to {num - 1}. '
            f'Write a range inside them, such as "{-max(1, num // 2)}:" for the last {max(1, num // 2)}.'
        ) from None
    chosen = [found.layers[i][1] for i in indices]
    return [name for name in found.parameter_names if any(contains(path, name) for path in chosen)]


def _dead_modules(model: PreTrainedModel, found: FoundPart) -> dict[str, str]:
    """Modules of a vision tower whose output the model never uses, each with the reason."""
    if found.part != "vision_tower":
        return {}
    dead = {}
    last = _last_used_layer(model, len(found.layers))
    for path in found.module_paths:
        tower = model.get_submodule(path) if _is_module(model, path) else None
        end = TOWER_ENDS.get(getattr(getattr(tower, "config", None), "model_type", ""), TowerEnd())
        dead.update(
            {f"{path}.{name}": "the language model does not read its pooled output" for name in end.pooling}
        )
        if last is not None:
            dead.update({f"{path}.{name}": _after(last) for name in end.norm})
    if last is not None:
        dead.update({layer: _after(last) for index, layer in found.layers if index > last})
    return dead


def _after(last: int) -> str:
    return f"it comes after layer {last}, whose output is the image features (vision_feature_layer)"


def _is_module(model: nn.Module, path: str) -> bool:
    parent, _, name = path.rpartition(".")
    return name in dict(model.get_submodule(parent).named_children())


def _last_used_layer(model: PreTrainedModel, num_layers: int) -> int | None:
    """Index of the last tower layer that reaches the features, where they are read from hidden_states.

    hidden_states has num_layers + 1 entries, embeddings first: with 24 layers, -2 is the output of layer 22.
    """
    if model.config.model_type not in FEATURES_FROM_HIDDEN_STATES:
        return None
    setting = model.config.vision_feature_layer
    indices = [setting] if isinstance(setting, int) else list(setting)
    return max(index % (num_layers + 1) for index in indices) - 1


def _reason_to_hold(
    model: PreTrainedModel, name: str, found: FoundPart, dead: dict[str, str], uses_lora: bool
) -> str:
    """Why a parameter that the mode opens stays frozen; empty when it trains."""
    path = deepest_path(name, dead)
    if path is not None:
        return dead[path]
    if uses_lora and name in found.module_paths:
        return NOT_IN_AN_ADAPTER
    return ""


def _lora_targets(
    model: PreTrainedModel, found: FoundPart, in_range: list[str], settings: PartConfig, where: str
) -> list[str]:
    """Full names of the part's linear layers that match `lora_targets`: in its blocks, or in the projector.

    Raises: PlanError when nothing matches.
    """
    roots = [path for _, path in found.layers] or list(found.module_paths)
    linears = []
    for name in dict.fromkeys(name.rpartition(".")[0] for name in in_range):
        root = deepest_path(name, roots)
        if root is not None and isinstance(model.get_submodule(name), nn.Linear):
            inner = set(name.removeprefix(root).split("."))
            if settings.lora_targets == "all" or inner & _names_of(settings.lora_targets):
                linears.append(name)
    if linears:
        return linears
    if found.part == "projector" and settings.lora_targets == "all":
        raise PlanError(
            f"{where}.mode: lora: the projector of {model.config.model_type} has no linear layer that an "
            f"adapter can wrap, only {shorten(found.parameter_names)}. Set parts.projector.mode: full."
        )
    raise PlanError(
        f"{where}.lora_targets: {settings.lora_targets} matches no linear layer of {found.part}. "
        "Set lora_targets: all, or mode: full."
    )


def _names_of(targets: str) -> frozenset[str]:
    return ATTENTION_NAMES if targets == "attention" else MLP_NAMES


def _check_lora(plan: PartsPlan, config: Config) -> None:
    """Raises: PlanError for what one adapter folder cannot hold."""
    lora = [part for part in plan.parts if part.lora]
    if not lora:
        return
    if "language_model" in plan and plan["language_model"].mode == "full":
        raise PlanError(
            f"{config.where('parts.language_model')}: parts.language_model.mode: full beside lora in "
            f"{_join([p.part for p in lora])}: the run would be saved as an adapter that holds the whole "
            f"language model. Set parts.language_model.mode: lora, or {lora[0].part}'s mode: full."
        )
    for name in ("dropout", "use_rslora", "use_dora"):
        values = {part.part: getattr(part.lora, name) for part in lora}
        if len(set(values.values())) > 1:
            key = f"lora_{name}" if name == "dropout" else name
            listed = ", ".join(f"{part}: {value}" for part, value in values.items())
            raise PlanError(
                f"{config.where(f'parts.{lora[-1].part}')}: {key} differs between parts ({listed}), and one "
                "adapter folder has one value for all. Give every lora part the same value."
            )


def _nothing_trains(config: Config, parts: list[str]) -> str:
    lines = ", ".join(dict.fromkeys(config.where(f"parts.{part}") for part in parts))
    if len(parts) == 1:
        return (
            f"nothing would train: {parts[0]} is frozen, and the model has no other part ({lines}). "
            f"Set parts.{parts[0]}: lora or full."
        )
    return (
        f"nothing would train: {_join(parts)} are all frozen ({lines}). The usual recipe keeps the vision "
        "tower frozen and opens the other two: parts.projector: full and parts.language_model: lora or full."
    )


def _join(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
