"""What a flash kernel computes, by its definition, and the operators of packs on a CPU with it."""

from __future__ import annotations

from functools import cache, partial
from itertools import pairwise

import torch
from torch import Tensor

from partwise.model.flash import (
    Stretches,
    attend_split,
    differentiate_split,
    pack_attention,
    pack_attention_backward,
)


class PlainKernel:
    """One stretch and one head after the other."""

    def forward(self, query, key, value, pieces, scale, window):
        output, lse = torch.zeros_like(query), query.new_zeros(query.shape[1], query.shape[0])
        for piece, head, shared in self.problems(query, key, pieces):
            scores = self.scores(query[piece, head], key[piece, shared], scale, window)
            lse[head, piece] = scores.logsumexp(-1)
            output[piece, head] = scores.softmax(-1) @ value[piece, shared]
        return output, lse

    def backward(self, gradient, query, key, value, output, lse, pieces, scale, window):
        shares = tuple(map(torch.zeros_like, (query, key, value)))
        for piece, head, shared in self.problems(query, key, pieces):
            q, k, v = query[piece, head], key[piece, shared], value[piece, shared]
            weights = (self.scores(q, k, scale, window) - lse[head, piece, None]).exp()
            change = gradient[piece, head] @ v.T
            delta = (gradient[piece, head] * output[piece, head]).sum(-1, keepdim=True)
            of_scores = weights * (change - delta) * scale
            shares[0][piece, head] += of_scores @ k
            shares[1][piece, shared] += of_scores.T @ q
            shares[2][piece, shared] += weights.T @ gradient[piece, head]
        return shares

    def problems(self, query: Tensor, key: Tensor, pieces: Stretches):
        starts = pieces.starts.tolist()
        assert pieces.longest == max(end - start for start, end in pairwise(starts))
        assert starts[-1] == len(query)
        num_shared = query.shape[1] // key.shape[1]
        for start, end in pairwise(starts):
            for head in range(query.shape[1]):
                yield slice(start, end), head, head // num_shared

    def scores(self, query: Tensor, key: Tensor, scale: float, window: int | None) -> Tensor:
        seen = torch.ones(len(query), len(key), dtype=torch.bool).tril()
        seen = seen if window is None else seen.triu(1 - window)
        return (query @ key.T * scale).masked_fill(~seen, -torch.inf)


@cache
def register_plain_kernel() -> None:
    """On a CPU the operators have no kernel but this."""
    pack_attention.register_kernel("cpu", partial(attend_split, PlainKernel()))
    pack_attention_backward.register_kernel("cpu", partial(differentiate_split, PlainKernel()))
