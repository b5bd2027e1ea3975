"""Files and weights known by their content.

In: files or a model folder. Out: SHA-256 digests.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path


def base_fingerprint(folder: str | Path) -> str:
    """SHA-256 over a model folder's config and a sample of its weights; "" where there is no such folder.

    The sample has every file's name, size and head (tensor names, types and shapes) and small blocks all
    over it: enough to tell one fine-tune from another, and read in a moment.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return ""
    weights = sorted(path for pattern in ("*.safetensors", "*.bin") for path in folder.glob(pattern))
    return fingerprint_files([folder / "config.json", *weights])


def fingerprint_files(paths: Iterable[Path]) -> str:
    """SHA-256 over names, sizes and samples of the files."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{path.name}:{path.stat().st_size}\n".encode())
        for block in sample_blocks(path):
            digest.update(block)
    return digest.hexdigest()


def sample_blocks(
    path: Path, head: int = 1 << 20, num_blocks: int = 4096, block: int = 64
) -> Iterable[bytes]:
    """The first MiB of a file, and blocks of 64 bytes at even distances over the rest."""
    size = path.stat().st_size
    with path.open("rb") as file:
        yield file.read(head)
        stride = max(block, (size - head) // num_blocks)
        for offset in range(head, size, stride):
            file.seek(offset)
            yield file.read(block)
