"""Where a folder comes from, as a tree, and whether its ancestors are still there as they were.

In: a folder that Partwise wrote, or any model or adapter folder. Out: Links, the folder first. The tree is
read from the folder's own manifest, so it is whole even when the ancestors are gone.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from partwise.errors import CheckpointError
from partwise.lineage.fingerprint import weights_fingerprint
from partwise.lineage.manifest import read_manifest, told_by
from partwise.model.folder import adapter_file, is_adapter, read_json, weight_files
from partwise.model.load import empty_model


@dataclass(frozen=True)
class Link:
    """A folder as its children recorded it. `state`: here, gone, unchanged or changed."""

    record: dict[str, Any]
    state: str
    parents: tuple[Link, ...]


def trace_lineage(folder: Path, verify: bool = False) -> Link:
    """The folder and its ancestors. `verify` reads the weights of those that are here and compares them.

    Raises:
        CheckpointError: it is no model or adapter folder, or its manifest is broken.
    """
    record = {"path": str(folder), "kind": "model", **recorded(folder)}
    return make_link(record, verify)


def recorded(folder: Path) -> dict[str, Any]:
    """What the folder says of itself; of another tool's adapter that is the name of its base."""
    manifest = read_manifest(folder)
    if manifest:
        return told_by(manifest)
    if is_adapter(folder):
        base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
        return {"kind": "adapter", "parents": [{"path": str(base), "kind": "model"}]}
    weight_files(folder)
    return {}


def make_link(record: dict[str, Any], verify: bool) -> Link:
    parents = tuple(make_link(parent, verify) for parent in record.get("parents", ()))
    return Link(record, state_of(record, verify), parents)


def shown_path(path: str) -> str:
    """A recorded path as it is told here: from the working directory, where it lies below that."""
    folder = Path(path)
    return str(folder.relative_to(Path.cwd())) if folder.is_relative_to(Path.cwd()) else path


def state_of(record: dict[str, Any], verify: bool) -> str:
    folder = Path(record["path"])
    if not folder.is_dir():
        return "gone"
    if not verify or "fingerprint" not in record:
        return "here"
    try:
        if record["kind"] == "adapter":
            model, files = empty_model(record["parents"][0]["path"]), [adapter_file(folder)]
        else:
            model, files = empty_model(folder), weight_files(folder)
        same = weights_fingerprint(files, model).whole == record["fingerprint"]
    except CheckpointError:
        return "changed"
    return "unchanged" if same else "changed"
