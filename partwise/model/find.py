"""The parts of a model: a partition of all its parameters.

In: a transformers model with real, meta or LoRA-wrapped weights. Out: a FoundPart for each part it has.
Towers and decoder come from transformers' accessors, the projector from its usual names and the rows of
families.py, all resolved to modules of this model. What is left over is an error, never a guess.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from partwise.errors import PlanError
from partwise.families import FAMILIES, PROJECTOR_NAMES, Family
from partwise.model.quantize import num_elements, weight_type
from partwise.records import PART_NAMES

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class FoundPart:
    """One part of a model. All names are full dotted names in that model.

    `module_paths` are modules, or bare parameters that stand alone (LLaVA-NeXT's image_newline). `layers`
    are the (index, module path) of its blocks, empty for a projector. Tied weights are counted once.
    """

    part: str
    module_paths: tuple[str, ...]
    parameter_names: tuple[str, ...]
    layers: tuple[tuple[int, str], ...]
    num_parameters: int
    dtypes: tuple[str, ...]


def find_parts(model: PreTrainedModel) -> dict[str, FoundPart]:
    """The parts the model has, in the order of PART_NAMES.

    Raises: PlanError where a parameter belongs to no part, or the model is not built from parts.
    """
    paths = _part_paths(model)
    owner = {path: part for part in PART_NAMES for path in paths.get(part, ())}
    names: dict[str, list[str]] = {part: [] for part in PART_NAMES}
    homeless: list[str] = []
    for name, _ in model.named_parameters():
        path = deepest_path(name, owner)
        (homeless if path is None else names[owner[path]]).append(name)
    if homeless:
        raise PlanError(
            f"{_model_type(model)}: parameters that belong to no part: {shorten(homeless)}. "
            "Partwise trains the model types that docs/families.md lists with a language model path."
        )
    return {
        part: _describe(model, part, paths[part], names[part], owner) for part in PART_NAMES if names[part]
    }


def deepest_path(name: str, paths: Iterable[str]) -> str | None:
    """The longest of `paths` that is `name` or one of its parents; None if there is none."""
    matches = [path for path in paths if contains(path, name)]
    return max(matches, key=len, default=None)


def contains(path: str, name: str) -> bool:
    """Whether `name` is `path` or lies below it; the empty path contains everything."""
    return not path or name == path or name.startswith(path + ".")


def shorten(names: Iterable[str], limit: int = 4) -> str:
    """The first names of a list, and how many more there are, for a message."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _model_type(model: PreTrainedModel) -> str:
    return str(model.config.model_type)


def _part_paths(model: PreTrainedModel) -> dict[str, tuple[str, ...]]:
    """Part -> paths of the modules and bare parameters that make it up, nested ones included."""
    family = FAMILIES.get(_model_type(model), Family())
    if family.no_parts:
        raise PlanError(f"{_model_type(model)}: Partwise cannot train it by parts: {family.no_parts}.")
    module_names = {id(module): name for name, module in model.named_modules()}
    core = module_names[id(model.base_model)]
    decoder = module_names[id(model.get_decoder())]
    if model.config.sub_configs:
        _check_decoder(model, decoder, core, module_names)
    towers = {
        "vision_tower": _encoder_path(model, "image", module_names, core),
        "audio_tower": _encoder_path(model, "audio", module_names, core),
    }
    for path in filter(None, towers.values()):
        if contains(path, decoder) or contains(decoder, path):
            raise PlanError(f"{_model_type(model)}: {path} and {decoder} overlap, so they are not two parts.")
    head = module_names.get(id(model.get_output_embeddings()))
    paths: dict[str, tuple[str, ...]] = {part: (path,) if path else () for part, path in towers.items()}
    paths["language_model"] = tuple(dict.fromkeys(p for p in (decoder, head) if p is not None))
    paths["projector"] = tuple(_projector_paths(model, [core, *filter(None, towers.values())]))
    for part in ("vision_tower", "audio_tower", "projector"):
        extra = [f"{core}.{path}".lstrip(".") for path in getattr(family, part)]
        paths[part] = tuple(dict.fromkeys([*paths[part], *(p for p in extra if _resolve(model, p))]))
    return paths


def _check_decoder(model: PreTrainedModel, decoder: str, core: str, module_names: dict[int, str]) -> None:
    """Raises: PlanError unless the decoder is a module of its own that holds the token embeddings."""
    try:
        embeddings = module_names.get(id(model.get_input_embeddings()))
    except NotImplementedError:
        embeddings = None
    if decoder == core or embeddings is None or not contains(decoder, embeddings):
        raise PlanError(
            f"{_model_type(model)}: Partwise cannot train it by parts: it has no decoder-only language model "
            "with its own token embeddings. docs/families.md lists the model types that have one."
        )


def _encoder_path(
    model: PreTrainedModel, modality: str, module_names: dict[int, str], core: str
) -> str | None:
    """The path of a tower; get_encoder answers None or the model itself where there is none."""
    encoder = model.get_encoder(modality)
    path = module_names.get(id(encoder))
    return None if encoder is None or path in ("", core) else path


def _projector_paths(model: PreTrainedModel, parents: list[str]) -> Iterator[str]:
    for parent in parents:
        for name in PROJECTOR_NAMES:
            path = f"{parent}.{name}".lstrip(".")
            if _resolve(model, path):
                yield path


def _resolve(model: nn.Module, path: str) -> bool:
    """Whether the path is a module with parameters, or a bare parameter, of the model."""
    parent, _, name = path.rpartition(".")
    try:
        value = getattr(model.get_submodule(parent), name, None)
    except AttributeError:
        return False
    return isinstance(value, nn.Parameter) or (
        isinstance(value, nn.Module) and next(value.parameters(), None) is not None
    )


def _describe(
    model: PreTrainedModel, part: str, paths: tuple[str, ...], names: list[str], owner: dict[str, str]
) -> FoundPart:
    parameters = [model.get_parameter(name) for name in names]
    return FoundPart(
        part=part,
        module_paths=paths,
        parameter_names=tuple(names),
        layers=() if part == "projector" else _layers(model, part, owner),
        num_parameters=sum(num_elements(p) for p in parameters),
        dtypes=tuple(sorted({weight_type(p) for p in parameters})),
    )


def _layers(model: PreTrainedModel, part: str, owner: dict[str, str]) -> tuple[tuple[int, str], ...]:
    """The blocks of a part: its outermost module list with the most parameters."""
    stacks: dict[str, int] = {}
    for name, module in model.named_modules():
        path = deepest_path(name, owner)
        if not isinstance(module, nn.ModuleList) or path is None or owner[path] != part:
            continue
        if not any(contains(stack, name) for stack in stacks):
            stacks[name] = sum(num_elements(p) for p in module.parameters())
    if not stacks:
        return ()
    stack = max(stacks, key=lambda name: stacks[name])
    return tuple((i, f"{stack}.{i}") for i in range(len(model.get_submodule(stack))))
