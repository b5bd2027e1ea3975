"""Gradient checkpointing of exactly the parts whose backward pass runs.

In: a model to which a plan was applied. Out: the same model, whose decoder and, where it trains, towers
recompute their layers in the backward pass. A frozen tower is left alone: no gradient passes through it, so
it keeps no activations. Non-reentrant always, and without hooks on the inputs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from partwise.errors import PlanError
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
