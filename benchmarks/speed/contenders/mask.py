"""Whether a model that is about to train sees what its own mask lets it see: tried on it, not believed.

In: the opened model, and a batch of one row. Out: true or false, and what was seen. Three things are changed,
one at a time, and must reach exactly the positions that they should: the last token of an image must reach
the first (Gemma-3's images are blocks that see each other), a later token must not reach an earlier one, and
in a layer with a window a token must not reach beyond it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

REACHED = 1e-4  # relative to the largest value; what is not reached is the same to the last bit, or nearly


def probe_mask(model: nn.Module, batch: dict[str, Tensor]) -> tuple[bool | None, str]:
    """None where the model cannot be probed, such as one whose compiled layers take no hooks."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return judge(model, batch)
    except Exception as error:
        return None, f"could not be probed: {type(error).__name__}: {str(error)[:120]}"
    finally:
        model.train(was_training)


def judge(model: nn.Module, batch: dict[str, Tensor]) -> tuple[bool, str]:
    found = [later_reaches_earlier(model, batch)]
    text = getattr(model.config, "text_config", model.config)
    if getattr(model.config, "image_token_id", None) is not None and "pixel_values" in batch:
        found.append(image_reaches_itself(model, batch))
    kinds = getattr(text, "layer_types", None) or [""]
    if kinds[0] == "sliding_attention":
        found.append(window_is_kept(model, batch, text.sliding_window))
    return all(right for right, _ in found), "; ".join(reason for _, reason in found)


def later_reaches_earlier(model: nn.Module, batch: dict[str, Tensor]) -> tuple[bool, str]:
    ids = batch["input_ids"].clone()
    ids[0, -1] = ids[0, -2]
    states = [states_of(model, inputs, last_norm(model)) for inputs in (batch, {**batch, "input_ids": ids})]
    reached = differs(states[0][0, :-1], states[1][0, :-1])
    return not reached, "earlier tokens see later text" if reached else "text is causal"


def image_reaches_itself(model: nn.Module, batch: dict[str, Tensor]) -> tuple[bool, str]:
    """Its last token is changed behind the projector; the first one's state tells."""
    projector = named(model, "multi_modal_projector")
    soft = (batch["input_ids"][0] == model.config.image_token_id).nonzero()[:, 0]

    def change(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output[0, -1] += output[0].abs().max()
        return output

    before = states_of(model, batch, last_norm(model))
    handle = projector.register_forward_hook(change)
    try:
        after = states_of(model, batch, last_norm(model))
    finally:
        handle.remove()
    assert differs(before[0, soft[-1] :], after[0, soft[-1] :]), "the change itself is not seen"
    reached = differs(before[0, soft[0]], after[0, soft[0]])
    return (
        reached,
        "an image's tokens see each other" if reached else "an image's tokens see only earlier ones",
    )


def window_is_kept(model: nn.Module, batch: dict[str, Tensor], window: int) -> tuple[bool, str]:
    """In the first layer, over text that is longer than its window."""
    ids = batch["input_ids"][:, -2:-1].expand(1, window + 8).clone()
    changed = ids.clone()
    changed[0, 0] = batch["input_ids"][0, 0]
    states = []
    for inputs in (ids, changed):
        fields = {"input_ids": inputs, "attention_mask": torch.ones_like(inputs)}
        if "token_type_ids" in batch:
            fields["token_type_ids"] = torch.zeros_like(inputs)
        states.append(states_of(model, fields, named(model, "layers.0", among="language_model")))
    reached = differs(states[0][0, window:], states[1][0, window:])
    within = differs(states[0][0, : window // 2], states[1][0, : window // 2])
    right = within and not reached
    return right, "the window is kept" if right else "tokens see beyond the window"


def states_of(model: nn.Module, inputs: dict[str, Tensor], module: nn.Module) -> Tensor:
    """What `module` returns in a forward pass, (1, T, D)."""
    seen: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        seen.append((output[0] if isinstance(output, tuple) else output).float())

    handle = module.register_forward_hook(keep)
    try:
        model(**inputs)
    finally:
        handle.remove()
    return seen[-1]


def last_norm(model: nn.Module) -> nn.Module:
    try:
        return named(model, "language_model.norm")
    except LookupError:
        return named(model, "model.norm")


def named(model: nn.Module, ending: str, among: str = "") -> nn.Module:
    for name, module in model.named_modules():
        if among in name and (name == ending or name.endswith(f".{ending}")):
            return module
    raise LookupError(f"no module is named {ending}")


def differs(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() > REACHED * one.abs().max())
