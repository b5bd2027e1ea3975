"""Gradient checkpointing of exactly the parts whose backward pass runs, in as many layers as need it.

In: a model to which a plan was applied. Out: the same model, whose decoder and, where it trains, towers
recompute their layers in the backward pass. A frozen tower is left alone: no gradient passes through it, so
it keeps no activations. Non-reentrant always, and without hooks on the inputs.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from partwise.errors import PlanError
from partwise.model.find import find_parts
from partwise.model.parts import set_train_mode
from partwise.records import PartsPlan

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def enable_gradient_checkpointing(model: PreTrainedModel, plan: PartsPlan) -> None:
    """Turns checkpointing on in the decoder and in each tower that trains.

    Raises: PlanError where transformers cannot checkpoint one of them.
    """
    modules = {
        "vision_tower": lambda: model.get_encoder("image"),
        "audio_tower": lambda: model.get_encoder("audio"),
    }
    needed = [module() for part, module in modules.items() if part in plan and plan[part].trainable]
    for module in [*needed, model.get_decoder()]:
        _enable(module)
    set_train_mode(model, plan)


def recompute_layers(model: PreTrainedModel, plan: PartsPlan, share: float) -> tuple[int, int]:
    """Of the layers that checkpointing was enabled for, recompute only the first `share` of each part's.

    Returns how many these are, and of how many.
    """
    chosen = total = 0
    for part in find_parts(model).values():
        layers = [model.get_submodule(path) for _, path in part.layers]
        able = [layer for layer in layers if getattr(layer, "gradient_checkpointing", False)]
        for index, layer in enumerate(able):
            layer.gradient_checkpointing = index < math.ceil(share * len(able))
        chosen += math.ceil(share * len(able))
        total += len(able)
    set_train_mode(model, plan)
    return chosen, total


def _enable(module: PreTrainedModel) -> None:
    try:
        module.activation_checkpointing_enable({"use_reentrant": False})
    except ValueError as error:
        raise PlanError(
            f"train.gradient_checkpointing: {type(module).__name__} cannot recompute its layers ({error}). "
            "Set train.gradient_checkpointing: false."
        ) from error
    # The hooks are for reentrant checkpointing. Here they would make frozen embeddings keep a graph.
    module.disable_input_require_grads()
