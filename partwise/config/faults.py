"""What is wrong with written values, in sentences for the person who wrote them.

In: the values of a document, and what pydantic says about them. Out: faults with one text each: unknown keys
with the name or the section that was probably meant, wrong values with what would be right. The rules between
several keys are in config.py.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from partwise.config.document import Fault

SectionTypes = Mapping[str, type[BaseModel]]
# What stands for a place in a list, in the name of a section.
ANY_ITEM = "*"

_TYPE_TEXTS = {
    "string_type": "is not text; put it in quotes",
    "int_type": "is not a whole number",
    "int_from_float": "is not a whole number",
    "float_type": "is not a number",
    "bool_type": "is not true or false",
    "list_type": "is not a list",
    "tuple_type": "is not a list, such as [0.9, 0.999]",
    "model_type": "is not a section; write its keys on indented lines below it",
    "greater_than": "must be greater than {gt:g}",
    "greater_than_equal": "must be at least {ge:g}",
    "less_than": "must be less than {lt:g}",
    "less_than_equal": "must be at most {le:g}",
    "string_too_short": "is empty",
    "too_short": "is too short: give {min_length} or more",
    "too_long": "is too long: give {max_length}",
}


def split_unknown(
    values: Mapping[str, Any], keys: Mapping[str, Collection[str]], section: str = ""
) -> tuple[dict[str, Any], list[Fault]]:
    """The values without the keys that no section has, and a fault for each of those keys.

    `keys` holds the key names of each section; "" is the top level.
    """
    known: dict[str, Any] = {}
    faults: list[Fault] = []
    for name, value in values.items():
        key = f"{section}.{name}" if section else name
        if name not in keys[section]:
            faults.append(Fault(key, f"{key}: unknown key. {_suggest_key(name, section, keys)}"))
        elif key in keys and isinstance(value, Mapping):
            known[name], inner = split_unknown(value, keys, key)
            faults += inner
        else:
            known[name] = value
    return known, faults


def explain_errors(error: ValidationError, sections: SectionTypes, tags: Collection[str]) -> Iterator[Fault]:
    """One fault per pydantic error. `tags` are the names of union members, which are no part of a key."""
    for details in error.errors():
        key = ".".join(str(item) for item in details["loc"] if item not in tags)
        yield Fault(key, f"{key}: {_explain(details, key, sections)}")


def key_names(section: type[BaseModel]) -> list[str]:
    """As a config writes them."""
    return [field.alias or name for name, field in section.model_fields.items()]


def show_value(value: Any) -> str:
    """The value as YAML and JSON both write it, shortened."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _suggest_key(name: str, section: str, keys: Mapping[str, Collection[str]]) -> str:
    for home, names in keys.items():
        if name in names:
            return f'It belongs under "{home}:".' if home else "It belongs at the top level."
    if close := difflib.get_close_matches(name, keys[section], n=1):
        return f'Did you mean "{close[0]}"?'
    for home, names in keys.items():
        if close := difflib.get_close_matches(name, names, n=1, cutoff=0.75):
            return f'Did you mean "{f"{home}.{close[0]}".lstrip(".")}"?'
    return f"The keys here are {', '.join(keys[section])}."


def _explain(details: ErrorDetails, key: str, sections: SectionTypes) -> str:
    kind, value, context = details["type"], details["input"], details.get("ctx", {})
    if kind == "extra_forbidden":
        section, _, name = re.sub(r"\.\d+\b", f".{ANY_ITEM}", key).rpartition(".")
        names = {home: key_names(section) for home, section in sections.items()}
        return f"unknown key. {_suggest_key(name, section, names)}"
    if kind == "missing":
        return f"missing. {_describe(key, sections)}"
    if kind == "value_error":
        return f"{show_value(value)} {context['error']}"
    if kind == "literal_error":
        return _explain_choice(value, re.findall(r"'([^']*)'", context["expected"]))
    if kind == "model_type" and value is None:
        return "is empty. Write its keys on indented lines below it, or remove it."
    if kind in _TYPE_TEXTS:
        return f"{show_value(value)} {_TYPE_TEXTS[kind].format(**context)}."
    return f"{show_value(value)}: {details['msg']}."


def _explain_choice(value: Any, choices: list[str]) -> str:
    close = difflib.get_close_matches(value.lower(), choices, n=1) if isinstance(value, str) else []
    hint = f' Did you mean "{close[0]}"?' if close else ""
    return f"{show_value(value)} is not one of {', '.join(choices)}.{hint}"


def _describe(key: str, sections: SectionTypes) -> str:
    section, _, name = key.rpartition(".")
    if section not in sections or name not in sections[section].model_fields:
        return "Write one value more."
    return f"It must be given: {sections[section].model_fields[name].description}"
