"""One YAML file and its overrides as plain values, with the place where each key was written.

In: a path and `key.path=value` overrides. Out: a `Document`: nested dicts, lists and scalars, the origin of
every key, and the faults that are visible here (double keys, unreadable values). Plain scalars follow YAML
1.2: 1e-4 is a number, "on" and "yes" are text, 4:12 is text. What keys mean is not known here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from partwise.errors import ConfigError


class Fault(NamedTuple):
    """Something wrong with `key`; `text` names the key itself."""

    key: str
    text: str


@dataclass(frozen=True)
class Document:
    """`origins` has each written key, dotted, in the order of writing; "" is the file."""

    values: dict[str, Any]
    origins: dict[str, str]
    faults: list[Fault]


def find_origin(origins: dict[str, str], key: str) -> str:
    """Origin of a dotted key, or of its nearest parent that is written."""
    while key not in origins and key:
        key = key.rpartition(".")[0]
    return origins.get(key, "the config")


def join_origins(origins: Iterable[str]) -> str:
    """["a.yaml:4", "a.yaml:5", "a.yaml:6"] -> "a.yaml:4-6"; other places side by side."""
    origins = list(dict.fromkeys(origins))
    places = [re.fullmatch(r"(.*):(\d+)", origin) for origin in origins]
    lines = sorted(int(place[2]) for place in places if place)
    names = {place[1] if place else None for place in places}
    if len(lines) < 2 or len(names) > 1 or lines[-1] - lines[0] != len(lines) - 1:
        return ", ".join(origins)
    return f"{names.pop()}:{lines[0]}-{lines[-1]}"


def join_faults(origins: dict[str, str], faults: Iterable[Fault]) -> str:
    """One line per fault, in the order of the file."""
    order = {origin: index for index, origin in enumerate(origins.values())}
    lines = {(find_origin(origins, fault.key), fault.text) for fault in faults}
    return "\n".join(f"{at}: {text}" for at, text in sorted(lines, key=lambda x: (order.get(x[0], -1), x[1])))


def read_document(path: str | Path, overrides: Iterable[str] = ()) -> Document:
    """
    Raises:
        ConfigError: the file cannot be read, is not YAML, is empty, or has no keys at its top level.
    """
    name = str(path)
    node = _compose(_read(Path(path)), name)
    if node is None or (isinstance(node, yaml.ScalarNode) and _plain(node) is None):
        raise ConfigError(
            f"{name}:1: the file is empty. A config needs at least model, parts, data and output."
        )
    if not isinstance(node, yaml.MappingNode):
        kind = "list" if isinstance(node, yaml.SequenceNode) else "single value"
        raise ConfigError(
            f"{name}:{_line(node)}: the top level is a {kind}. "
            "A config is keys and values, such as output: runs/a."
        )
    document = Document({}, {"": name}, [])
    try:
        document.values.update(_build(document, node, "", lambda child: f"{name}:{_line(child)}"))
    except RecursionError:
        raise ConfigError(
            f"{name}: an alias (*name) refers to itself. Write the value out instead."
        ) from None
    for override in overrides:
        _apply(document, override)
    return document


def write_yaml(values: dict[str, Any]) -> str:
    """YAML that `read_document` reads back to equal values."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such config file (looked in {Path.cwd()}).") from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: not a text file in UTF-8 (byte {error.start}). Give a YAML file."
        ) from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}. Give a YAML file.") from None


class _Loader(yaml.SafeLoader):
    pass


