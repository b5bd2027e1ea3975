"""A folder that appears at once, on disk, or not at all.

In: a function that fills a folder, and its manifest. Out: the folder under its name. It is written under a
temporary name, flushed and renamed, and its manifest is the last file written: a folder with a manifest is
whole. Which files are in it is the caller's business.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from partwise.errors import TrainingError
from partwise.lineage.checksums import list_files
from partwise.lineage.manifest import MANIFEST


def partial_of(folder: Path) -> Path:
    """The temporary name of a folder that is being written."""
    return folder.with_name(f".{folder.name}.partial")


def open_partial(folder: Path) -> None:
    """The empty temporary folder, in place of what a kill left there. Raises: TrainingError."""
    partial = partial_of(folder)
    with told(folder):
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)


@contextmanager
def told(folder: Path) -> Iterator[None]:
    """A block in which a refusal of the disk is a TrainingError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise TrainingError(
            f"cannot write {folder}: {error}. Earlier checkpoints are untouched: "
            "free space or make the folder writable, then resume."
        ) from error


def publish(
    folder: Path, write: Callable[[Path], None], manifest: dict[str, Any], is_open: bool = False
) -> Path:
    """`folder` as `write` fills it, with the manifest: either all of it appears, on disk, or nothing.

    `is_open`: the temporary folder was opened before, for several that write into it.

    Raises:
        TrainingError: the disk refuses. The temporary folder is gone and an older `folder` untouched.
    """
    partial = partial_of(folder)
    if not is_open:
        open_partial(folder)
    try:
        with told(folder):
            write(partial)
            share_files(partial)
            sync_tree(partial)
            write_manifest(partial, manifest)
            replace_folder(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
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


def share_files(folder: Path) -> None:
    """Files are for whom the user's umask says, as the folder is: safetensors 0.8 writes for the owner."""
    mode = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file():
            with suppress(OSError):  # file systems without modes
                path.chmod(mode)


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
    """partwise.json, with the size and checksum of every file that is in the folder now."""
    path = folder / MANIFEST
    path.write_text(json.dumps({**manifest, "files": list_files(folder, MANIFEST)}, indent=2) + "\n")
    sync(path)
    sync(folder)
