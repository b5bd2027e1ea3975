"""The reference page of the config, from its JSON schema.

In: the schema that config.py makes. Out: Markdown with a table per section and the table of the freeze flags,
which is computed by expanding them. What a key means is written at its field, not here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from partwise.config.flags import FLAGS, USUAL_PARTS, check_flags, expand_flags
from partwise.records import PART_NAMES

_INTRODUCTION = f"""\
# Config

One YAML file holds a run; `key.path=value` on the command line overrides one key, as in
`train.steps=100`. An unknown key, a wrong value or a setting without effect is an error that names the
line, and all errors of a file are shown together.
This page is generated: `python -m partwise.config > docs/config.md`.

`model`, `data`, `output`, and `parts` or the freeze flags must be given. The usual recipe is
`{USUAL_PARTS}`.
"""
_FLAGS_INTRODUCTION = """\
## The freeze flags

They may stand at the top level instead of `parts`, and are short for it: `partwise` expands them and prints
the result. `parts` and flags together are an error unless both mean the same; so are flags that contradict
each other, and a flag for a part that the model does not have.
"""
_STAGES_INTRODUCTION = """\
## Stages

`stages` is a list; each item has these keys. docs/stages.md tells what they do.
"""
_STAGE_TABLES = {
    "A stage": "StageConfig",
    "A part in a stage": "StagePartConfig",
    "until of a stage": "StableConfig",
    "data of a stage": "StageDataConfig",
    "unfreeze, at the top level": "UnfreezeConfig",
}
_FLAG_ROWS: tuple[dict[str, bool], ...] = (
    {},
    {"freeze_multi_modal_projector": False},
    {"train_mm_proj_only": True},
    {"freeze_vision_tower": False, "freeze_multi_modal_projector": False},
    {"freeze_vision_tower": False},
    {"freeze_vision_tower": False, "freeze_language_model": True},
)


def write_reference(schema: Mapping[str, Any]) -> str:
    """Markdown of the whole page."""
    sections = {
        name: schema["$defs"][reference.rpartition("/")[2]]
        for name, field in schema["properties"].items()
        if (reference := next((f["$ref"] for f in (field, *field.get("anyOf", ())) if "$ref" in f), ""))
    }
    top = {name: field for name, field in schema["properties"].items() if name not in FLAGS}
    tables = [_INTRODUCTION, "## Top level\n", _table(top, schema.get("required", ()))]
    for name, section in sections.items():
        tables += [f"## {name}\n", *_paragraph(section)]
        tables.append(_table(section["properties"], section.get("required", ())))
        if name == "parts":
            part = schema["$defs"]["PartConfig"]
            tables += ["### Settings of a part\n", _table(part["properties"], part["required"])]
    track = schema["$defs"]["TrackConfig"]
    tables += ["## track\n", *_paragraph(track), _table(track["properties"], track["required"])]
    tables.append(_STAGES_INTRODUCTION)
    for title, name in _STAGE_TABLES.items():
        definition = schema["$defs"][name]
        tables += [f"### {title}\n", _table(definition["properties"], definition.get("required", ()))]
    return "\n".join([*tables, _FLAGS_INTRODUCTION, _table(FLAGS, ()), _expansions()])


def _paragraph(section: Mapping[str, Any]) -> list[str]:
    return [f"{section['description']}\n"] if "description" in section else []


def _table(fields: Mapping[str, Mapping[str, Any]], required: Iterable[str]) -> str:
    lines = ["| key | type | default | unit | what it is |", "|---|---|---|---|---|"]
    for name, field in fields.items():
        default = "required" if name in required else _show(field.get("default"))
        cells = (f"`{name}`", _type(field), default, _unit(field), field.get("description", ""))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _show(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{list(value) if isinstance(value, tuple | list) else value}`"


def _type(field: Mapping[str, Any]) -> str:
    if members := field.get("anyOf") or field.get("oneOf"):
        return " or ".join(_type(member) for member in members if member.get("type") != "null")
    if "$ref" in field:
        is_alternative = field["$ref"].endswith(("/PartConfig", "/StagePartConfig", "/StableConfig"))
        return "settings" if is_alternative else "section"
    if "additionalProperties" in field:
        return "settings of parts by name"
    if "enum" in field:
        return ", ".join(f"`{choice}`" for choice in field["enum"])
    if field["type"] == "array":
        items = field.get("prefixItems")
        return f"list of {len(items)} numbers" if items else f"list of {_type(field['items'])}"
    if "const" in field:
        return f"`{field['const']}`"
    names = {"string": "text", "integer": "whole number", "number": "number", "boolean": "true or false"}
    signs = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}
    bounds = [f"{sign} {field[name]:g}" for name, sign in signs.items() if name in field]
    return " ".join([names[field["type"]], *([", ".join(bounds)] if bounds else [])])


def _unit(field: Mapping[str, Any]) -> str:
    fields = (field, *field.get("anyOf", ()))
    return next((member["unit"] for member in fields if "unit" in member), "")


def _expansions() -> str:
    kinds = FLAGS["finetuning_type"]["enum"]
    lines = [
        "What the flags stand for, with each `finetuning_type` (a part that is not listed stays frozen):\n",
        "| flags | " + " | ".join(f"`{kind}`" for kind in kinds) + " |",
        "|---|" + "---|" * len(kinds),
    ]
    for flags in _FLAG_ROWS:
        shown = ", ".join(f"`{name}: {str(value).lower()}`" for name, value in flags.items())
        cells = [_expansion({**flags, "finetuning_type": kind}) for kind in kinds]
        lines.append(f"| {shown or 'none'} | " + " | ".join(cells) + " |")
    lines.append("| all three `true` | " + " | ".join("error" for _ in kinds) + " |")
    return "\n".join(lines) + "\n"


def _expansion(flags: Mapping[str, Any]) -> str:
    if check_flags(flags, lambda flag: flag):
        return "error"
    parts = expand_flags(flags)
    shown = []
    for part in PART_NAMES:
        setting = parts.get(part, "frozen")
        if isinstance(setting, Mapping):
            setting = f"{setting['mode']}, layers {setting['layers']}"
        if setting != "frozen":
            shown.append(f"{part} {setting}")
    return "; ".join(shown)
