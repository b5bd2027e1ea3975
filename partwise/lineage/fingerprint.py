"""Files and weights known by their content.

In: files, or a model folder and its empty model. Out: SHA-256 digests. Those of weights are per part, over
every byte of every tensor under the name that it has in the model, so they do not depend on how the tensors
lie in files, or on the layout of names that the version of transformers that wrote them used.
"""

from __future__ import annotations

import hashlib
import mmap
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from partwise.lineage.checksums import BLOCK_BYTES, sha256
from partwise.model.folder import read_header
from partwise.model.names import name_finder, part_finder

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Fingerprint:
    """Digests of a model's weights, by part, and of them all."""

    parts: dict[str, str]

    @property
    def whole(self) -> str:
        return _digest(f"{part}:{digest}" for part, digest in sorted(self.parts.items()))

    def differing(self, other: Mapping[str, str]) -> list[str]:
        """The parts whose digests are not those of `other`."""
        names = sorted(self.parts.keys() | other.keys())
        return [part for part in names if self.parts.get(part) != other.get(part)]


def weights_fingerprint(
    files: Sequence[Path], model: PreTrainedModel, parts: Collection[str] | None = None
) -> Fingerprint:
    """The fingerprint of the weights in these files: a model's, or an adapter's on that model.

    `model` has their names and parts; it may be on the meta device. Pickled weights are known by whole
    files, without parts. With `parts`, no other tensors are read.

    Raises:
        CheckpointError: a file is not whole.
    """
    if any(file.suffix != ".safetensors" for file in files):
        return Fingerprint({file.name: sha256(file) for file in files})
    part_of, name_of = part_finder(model), name_finder(model)
    entries: dict[str, list[str]] = defaultdict(list)
    for file in files:
        wanted = {name for name in read_header(file)[0] if not parts or part_of(name_of(name)) in parts}
        for source, digest in hash_tensors(file, wanted).items():
            name = name_of(source)
            if name not in model.all_tied_weights_keys:
                entries[part_of(name)].append(f"{name}:{digest}")
    return Fingerprint({part: _digest(sorted(lines)) for part, lines in entries.items()})


def hash_tensors(file: Path, wanted: Collection[str]) -> dict[str, str]:
    """The digest of each wanted tensor of a safetensors file: type, shape and bytes.

    Raises:
        CheckpointError: the file is not whole.
    """
    header, start = read_header(file)
    header = {name: tensor for name, tensor in header.items() if name in wanted}
    with (
        file.open("rb") as opened,
        mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
        memoryview(mapped) as view,
        ThreadPoolExecutor() as pool,
    ):
        digests = pool.map(lambda tensor: _hash_tensor(view, start, tensor), header.values())
        return dict(zip(header, digests, strict=True))


def _hash_tensor(view: memoryview, start: int, tensor: dict) -> str:
    first, end = tensor["data_offsets"]
    digest = hashlib.sha256(f"{tensor['dtype']}{tensor['shape']}".encode())
    with view[start + first : start + end] as content:
        digest.update(content)
    return digest.hexdigest()


def fingerprint_files(paths: Iterable[Path]) -> str:
    """One digest over names, sizes and contents of files; of very large ones over samples of it."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{path.name}:{path.stat().st_size}\n".encode())
        for block in sample_blocks(path):
            digest.update(block)
    return digest.hexdigest()


def sample_blocks(path: Path, whole: int = 1 << 30, num_blocks: int = 1 << 16) -> Iterator[bytes]:
    """The first GiB of a file, and 65,536 blocks of 4 KiB at even distances over the rest."""
    size = path.stat().st_size
    with path.open("rb") as file:
        for offset in range(0, min(whole, size), BLOCK_BYTES):
            yield file.read(min(BLOCK_BYTES, whole - offset))
        for offset in range(whole, size, max(4096, (size - whole) // num_blocks)):
            file.seek(offset)
            yield file.read(4096)


def _digest(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
