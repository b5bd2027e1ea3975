"""Whether a folder's files are, byte for byte, what was written.

In: a folder. Out: size and SHA-256 of each of its files, which its manifest keeps as `files`, and the faults
of a folder whose files are not that any more.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

BLOCK_BYTES = 4 << 20
NUM_THREADS = 8


def list_files(folder: Path, manifest_name: str) -> dict[str, dict[str, Any]]:
    """Name relative to the folder -> {"bytes", "sha256"} of every file in it but the manifest itself."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != manifest_name)
    with ThreadPoolExecutor(NUM_THREADS) as threads:
        digests = threads.map(sha256, paths)
        return {
            path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": digest}
            for path, digest in zip(paths, digests, strict=True)
        }


def verify_files(folder: Path, manifest: dict[str, Any], names: Collection[str] | None = None) -> list[str]:
    """What is wrong with the files that the manifest lists, one sentence without full stop for each.

    Empty where all are as they were written, also for a folder whose manifest lists none. Files beside them
    do not count. `names` restricts it to some of the files.
    """
    listed = {n: facts for n, facts in manifest.get("files", {}).items() if names is None or n in names}
    with ThreadPoolExecutor(NUM_THREADS) as threads:
        faults = threads.map(lambda item: file_fault(folder / item[0], item[1]), listed.items())
        return [f"{name} {fault}" for name, fault in zip(listed, faults, strict=True) if fault]


def file_fault(path: Path, expected: dict[str, Any]) -> str:
    try:
        found = path.stat().st_size
        if found != expected["bytes"]:
            return f"has {found:,} bytes, and {expected['bytes']:,} were written"
        digest = sha256(path)
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read: {error}"
    if digest != expected["sha256"]:
        return f"has the SHA-256 {digest[:12]}..., and {expected['sha256'][:12]}... was written"
    return ""


def sha256(path: Path) -> str:
    digest, block = hashlib.sha256(), bytearray(BLOCK_BYTES)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(memoryview(block)[:count])
    return digest.hexdigest()
