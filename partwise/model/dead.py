"""The modules of a vision tower that can never get a gradient, because the model does not use their output.

In: a model and its found vision tower. Out: module path -> reason. Taken from the config and the facts in
families.py; whether a tensor got its gradient in a real step is checked elsewhere.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from partwise.families import FEATURES_FROM_HIDDEN_STATES, TOWER_ENDS, TowerEnd
from partwise.model.find import FoundPart

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def find_dead_modules(model: PreTrainedModel, found: FoundPart) -> dict[str, str]:
    """Path -> why its output is not used. Empty for every part but a vision tower."""
    if found.part != "vision_tower":
        return {}
    modules = dict(model.named_modules())
    last = _last_used_layer(model, len(found.layers))
    dead = {layer: _after(last) for index, layer in found.layers if last is not None and index > last}
    for path in found.module_paths:
        config = getattr(modules.get(path), "config", None)
        end = TOWER_ENDS.get(getattr(config, "model_type", ""), TowerEnd())
        dead |= {f"{path}.{name}": "the language model does not read its output" for name in end.pooling}
        if last is not None:
            dead |= {f"{path}.{name}": _after(last) for name in end.norm}
    return dead


def _after(last: int) -> str:
    return f"it comes after layer {last}, whose output is the image features (vision_feature_layer)"


def _last_used_layer(model: PreTrainedModel, num_layers: int) -> int | None:
    """Index of the last tower layer that reaches the features, where they are read from hidden_states.

    hidden_states has num_layers + 1 entries, embeddings first: with 24 layers, -2 is the output of layer 22.
    """
    indices = feature_layers(model)
    return max(index % (num_layers + 1) for index in indices) - 1 if indices else None


def feature_layers(model: PreTrainedModel) -> tuple[int, ...]:
    """The entries of the tower's hidden_states that are the image features; none where its last state is."""
    if model.config.model_type not in FEATURES_FROM_HIDDEN_STATES:
        return ()
    setting = model.config.vision_feature_layer
    return (setting,) if isinstance(setting, int) else tuple(setting)
