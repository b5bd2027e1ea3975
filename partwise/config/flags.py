"""The freeze flags that people know, expanded into `parts`.

In: the flags that stand at the top level of a config. Out: what `parts` would say, and each way in which the
flags contradict themselves or a `parts` beside them. Flags are short for `parts` and nothing else: after the
expansion nobody asks for them. A part is named only where its flag is written or where it opens, so that
a default never asks for a part that the model does not have.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from partwise.config.document import Fault
from partwise.records import MODES

USUAL_PARTS = "parts: {vision_tower: frozen, projector: full, language_model: lora}"
USUAL_FLAGS = (
    "freeze_vision_tower: true, freeze_multi_modal_projector: false, freeze_language_model: false, "
    "finetuning_type: lora"
)

# JSON schema of each flag: for validation, config_schema() and the reference.
FLAGS: dict[str, dict[str, Any]] = {
    "freeze_vision_tower": {
        "type": "boolean",
        "default": True,
        "description": "Keep the vision tower as it is.",
    },
    "freeze_multi_modal_projector": {
        "type": "boolean",
        "default": True,
        "description": "Keep the projector as it is. An open projector always trains `full`.",
    },
    "freeze_language_model": {
        "type": "boolean",
        "default": False,
        "description": "Keep the language model as it is.",
    },
    "freeze_llm": {
        "type": "boolean",
        "default": False,
        "description": "Another name of `freeze_language_model`.",
    },
    "finetuning_type": {
        "type": "string",
        "enum": ["full", "lora", "freeze"],
        "description": "How an open vision tower and language model train. Needed where one of them opens. "
        "`freeze`: the vision tower in full, of the language model `freeze_trainable_layers`.",
    },
    "train_mm_proj_only": {
        "type": "boolean",
        "default": False,
        "description": "Train the projector alone.",
    },
    "freeze_trainable_layers": {
        "type": "integer",
        "default": 2,
        "unit": "layers",
        "description": "With `finetuning_type: freeze`: so many last layers of the language model train; "
        "a negative number counts the first ones.",
    },
}

_PART_FLAGS: dict[str, tuple[str, ...]] = {
    "vision_tower": ("freeze_vision_tower",),
    "projector": ("freeze_multi_modal_projector",),
    "language_model": ("freeze_language_model", "freeze_llm"),
}


def expand_flags(flags: Mapping[str, Any]) -> dict[str, Any]:
    """What `parts` would say instead of these flags; `check_flags` must have found no fault in them.

    {"finetuning_type": "lora", "freeze_multi_modal_projector": False}
    -> {"projector": "full", "language_model": "lora"}
    """
    parts: dict[str, Any] = {}
    for part in _PART_FLAGS:
        if _opens(flags, part):
            parts[part] = _open_setting(flags, part)
        elif _written_flag(flags, part):
            parts[part] = "frozen"
    return parts


def deciding_flag(flags: Mapping[str, Any], part: str) -> str:
    """The written flag that gave `part` its place in the expansion."""
    if flags.get("train_mm_proj_only") and part == "projector":
        return "train_mm_proj_only"
    return _written_flag(flags, part) or "finetuning_type"


def check_flags(flags: Mapping[str, Any], where: Callable[[str], str]) -> list[Fault]:
    """Wrong values, or else every contradiction among the flags."""
    wrong = [Fault(flag, text) for flag, value in flags.items() if (text := _wrong_value(flag, value))]
    return wrong or [
        *_check_spelling(flags, where),
        *_check_projector_only(flags, where),
        *_check_finetuning_type(flags, where),
    ]


def compare_flags(
    flags: Mapping[str, Any], parts: Mapping[str, Any], where: Callable[[str], str]
) -> list[Fault]:
    """Where checked flags and a `parts` beside them say different things."""
    faults = []
    expanded = expand_flags(flags)
    for part in _PART_FLAGS:
        said, meant = _setting(expanded.get(part)), _setting(parts.get(part))
        if said[1] is None:  # the flags say nothing about layers
            meant = (meant[0], None)
        if said == meant or meant[0] not in MODES:
            continue
        flag = deciding_flag(flags, part) if part in expanded else next(iter(flags))
        said_text, meant_text = (
            mode + (f", layers {layers}" if layers else "") for mode, layers in (said, meant)
        )
        faults.append(
            Fault(
                flag,
                f"the freeze flags ({', '.join(flags)}) mean parts.{part}: {said_text}, but parts "
                f"({where(f'parts.{part}')}) means {meant_text}. Remove the flags, or parts.",
            )
        )
    return faults


def _written_flag(flags: Mapping[str, Any], part: str) -> str | None:
    return next((flag for flag in _PART_FLAGS[part] if flag in flags), None)


def _opens(flags: Mapping[str, Any], part: str) -> bool:
    if flags.get("train_mm_proj_only"):
        return part == "projector"
    flag = _written_flag(flags, part)
    return not (flags[flag] if flag else FLAGS[_PART_FLAGS[part][0]]["default"])


def _open_setting(flags: Mapping[str, Any], part: str) -> Any:
    if part == "projector":
        return "full"
    if flags["finetuning_type"] != "freeze":
        return flags["finetuning_type"]
    if part == "vision_tower":
        return "full"
    count = flags.get("freeze_trainable_layers", FLAGS["freeze_trainable_layers"]["default"])
    return {"mode": "full", "layers": f"{-count}:" if count > 0 else f":{-count}"}


def _setting(value: Any) -> tuple[str, str | None]:
    """Mode and layers of a part as `parts` writes it; a part that is not named is frozen."""
    if isinstance(value, Mapping):
        return str(value.get("mode", "without a mode")), value.get("layers")
    return ("frozen", None) if value is None else (str(value), None)


def _wrong_value(flag: str, value: Any) -> str | None:
    schema, shown = FLAGS[flag], json.dumps(value, default=str)
    if schema["type"] == "boolean" and not isinstance(value, bool):
        return f"{flag}: {shown} is not true or false."
    if schema["type"] == "integer" and type(value) is not int:
        return f"{flag}: {shown} is not a whole number."
    if flag == "freeze_trainable_layers" and value == 0:
        return f"{flag}: 0 trains no layer. 2 means the last two layers, -2 the first two."
    if "enum" in schema and value not in schema["enum"]:
        close = difflib.get_close_matches(str(value), schema["enum"], n=1)
        hint = f' Did you mean "{close[0]}"?' if close else ""
        return f"{flag}: {shown} is not one of {', '.join(schema['enum'])}.{hint}"
    return None


def _check_spelling(flags: Mapping[str, Any], where: Callable[[str], str]) -> Iterator[Fault]:
    if "freeze_language_model" in flags and "freeze_llm" in flags:
        yield Fault(
            "freeze_llm",
            "freeze_llm is another name of freeze_language_model, which is written too "
            f"({where('freeze_language_model')}). Keep one of them.",
        )


def _check_projector_only(flags: Mapping[str, Any], where: Callable[[str], str]) -> Iterator[Fault]:
    if not flags.get("train_mm_proj_only"):
        return
    for part, names in _PART_FLAGS.items():
        for flag in names:
            if flag in flags and flags[flag] == (part == "projector"):
                effect = "freezes it" if flags[flag] else f"opens {part}"
                yield Fault(
                    "train_mm_proj_only",
                    "train_mm_proj_only: true trains the projector alone, but "
                    f"{flag}: {json.dumps(flags[flag])} ({where(flag)}) {effect}. Remove one of them.",
                )


def _check_finetuning_type(flags: Mapping[str, Any], where: Callable[[str], str]) -> Iterator[Fault]:
    kind = flags.get("finetuning_type")
    if "freeze_trainable_layers" in flags and kind != "freeze":
        at = (
            f"finetuning_type: {kind} ({where('finetuning_type')})"
            if kind
            else "finetuning_type is not written"
        )
        yield Fault(
            "freeze_trainable_layers",
            f"freeze_trainable_layers works only with finetuning_type: freeze, but {at}. Change one of them.",
        )
    if kind == "freeze" and not _opens(flags, "language_model"):
        only = bool(flags.get("train_mm_proj_only"))
        flag = "train_mm_proj_only" if only else _written_flag(flags, "language_model")
        yield Fault(
            "finetuning_type",
            f"finetuning_type: freeze trains layers of the language model, but {flag}: true "
            f"({where(str(flag))}) freezes all of it. Remove one of them.",
        )
    opened = [part for part in ("vision_tower", "language_model") if _opens(flags, part)]
    if kind is None and opened:
        yield Fault(
            next(iter(flags)),
            f"finetuning_type is missing: the freeze flags open {' and '.join(opened)}, and nothing says how "
            "they train. Write finetuning_type: lora or finetuning_type: full.",
        )
