"""The plan: what happens to each part of a model in this run, by name, before anything is changed.

In: a model (real or on the meta device) and the config. Out: a PartsPlan that names every tensor that will
train, adapters included, every tensor that stays frozen although its mode would open it, and why. Modes and
ranges that do not fit the model are PlanErrors. Nothing of the model is touched; model/parts.py does that.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import nn

from partwise.config import Config, PartConfig
from partwise.errors import PlanError
from partwise.families import ATTENTION_NAMES, MLP_NAMES
from partwise.model.dead import find_dead_modules
from partwise.model.find import FoundPart, contains, deepest_path, find_parts, shorten
from partwise.model.quantize import NF4_BLOCK
from partwise.records import PART_NAMES, LoraSettings, PartPlan, PartsPlan, Quantization

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NOT_IN_AN_ADAPTER = (
    "it stands alone beside the adapters, and an adapter folder can only hold whole modules; "
    "without lora in any part it trains"
)


def resolve_plan(model: PreTrainedModel, config: Config, whole: PartsPlan | None = None) -> PartsPlan:
    """The plan of this config for this model. A part that the config does not name stays frozen.

    `whole` is the plan of all stages, where this is one of several: what an adapter folder cannot hold does
    not train in any of them.

    Raises: PlanError where a part, mode, range or target does not fit the model, or nothing would train.
    """
    found = find_parts(model)
    _check_names(config, found)
    uses_lora = any(s.mode == "lora" for part in found if (s := config.parts.settings(part)))
    uses_lora = uses_lora or (whole is not None and whole.has_adapters)
    parts = tuple(_plan_part(model, part, config, uses_lora) for part in found.values())
    plan = PartsPlan(parts)
    if not plan.trainable:
        raise PlanError(_nothing_trains(config, list(found)))
    _check_adapter(plan, config)
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
    in_range = _names_in_range(found, settings.layers, where)
    opened = Opened()
    if settings.mode == "full":
        opened = _open_weights(model, found, in_range, uses_lora)
    elif settings.mode == "lora":
        targets = _lora_targets(model, found, in_range, settings, where)
        opened = _open_adapters(model, found, targets, settings)
    if opened.held and not opened.trainable:
        reasons = " and ".join(dict.fromkeys(opened.held.values()))
        raise PlanError(
            f"{where}: nothing of {found.part} would train, because {reasons}. Open more of it, or freeze it."
        )
    return PartPlan(
        part=found.part,
        mode=settings.mode,
        module_paths=found.module_paths,
        num_parameters=found.num_parameters,
        num_trainable=sum(opened.trainable.values()),
        num_layers=len(found.layers),
        trainable=tuple(opened.trainable),
        held=opened.held,
        learning_rate=_first(settings.learning_rate, config.train.learning_rate),
        weight_decay=_first(settings.weight_decay, config.train.weight_decay),
        lora=_lora_settings(settings) if settings.mode == "lora" else None,
        lora_targets=tuple(opened.targets),
        quantization=_quantization(model, found, settings, where),
        rate_fractions=_rate_fractions(found, opened.trainable, settings.layer_decay, where),
    )


@dataclass(frozen=True)
class Opened:
    """What a mode opens: tensor name -> number of elements; held name -> reason; modules with adapters."""

    trainable: dict[str, int] = field(default_factory=dict)
    held: dict[str, str] = field(default_factory=dict)
    targets: list[str] = field(default_factory=list)


def _open_weights(model: PreTrainedModel, found: FoundPart, names: list[str], uses_lora: bool) -> Opened:
    opened = Opened()
    dead = find_dead_modules(model, found)
    for name in names:
        path = deepest_path(name, dead)
        if path is not None:
            opened.held[name] = dead[path]
        elif uses_lora and name in found.module_paths:
            opened.held[name] = NOT_IN_AN_ADAPTER
        else:
            opened.trainable[name] = model.get_parameter(name).numel()
    return opened


def _open_adapters(
    model: PreTrainedModel, found: FoundPart, targets: list[str], settings: PartConfig
) -> Opened:
    opened = Opened()
    dead = find_dead_modules(model, found)
    for target in targets:
        path = deepest_path(target, dead)
        if path is not None:
            opened.held[f"{target}.weight"] = dead[path]
            continue
        opened.targets.append(target)
        sizes = _adapter_sizes(model.get_submodule(target), settings)
        opened.trainable.update({f"{target}.{name}": size for name, size in sizes.items()})
    return opened


def _first(own: float | None, general: float) -> float:
    return general if own is None else own


def _lora_settings(settings: PartConfig) -> LoraSettings:
    return LoraSettings(
        rank=settings.lora_rank,
        alpha=_first(settings.lora_alpha, 2.0 * settings.lora_rank),
        dropout=settings.lora_dropout,
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
    )


def _adapter_sizes(linear: nn.Linear, settings: PartConfig) -> dict[str, int]:
    """Adapter parameters of one linear layer: name below the layer -> number of elements."""
    sizes = {
        "lora_A.default.weight": settings.lora_rank * linear.in_features,
        "lora_B.default.weight": settings.lora_rank * linear.out_features,
    }
    if settings.use_dora:
        sizes["lora_magnitude_vector.default.weight"] = linear.out_features
    return sizes


def parse_layers(text: str, num_layers: int) -> range:
    """Layer indices of a slice such as "-12:" (the last twelve) or "0:6", for `num_layers` layers.

    Raises: ValueError where the range is empty or reaches beyond the layers; a Python slice would be cut.
    """
    first, _, end = text.partition(":")
    start, stop = int(first or 0), int(end or num_layers)
    if not -num_layers <= start < num_layers or not -num_layers <= stop <= num_layers:
        raise ValueError("reaches beyond its layers")
    layers = range(num_layers)[start:stop]
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
        indices = sorted({index for each in text.split(",") for index in parse_layers(each, num)})
    except ValueError as error:
        raise PlanError(
            f'{where}.layers: "{text}" {error}: {found.part} has {num} layers, 0 to {num - 1}. '
            f'Write a range inside them: "{-((num + 1) // 2)}:" is the upper half.'
        ) from None
    chosen = [found.layers[i][1] for i in indices]
    return [name for name in found.parameter_names if any(contains(path, name) for path in chosen)]


def _rate_fractions(
    found: FoundPart, names: Iterable[str], decay: float | None, where: str
) -> dict[str, float]:
    """The fraction of the part's rate that each tensor has: `decay` once for each layer above its own.

    What the model has before its layers, such as embeddings, counts as one more layer below them; what comes
    after them, such as the last norm, has the whole rate. Source: ULMFiT (arXiv 1801.06146).
    """
    if decay is None:
        return {}
    if not found.layers:
        raise PlanError(f"{where}.layer_decay: {decay:g}: {found.part} has no layers. Remove layer_decay.")
    paths, fractions = [path for _, path in found.layers], {}
    depth, below = {path: len(paths) - 1 - index for index, path in enumerate(paths)}, len(paths)
    for name in found.parameter_names:
        path = deepest_path(name, paths)
        below = below if path is None else 0
        fractions[name] = decay ** (below if path is None else depth[path])
    # An adapter has the rate of the weight that it is on.
    of_layer = {path: decay ** depth[path] for path in paths}
    return {n: fractions[n] if n in fractions else of_layer[deepest_path(n, paths) or ""] for n in names}


def _lora_targets(
    model: PreTrainedModel, found: FoundPart, in_range: list[str], settings: PartConfig, where: str
) -> list[str]:
    """Full names of the part's linear layers that match `lora_targets`: in its blocks, or in the projector.

    Raises: PlanError when nothing matches.
    """
    targets = settings.lora_targets
    linears = [
        name
        for name, inner in _linears(model, found, in_range)
        if targets == "all" or inner & _names_of(targets)
    ]
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


def _linears(
    model: PreTrainedModel, found: FoundPart, names: Iterable[str]
) -> Iterator[tuple[str, set[str]]]:
    """The linear layers in the part's blocks, or in a projector, that own one of these parameters.

    Each with the names on its path below its block.
    """
    roots = [path for _, path in found.layers] or list(found.module_paths)
    for name in dict.fromkeys(name.rpartition(".")[0] for name in names):
        root = deepest_path(name, roots)
        if root is not None and isinstance(model.get_submodule(name), nn.Linear):
            yield name, set(name.removeprefix(root).split("."))


def block_linears(model: PreTrainedModel, found: FoundPart) -> tuple[str, ...]:
    """Full names of all linear layers in the blocks of a tower or language model."""
    return tuple(name for name, _ in _linears(model, found, found.parameter_names)) if found.layers else ()


def _quantization(
    model: PreTrainedModel, found: FoundPart, settings: PartConfig, where: str
) -> Quantization | None:
    """Raises: PlanError where the part has no linear layers in blocks, or one of a size that has no NF4."""
    if settings.quantization is None:
        return None
    modules = block_linears(model, found)
    if not modules:
        raise PlanError(
            f"{where}.quantization: {settings.quantization}: {found.part} has no linear layers in blocks, so "
            "nothing of it would be quantised. Remove it."
        )
    for name in modules:
        linear = model.get_submodule(name)
        if linear.in_features % NF4_BLOCK:
            # bitsandbytes 0.50.2 multiplies with wrong scales on a CPU where a block goes on in the next row.
            raise PlanError(
                f"{where}.quantization: {settings.quantization}: {name} has {linear.in_features} inputs, and "
                f"NF4 has one scale for {NF4_BLOCK} weights: each row must be a multiple of that. "
                "Remove it."
            )
    return Quantization(settings.quantization, settings.double_quantization, modules)


def _names_of(targets: str) -> frozenset[str]:
    return ATTENTION_NAMES if targets == "attention" else MLP_NAMES


def _check_adapter(plan: PartsPlan, config: Config) -> None:
    """Raises: PlanError for a language model in full beside adapters, which no adapter folder should hold."""
    lora = [part.part for part in plan.parts if part.lora]
    if lora and "language_model" in plan and plan["language_model"].mode == "full":
        raise PlanError(
            f"{config.where('parts.language_model')}: parts.language_model.mode: full beside lora in "
            f"{_join(lora)}: the run would be saved as an adapter that holds the whole language model. "
            f"Set parts.language_model.mode: lora, or parts.{lora[0]}.mode: full."
        )


def _nothing_trains(config: Config, parts: list[str]) -> str:
    places = ", ".join(dict.fromkeys(config.where(f"parts.{part}") for part in parts))
    if len(parts) == 1:
        return (
            f"nothing would train: {parts[0]} is frozen, and the model has no other part ({places}). "
            f"Set parts.{parts[0]}: lora or full."
        )
    return (
        f"nothing would train: {_join(parts)} are all frozen ({places}). The usual recipe keeps the vision "
        "tower frozen and opens the other two: parts.projector: full and parts.language_model: lora."
    )


def _join(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
