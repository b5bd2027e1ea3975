"""The processes of a run, and what they tell each other.

In: a process group, once there is one. Out: Ranks: who this process is, and values from all of them. Values
that live on the host go over a group of their own, so that nothing here waits for a GPU. One process alone is
Ranks() and needs no group.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Small tensors travel together: each message has a price of its own.
BUCKET_BYTES = 32 << 20


@dataclass(frozen=True)
class Ranks:
    """`host` is the group for host values; on a machine with GPUs it is not the group that moves tensors."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    host: Any = None

    @property
    def is_first(self) -> bool:
        """Whether this process reads weights, prints and writes the run folder."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """The value that each rank gives, in the order of ranks, on all of them. All must call it."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value, group=self.host)
        return values

    def from_first(self, value: Any = None) -> Any:
        """The value that rank 0 gives. All must call it."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.host)
        return box[0]

    def any(self, flag: bool) -> bool:
        """Whether one rank says so. All must call it."""
        if self.size == 1:
            return flag
        said = torch.tensor(int(flag))
        dist.all_reduce(said, op=dist.ReduceOp.MAX, group=self.host)
        return bool(said)

    def any_of(self, flags: list[bool]) -> list[bool]:
        """For each of the flags whether one rank says so; all must give as many."""
        if self.size == 1:
            return flags
        said = torch.tensor(flags, dtype=torch.uint8)
        dist.all_reduce(said, op=dist.ReduceOp.MAX, group=self.host)
        return [bool(flag) for flag in said.tolist()]

    def barrier(self) -> None:
        self.any(False)

    def sum(self, tensor: Tensor, group: Any = None) -> Tensor:
        """The sum over ranks, in place, on the tensor's device."""
        if self.size > 1:
            dist.all_reduce(tensor, group=group)
        return tensor

    def sum_all(self, tensors: Iterable[Tensor]) -> None:
        """The sum of each tensor over ranks, in place. All must give the same shapes in the same order."""
        if self.size == 1:
            return
        for bucket in buckets(tensors):
            if len(bucket) == 1 and bucket[0].is_contiguous():
                dist.all_reduce(bucket[0])
                continue
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            dist.all_reduce(flat)
            for tensor, part in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
                tensor.copy_(part.view_as(tensor))


def buckets(tensors: Iterable[Tensor]) -> Iterable[list[Tensor]]:
    """The tensors in their order, in groups of one type and at most BUCKET_BYTES, or of one larger tensor."""
    group: list[Tensor] = []
    for tensor in tensors:
        size = sum(t.nbytes for t in group)
        if group and (size + tensor.nbytes > BUCKET_BYTES or group[0].dtype != tensor.dtype):
            yield group
            group = []
        group.append(tensor)
    if group:
        yield group