_Loader.yaml_implicit_resolvers = {}
_TAG = "tag:yaml.org,2002:"
_PLAIN: dict[str, tuple[str, Callable[[str], Any]]] = {
    "null": (r"(~|null|Null|NULL|)", lambda text: None),
    "bool": (r"(true|True|TRUE|false|False|FALSE)", lambda text: text.lower() == "true"),
    "int": (r"[-+]?(0|[1-9][0-9_]*)", int),
    "float": (r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?", float),
    "str": (r"(?!)", str),
}
for _kind, (_pattern, _) in _PLAIN.items():
    _Loader.add_implicit_resolver(_TAG + _kind, re.compile(f"^{_pattern}$"), None)


class _Dumper(yaml.SafeDumper):
    """Quotes what YAML 1.1 would misread, and text that is a number here."""


_Dumper.add_implicit_resolver(f"{_TAG}float", re.compile(f"^{_PLAIN['float'][0]}$"), None)


def _compose(text: str, name: str) -> yaml.Node | None:
    try:
        return yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f"{name}:{mark.line + 1}" if mark else name
        raise ConfigError(
            f"{at}: this is not YAML: {error.problem}. Look at indentation, colons and quotes here and above."
        ) from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: this is not YAML: {' '.join(str(error).split())}.") from None
    except RecursionError:
        raise ConfigError(f"{name}: this is not a config: values are nested too deeply.") from None


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _plain(node: yaml.ScalarNode) -> Any:
    return _PLAIN[node.tag.removeprefix(_TAG)][1](node.value)


def _join(prefix: str, name: object) -> str:
    return f"{prefix}.{name}" if prefix else str(name)


def _build(document: Document, node: yaml.Node, key: str, origin: Callable[[yaml.Node], str]) -> Any:
    """The node's value; records the origin of every key below it, and its faults."""
    if isinstance(node, yaml.MappingNode):
        return dict(_build_items(document, node, key, origin))
    if isinstance(node, yaml.SequenceNode):
        for index, child in enumerate(node.value):
            document.origins[_join(key, index)] = origin(child)
        return [_build(document, child, _join(key, i), origin) for i, child in enumerate(node.value)]
    assert isinstance(node, yaml.ScalarNode)
    if fault := _check_characters(node.value, key):
        document.faults.append(fault)
        return _BAD_CHARACTER.sub("?", node.value)  # a text still, so that this is its only fault
    try:
        return _plain(node)
    except (KeyError, ValueError):
        document.faults.append(
            Fault(key, f'{key}: cannot read "{node.value}" as {node.tag}. Write it without the tag.')
        )
        return None


_BAD_CHARACTER = re.compile("[\x00\ud800-\udfff]")


def _check_characters(text: str, key: str) -> Fault | None:
    """A fault where the text holds what no file name or UTF-8 file can: a null, or half of a character."""
    bad = _BAD_CHARACTER.search(text)
    if not bad:
        return None
    return Fault(key, f"{key or 'top level'}: {text!a:.80} holds {bad.group()!a}. Write it without.")


def _build_items(
    document: Document, node: yaml.MappingNode, prefix: str, origin: Callable[[yaml.Node], str]
) -> Iterator[tuple[str, Any]]:
    seen: set[str] = set()
    for name_node, child in node.value:
        if not isinstance(name_node, yaml.ScalarNode):
            document.faults.append(
                Fault(prefix, f"{prefix or 'top level'}: line {_line(name_node)}: a key is one word.")
            )
            continue
        if fault := _check_characters(name_node.value, prefix):
            document.faults.append(fault)
            continue
        name, key = name_node.value, _join(prefix, name_node.value)
        if name in seen:
            again = _line(name_node)
            document.faults.append(
                Fault(key, f"{key}: written twice, here and in line {again}. Keep one of them.")
            )
            continue
        seen.add(name)
        document.origins[key] = origin(name_node)
        yield name, _build(document, child, key, origin)


def _apply(document: Document, override: str) -> None:
    """Set one key from `key.path=value`. A value that opens no list, mapping or quote is one plain scalar."""
    shown = _BAD_CHARACTER.sub("?", override)
    label = f'override "{shown}"'
    if fault := _check_characters(override, shown):
        document.origins[shown] = label
        document.faults.append(fault)
        return
    key, equals, text = override.partition("=")
    names = key.strip().split(".")
    if not equals or not all(names):
        document.origins[override] = label
        document.faults.append(Fault(override, "an override is key.path=value, such as train.steps=100."))
        return
    parent: Any = document.values
    for depth, name in enumerate(names[:-1], start=1):
        path = ".".join(names[:depth])
        child = parent.get(name)
        if isinstance(child, str) and path.startswith("parts."):
            child = {"mode": child}  # a mode alone is short for settings with this mode
        elif child is None:
            child = {}
        if not isinstance(child, dict):
            document.origins[override] = label
            document.faults.append(Fault(override, f"{path} has no keys of its own. Override {path} itself."))
            return
        document.origins.setdefault(path, label)
        parent[name] = child
        parent = child
    _set(document, parent, names, text.strip(), label)


def _set(document: Document, parent: dict[str, Any], names: list[str], text: str, label: str) -> None:
    key = ".".join(names)
    for old in [k for k in document.origins if k == key or k.startswith(f"{key}.")]:
        del document.origins[old]
    document.origins[key] = label
    if text[:1] in ("[", "{", '"', "'"):
        node = _compose(text, label)
        assert node is not None
    else:
        resolver = _Loader("")
        node = yaml.ScalarNode(resolver.resolve(yaml.ScalarNode, text, (True, False)), text)
    parent[names[-1]] = _build(document, node, key, lambda _: label)
