"""8-bit codes: the published values, and the nearest of them for every number."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes.functional import create_dynamic_map

from partwise.model.codes import CODE_BLOCK, code_values, decode, encode

CPU = torch.device("cpu")


@pytest.mark.parametrize("is_signed", [True, False])
def test_the_values_are_those_of_bitsandbytes(is_signed: bool) -> None:
    values = code_values(is_signed, CPU)
    torch.testing.assert_close(values, create_dynamic_map(signed=is_signed), rtol=1e-6, atol=0)
    assert values.unique().numel() == 256


@pytest.mark.parametrize("is_signed", [True, False])
def test_each_number_becomes_the_nearest_value_of_its_block(is_signed: bool) -> None:
    torch.manual_seed(0)
    numbers = torch.randn(5 * CODE_BLOCK + 7) * torch.logspace(-7, 0, 5 * CODE_BLOCK + 7)
    numbers = numbers if is_signed else numbers.abs()
    numbers[::50] = 0
    codes, scales = encode(numbers, is_signed)
    assert codes.dtype == torch.uint8 and codes.shape == numbers.shape and scales.shape == (6,)
    got, values = decode(codes, scales, is_signed), code_values(is_signed, CPU).double()
    for start in range(0, len(numbers), CODE_BLOCK):
        block = numbers[start : start + CODE_BLOCK].double()
        scale = block.abs().max()
        nearest = (block[:, None] - scale * values).abs().amin(dim=1)
        error = (got[start : start + CODE_BLOCK].double() - block).abs()
        assert (error <= nearest + 3e-7 * block.abs()).all()
    assert (got[numbers == 0] == 0).all()


def test_zeros_have_a_code_and_come_back() -> None:
    codes, scales = encode(torch.zeros(300), is_signed=True)
    assert (decode(codes, scales, is_signed=True) == 0).all() and (scales == 0).all()
