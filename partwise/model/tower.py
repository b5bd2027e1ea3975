"""The seam between vision tower and projector: features taken there, and given back in the tower's place.

In: a model of one of families.CACHED_TYPES. Out: the Cut, where its tower ends; the tower alone, read from
the folder; and a CachedTower, which hands kept features to the model's own forward where pixels were. How
they are kept is data/features.py's business.

Letters: N tiles (an image is one or several), P patches of a tile, D width.
"""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812 - the name everyone reads
from safetensors import safe_open
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from partwise.errors import CheckpointError
from partwise.families import CACHED_TYPES, TOWER_ENDS
from partwise.model.dead import feature_layers
from partwise.model.find import contains, find_parts, shorten
from partwise.model.folder import as_checkpoint_error, weight_files
from partwise.model.names import name_finder

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Cut:
    """Where the tower at `path` ends.

    The model reads these `layers` of its hidden_states, or, where there are none, its last state; the
    projector then averages blocks of `kernel` x `kernel` patches.
    """

    path: str
    layers: tuple[int, ...]
    kernel: int

    def features(self, output: Any) -> Tensor:
        """What is kept of the tower's output: (N, 1, P, D), as a picture of one channel, averaged already."""
        states = [output.hidden_states[layer] for layer in self.layers] or [output.last_hidden_state]
        features_NPD = torch.cat(states, dim=-1)
        if self.kernel > 1:
            # The projector's own operation on the same numbers: the same mean, bit for bit.
            grid_NDHW = features_NPD.transpose(1, 2).unflatten(2, self._sides(features_NPD.shape[1]))
            features_NPD = F.avg_pool2d(grid_NDHW.contiguous(), self.kernel).flatten(2).transpose(1, 2)
        return features_NPD[:, None].contiguous()

    def states(self, features: Tensor) -> Tensor:
        """(N, P, D) of which the projector's averages are the features, exactly.

        One patch of each block has the whole sum and the others are zero: a sum of equal numbers would round.
        """
        features_NPD = features.squeeze(1)
        if self.kernel == 1:
            return features_NPD
        height, width = self._sides(features_NPD.shape[1])
        shape = (len(features_NPD), self.kernel * height, self.kernel * width, features_NPD.shape[2])
        grid_NHWD = features_NPD.new_zeros(shape)
        blocks = features_NPD.unflatten(1, (height, width))
        grid_NHWD[:, :: self.kernel, :: self.kernel] = self.kernel**2 * blocks
        return grid_NHWD.flatten(1, 2)

    @staticmethod
    def _sides(num_patches: int) -> tuple[int, int]:
        side = math.isqrt(num_patches)
        return side, side


def find_cut(model: PreTrainedModel) -> Cut | None:
    """Where the tower of the model ends; None for types in which it does not end before the projector."""
    pool, found = CACHED_TYPES.get(model.config.model_type), find_parts(model)
    if pool is None:
        return None
    path = found["vision_tower"].module_paths[0]
    if TOWER_ENDS.get(model.get_submodule(path).config.model_type) is None:
        return None  # Pixtral in a LLaVA takes all images as one
    kernel = model.base_model.get_submodule(pool).kernel_size if pool else 1
    if kernel & (kernel - 1):
        kernel = 1  # a sum of so many would not divide exactly: all patches are kept
    return Cut(path, feature_layers(model), kernel)


class CachedTower(nn.Module):
    """Stands where the vision tower was. It has no weights: where pixels would come, features do."""

    def __init__(self, cut: Cut) -> None:
        super().__init__()
        self.cut = cut

    def forward(self, pixel_values: Tensor, **_options: Any) -> BaseModelOutputWithPooling:
        """`pixel_values` are features, (N, 1, P, D)."""
        states_NPD = self.cut.states(pixel_values)
        layers = states_NPD.chunk(len(self.cut.layers), dim=-1) if self.cut.layers else ()
        return BaseModelOutputWithPooling(
            last_hidden_state=states_NPD, hidden_states=dict(zip(self.cut.layers, layers, strict=True))
        )


def replace_tower(model: PreTrainedModel, cut: Cut) -> None:
    """Take the vision tower out of the model; it then takes features where pixels were."""
    model.set_submodule(cut.path, CachedTower(cut))


def lacks_tower(model: nn.Module) -> bool:
    return any(isinstance(module, CachedTower) for module in model.modules())


def attention_setting(model: nn.Module, implementation: str) -> str | dict[str, str]:
    """What set_attn_implementation is told, which warns of the config of a tower that is not there."""
    return {"text_config": implementation} if lacks_tower(model) else implementation


def read_tower(
    folder: Path, model: PreTrainedModel, cut: Cut, dtype: torch.dtype, attention: str
) -> PreTrainedModel:
    """The tower alone on the CPU, in eval mode, with its weights from the folder; no other tensor is read.

    `model` is the folder's, and may be on the meta device.

    Raises: CheckpointError where its tensors in the files are not exactly those of the tower.
    """
    empty, name_of = model.get_submodule(cut.path), name_finder(model)
    tower = type(empty)._from_config(deepcopy(empty.config), dtype=dtype, attn_implementation=attention)
    state = {}
    with as_checkpoint_error(folder, "its weights cannot be read", "Copy or download them again."):
        for file in weight_files(folder):
            with safe_open(file, "pt") as tensors:
                for source in tensors.keys():  # noqa: SIM118 - not a dict
                    if contains(cut.path, name := name_of(source)):
                        state[name.removeprefix(f"{cut.path}.")] = tensors.get_tensor(source).to(dtype)
    expected = tower.state_dict()
    shapes, found = ({n: t.shape for n, t in tensors.items()} for tensors in (expected, state))
    if wrong := {name for name, _ in shapes.items() ^ found.items()}:
        raise CheckpointError(
            f"{folder}: the weights of the vision tower do not fit {type(tower).__name__}: missing, left "
            f"over or of another shape: {shorten(sorted(wrong))}. Copy config.json and weights from the "
            "same model."
        )
    tower.load_state_dict(state)
    return tower.eval()
