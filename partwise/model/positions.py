"""Positions of an example's tokens, for models that count them along several axes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from partwise.records import Example

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def grid_positions(model: PreTrainedModel, example: Example) -> Tensor:
    """The example's positions along time, height and width, (3, 1, T), from the model's own rule.

    `model` may be on the meta device: only its config is read.
    """
    grids = {name: value for name, value in example.media.items() if name.endswith("_grid_thw")}
    if not grids:
        return torch.arange(len(example.input_ids)).expand(3, 1, -1)
    fields = {name: field[None] for name, field in example.token_fields.items()}
    return model.base_model.get_rope_index(example.input_ids[None], **fields, **grids)[0]
