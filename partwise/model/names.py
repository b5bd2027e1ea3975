"""A tensor's name in a file -> its name in the model, and the part that it belongs to.

In: a model, which may be on the meta device. Out: functions of names. Files have other names than models:
transformers renames tensors when it reads and writes them, and PEFT puts a prefix before them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from partwise.model.find import deepest_path, find_parts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADAPTER_PREFIX = "base_model.model."
OTHER = "other"


def part_finder(model: PreTrainedModel) -> Callable[[str], str]:
    """A function from a tensor's name in the model to its part."""
    owner = {path: part for part, found in find_parts(model).items() for path in found.module_paths}
    return lambda name: owner.get(deepest_path(name, owner) or "", OTHER)


def name_finder(model: PreTrainedModel) -> Callable[[str], str]:
    """A function from a tensor's name in a model's or adapter's file to its name in the model."""
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    state = model.state_dict()

    def find(source: str) -> str:
        source = source.removeprefix(ADAPTER_PREFIX)
        return rename_source_key(source, renamings, converters, model.base_model_prefix, state)[0]

    return find
