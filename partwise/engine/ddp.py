"""Every rank holds the whole model; once a step, gradients are summed.

The sum is made on the masters' gradients, in fp32 and in the order of names, after all backward passes. So a
rank need not run what another runs: text beside images cannot hang, and nothing is searched for unused
parameters. torch's DistributedDataParallel would reduce 16-bit gradients, once for each of the buckets that
it fills during backward, and needs the same graph on every rank.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from partwise.engine.single import Engine


class Replicated(Engine):
    name = "ddp"

    def finish_gradients(self, masters: Mapping[str, Tensor]) -> set[str]:
        is_reached = self.ranks.any_of([master.grad is not None for master in masters.values()])
        reached = [name for name, is_true in zip(masters, is_reached, strict=True) if is_true]
        for name in reached:
            if masters[name].grad is None:
                masters[name].grad = torch.zeros_like(masters[name])
        self.ranks.sum_all(masters[name].grad for name in reached)
        return set(reached)
