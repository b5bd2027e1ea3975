"""A folder that appears at once, on disk, or not at all.

In: a function that fills a folder, and its manifest. Out: the folder under its name. It is written under a
temporary name, flushed and renamed, and its manifest is the last file written: a folder with a manifest is
whole. Which files are in it is the caller's business.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from partwise.errors import TrainingError
from partwise.lineage.manifest import MANIFEST


def publish(folder: Path, write: Callable[[Path], None], manifest: dict[str, Any]) -> Path:
    """`folder` as `write` fills it, with the manifest: either all of it appears, on disk, or nothing.

    Raises:
        TrainingError: the disk refuses. The temporary folder is gone and an older `folder` untouched.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write(partial)
        sync_tree(partial)
        write_manifest(partial, manifest)
        replace_folder(partial, folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise TrainingError(
            f"cannot write {folder}: {error}. Earlier checkpoints are untouched: "
            "free space or make the folder writable, then resume."
        ) from error
    return folder


def replace_folder(new: Path, folder: Path) -> None:
    """Rename `new` to `folder`; an older one steps aside first, because a rename never overwrites folders."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def sync_tree(folder: Path) -> None:
    """Flush every file and folder in it to disk."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    path = folder / MANIFEST
    path.write_text(json.dumps(manifest, indent=2) + "\n")
    sync(path)
    sync(folder)
