"""The optimizer's state in a checkpoint: masters, moments and step counts, in the shards of any engine.

In: the files of a checkpoint. Out: any stretch of a flattened tensor, put together from the shards that it
crosses. A file holds tensors by "kind/parameter name"; where they are shards, its metadata says of each
parameter where the shard begins and what the whole shape is. So a run goes on with another engine or number
of ranks. Moments in 8 bits are taken over as they are where the stretch is the same, else decoded.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from partwise.engine.single import Stretch
from partwise.training.adamw import PLAIN_KINDS, STATE_KINDS, moments

STATE_FOLDER = "training_state"
MASTER = "master"


def state_file(rank: int = 0, num_ranks: int = 1) -> str:
    """Where a rank writes its shards, relative to the checkpoint."""
    shard = f"-{rank + 1:05d}-of-{num_ranks:05d}" if num_ranks > 1 else ""
    return f"{STATE_FOLDER}/optimizer{shard}.safetensors"


def state_files(folder: Path) -> list[str]:
    """All that there should be, relative to the checkpoint: of as many ranks as a file's name says."""
    found = sorted((folder / STATE_FOLDER).glob("optimizer*.safetensors"))
    counts = {int(m[1]) for path in found if (m := re.search(r"-of-(\d+)\.safetensors$", path.name))}
    num_ranks = max(counts, default=1)
    return [state_file(rank, num_ranks) for rank in range(num_ranks)]


def write_state(path: Path, state: dict[str, Tensor], stretches: Mapping[str, Stretch]) -> None:
    """One rank's state; without `stretches` its tensors are whole."""
    metadata = {"stretches": json.dumps(stretches)} if stretches else None
    save_file(state, path, metadata=metadata)


@dataclass(frozen=True)
class Piece:
    """One file's shard of a parameter's state; of a whole one the shape is the master's own."""

    file: Any
    name: str
    start: int
    shape: tuple[int, ...]
    numel: int

    def get(self, kind: str) -> Tensor:
        return self.file.get_tensor(f"{kind}/{self.name}")

    def state(self, kinds: Sequence[str] = STATE_KINDS) -> dict[str, Tensor]:
        keys = set(self.file.keys())
        return {kind: self.get(kind) for kind in kinds if f"{kind}/{self.name}" in keys}

    def moments(self) -> dict[str, Tensor]:
        """Flat, in fp32; none before the first update."""
        state = self.state()
        pairs = list(moments(state)) if "step" in state else []
        if not pairs:
            return {}
        return {
            kind: torch.cat([pair[i].reshape(-1) for pair in pairs]) for i, kind in enumerate(PLAIN_KINDS)
        }


class SavedState:
    """What the files hold together."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.pieces: dict[str, list[Piece]] = defaultdict(list)
        for path in paths:
            file = safe_open(path, "pt")
            stretches = json.loads((file.metadata() or {}).get("stretches", "{}"))
            for key in file.keys():  # noqa: SIM118 - not a mapping
                kind, _, name = key.partition("/")
                if kind == MASTER:
                    shape = tuple(file.get_slice(key).get_shape())
                    start, whole = stretches.get(name, (0, shape))
                    numel = torch.Size(shape).numel()
                    self.pieces[name].append(Piece(file, name, start, tuple(whole), numel))

    @property
    def names(self) -> set[str]:
        return set(self.pieces)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole parameter."""
        return self.pieces[name][0].shape

    def master(self, name: str, start: int, numel: int) -> Tensor:
        """(numel,) elements of the flattened master, from `start` on."""
        return self._join(
            {piece: piece.get(MASTER) for piece in self._crossed(name, start, numel)}, start, numel
        )

    def state(self, name: str, start: int, numel: int) -> dict[str, Tensor]:
        """AdamW's state of the same stretch, flat; empty where it was never updated."""
        crossed = self._crossed(name, start, numel)
        for piece in crossed:
            if (piece.start, piece.numel) == (start, numel):
                return {k: t if k == "step" else t.reshape(-1) for k, t in piece.state().items()}
        steps = [piece.state(("step",)) for piece in self.pieces[name]]
        step = next((state["step"] for state in steps if state), None)
        decoded = {piece: piece.moments() for piece in crossed}
        if step is None or not all(decoded.values()):
            return {}
        joined = {
            kind: self._join({p: tensors[kind] for p, tensors in decoded.items()}, start, numel)
            for kind in PLAIN_KINDS
        }
        return {"step": step, **joined}

    def _crossed(self, name: str, start: int, numel: int) -> list[Piece]:
        pieces = sorted(self.pieces[name], key=lambda piece: piece.start)
        return [p for p in pieces if p.start < start + numel and start < p.start + p.numel]

    @staticmethod
    def _join(tensors: Mapping[Piece, Tensor], start: int, numel: int) -> Tensor:
        parts, end = [], start
        for piece, tensor in tensors.items():
            first, last = max(end, piece.start), min(start + numel, piece.start + piece.numel)
            parts.append(tensor.reshape(-1)[first - piece.start : last - piece.start])
            end = max(end, last)
        return torch.cat(parts) if parts else torch.empty(0)
