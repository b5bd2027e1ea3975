"""Rows of a step -> packs: which rows share one, and where documents and images lie in it.

In: lengths in tokens, or the laid-out ids of a pack. Out: positions of rows for each pack, and a Pack. A pack
is a micro-batch of one row that holds documents one after the other, so that hardly a position is padding.
Which rows a step has is decided before: packs change neither its loss nor its gradient.

Letters: T tokens of the pack or of one example.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

import torch
from torch import Tensor

from partwise.records import Example, Pack, Span

# Lengths of packs are multiples of it: matrix kernels work in tiles, and shapes come again.
PACK_MULTIPLE = 64


@dataclass(frozen=True)
class PackFormat:
    """How a model's packs are made. May be sent to other processes.

    `image_field`: the token field whose runs of ones see each other in both directions, where the model has
    one. `positions` gives an example's positions, (axes, 1, T), where the model counts along several axes.
    """

    max_tokens: int
    image_field: str | None = None
    positions: Callable[[Example], Tensor] | None = None

    def position_ids(self, example: Example) -> Tensor:
        """(1, T), or (axes, 1, T); they begin anew in every document."""
        if self.positions is not None:
            return self.positions(example)
        return torch.arange(len(example.input_ids))[None]

    def padded_length(self, num_tokens: int) -> int:
        """A multiple of PACK_MULTIPLE, where `max_tokens` leaves room for it."""
        return max(num_tokens, min(-(-num_tokens // PACK_MULTIPLE) * PACK_MULTIPLE, self.max_tokens))


def plan_packs(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """For each pack its positions in `lengths`, ascending; the fullest pack first.

    Best-fit decreasing says how many packs there are; then rows are spread so that packs are about equally
    long, where that many are enough for it. No length may be above `max_tokens`.
    Example: lengths (5, 4, 3, 2) in packs of 8 -> [0, 3] and [1, 2], 7 tokens each.
    """
    order = sorted(range(len(lengths)), key=lambda position: -lengths[position])
    filled = fill_packs(lengths, order, max_tokens)
    packs = spread_rows(lengths, order, max_tokens, len(filled)) or filled
    packs.sort(key=lambda pack: -sum(lengths[position] for position in pack))
    return [sorted(pack) for pack in packs]


def fill_packs(lengths: Sequence[int], order: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Each row goes where it leaves the least room, or into a new pack."""
    packs: list[list[int]] = []
    room: list[int] = []
    for position in order:
        fitting = [pack for pack, left in enumerate(room) if left >= lengths[position]]
        if fitting:
            best = min(fitting, key=lambda pack: room[pack])
        else:
            best = len(packs)
            packs.append([])
            room.append(max_tokens)
        packs[best].append(position)
        room[best] -= lengths[position]
    return packs


def spread_rows(
    lengths: Sequence[int], order: Sequence[int], max_tokens: int, num_packs: int
) -> list[list[int]] | None:
    """Each row goes to the pack that has the fewest tokens; None where one does not fit there."""
    packs: list[list[int]] = [[] for _ in range(num_packs)]
    loads = [(0, pack) for pack in range(num_packs)]
    heapify(loads)
    for position in order:
        load, pack = heappop(loads)
        if load + lengths[position] > max_tokens:
            return None
        packs[pack].append(position)
        heappush(loads, (load + lengths[position], pack))
    return packs


def find_pack(document_ids_T: Tensor, is_image_T: Tensor | None = None) -> Pack:
    """Where documents lie, padding as the last of them, and runs of at least two image tokens in one."""
    documents = runs_of(document_ids_T)
    if is_image_T is None or not is_image_T.any():
        return Pack(tuple(documents))
    # Neighbours that differ in either: two images at the border of two documents are two runs.
    runs = runs_of(2 * document_ids_T + is_image_T.long())
    images = [(start, end) for start, end in runs if end - start > 1 and is_image_T[start]]
    return Pack(tuple(documents), tuple(images))


def runs_of(values_T: Tensor) -> list[Span]:
    """(start, end) of each run of equal values. Example: (4, 4, 1) -> (0, 2) and (2, 3)."""
    ends = torch.unique_consecutive(values_T, return_counts=True)[1].cumsum(0).tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True))
