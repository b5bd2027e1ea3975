"""Numbers held in 8 bits: the nearest of 256 values, times a scale for each block.

In: a flat fp32 tensor. Out: codes and scales, the same bits on every device. Written with torch alone:
bitsandbytes 0.50.2 gives an exact zero another code on a CPU, and what should stand would drift.

Source: dynamic tree quantisation and blocks, arXiv 2110.02861.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

CODE_BLOCK = 256  # codes with one scale
LEAST_CODED = 4096  # elements of a tensor that is worth codes


def encode(values: Tensor, is_signed: bool) -> tuple[Tensor, Tensor]:
    """Codes (N,) uint8 and the scale of each block, fp32, of values (N,)."""
    blocks = nn.functional.pad(values, (0, -len(values) % CODE_BLOCK)).view(-1, CODE_BLOCK)
    scales = blocks.abs().amax(dim=1)
    table = code_values(is_signed, values.device)
    middles = (table[:-1] + table[1:]) / 2
    relative = blocks / scales.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    codes = torch.bucketize(relative, middles, out_int32=True).to(torch.uint8)
    return codes.view(-1)[: len(values)], scales


def decode(codes: Tensor, scales: Tensor, is_signed: bool) -> Tensor:
    """The values (N,) of codes, fp32."""
    spread = scales[:, None].expand(-1, CODE_BLOCK).reshape(-1)[: len(codes)]
    return code_values(is_signed, codes.device)[codes.int()] * spread


@cache
def code_values(is_signed: bool, device: torch.device) -> Tensor:
    """The 256 values in ascending order, (256,) fp32 in [-1, 1] or [0, 1]: finest near zero.

    Each decade from 1 down to 1e-7 has half as many values as the one above, in even distances; besides, zero
    and one.
    """
    decades = []
    for place in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (place + (not is_signed)) + 1)
        decades.append(10.0 ** (place - 6) * (edges[:-1] + edges[1:]) / 2)
    positive = torch.cat(decades)
    negative = -positive if is_signed else positive[:0]
    return torch.cat([negative, torch.tensor([0.0, 1.0]), positive]).sort().values.to(device)
