"""Attention over packs: the split into two causal problems, against a mask of all tokens by all tokens."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch
from plain_kernel import register_plain_kernel
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from partwise.data.packing import find_pack
from partwise.model.attention import attend, attend_documents
from partwise.model.flash import PackLayout, pack_attention

CPU = torch.device("cpu")
HEADS, KEY_HEADS, WIDTH, SCALE = 4, 2, 8, 0.3

register_plain_kernel()

# Documents as strings: "t" is a text token, "i" one of an image. Padding is what --- leaves at the end.
PACKS = {
    "text": ["ttttt", "ttt"],
    "one document": ["tt" + "i" * 5 + "ttt"],
    "image at the start": ["iiittt", "iii" + "tt"],
    "image at the end": ["tttiii", "ttiiii"],
    "an image beside an image of the next document": ["ttiii", "iiitt"],
    "two images": ["tiiitiiit", "tt"],
    "many images": ["titiititiiit" * 2, "i" * 7, "tttt"],
    "one token": ["t", "tiit", "t", "i"],
    "images of one and two tokens": ["titiit", "ii"],
    "padding": ["ttiiit", "tttt", "-----"],
    "longer": ["t" * 37 + "i" * 16 + "t" * 11, "i" * 16 + "t", "t" * 70],
}
WINDOWS = (None, 1, 3, 6, 20)


def tokens_of(documents: list[str]) -> tuple[Tensor, Tensor]:
    """Document ids and whether each token is an image's, (T,)."""
    ids = [-1 if kind == "-" else i for i, document in enumerate(documents) for kind in document]
    return torch.tensor(ids), torch.tensor([kind == "i" for document in documents for kind in document])


def dense_mask(documents: list[str], window: int | None) -> Tensor:
    """Which keys each query sees, (T, T): token by token, from the definition of the model's mask."""
    flat = [(d, kind) for d, document in enumerate(documents) for kind in document]
    images, image = [], 0
    for place, (document, kind) in enumerate(flat):
        if place and (flat[place - 1] != (document, kind)):
            image += 1
        images.append(image if kind == "i" else None)
    mask = torch.zeros(len(flat), len(flat), dtype=torch.bool)
    for q, (document, _) in enumerate(flat):
        for k in range(len(flat)):
            is_seen = k <= q or (images[q] is not None and images[q] == images[k])
            in_window = window is None or k > q - window
            mask[q, k] = flat[k][0] == document and is_seen and in_window
    return mask


def random_rows(num_tokens: int, seed: int = 0) -> tuple[list[Tensor], Tensor]:
    """Query, key and value, (1, H, T, K), and a gradient of the output, (1, T, H, K)."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(1, heads, num_tokens, WIDTH) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
    rows = [torch.randn(shape, dtype=torch.float64, generator=generator) * 2 for shape in shapes]
    gradient = torch.randn(1, num_tokens, HEADS, WIDTH, dtype=torch.float64, generator=generator)
    return [row.requires_grad_() for row in rows], gradient


def by_split(rows, pack, window):
    layout = PackLayout.of(pack, CPU)
    flat = (row[0].transpose(0, 1) for row in rows)
    return pack_attention(*flat, layout.table, layout.sizes, SCALE, window)[0][None]


def by_documents(rows, pack, window):
    return attend_documents(*rows, pack, SCALE, window, 0.0)


def by_mask(rows, mask):
    output = scaled_dot_product_attention(*rows, attn_mask=mask, scale=SCALE, enable_gqa=True)
    return output.transpose(1, 2)


def with_gradients(output: Tensor, rows: list[Tensor], gradient: Tensor) -> list[Tensor]:
    return [output.detach(), *torch.autograd.grad(output, rows, gradient)]


def assert_exact(way, documents: list[str], window: int | None, seed: int = 0) -> None:
    pack = find_pack(*tokens_of(documents))
    rows, gradient = random_rows(sum(map(len, documents)), seed)
    expected = with_gradients(by_mask(rows, dense_mask(documents, window)), rows, gradient)
    for name, ours, theirs in zip(
        ("output", "query", "key", "value"),
        with_gradients(way(rows, pack, window), rows, gradient),
        expected,
        strict=True,
    ):
        error = (ours - theirs).abs().max().item()
        assert error < 1e-12, f"{name} of {documents} in a window of {window}: {error}"


@pytest.mark.parametrize("way", [by_split, by_documents])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("documents", PACKS.values(), ids=PACKS)
def test_output_and_gradients_are_those_of_the_dense_mask(way, documents, window):
    assert_exact(way, documents, window)


@pytest.mark.parametrize("seed", range(20))
def test_random_packs(seed):
    draw = random.Random(seed)
    documents = [
        "".join(draw.choice("tti") * draw.randint(1, 9) for _ in range(draw.randint(1, 5)))
        for _ in range(draw.randint(1, 4))
    ]
    assert_exact(by_split, documents, draw.choice([None, 2, 5, 11]), seed)
    assert_exact(by_documents, documents, draw.choice([None, 2, 5, 11]), seed)


def test_the_comparison_would_see_a_lost_image():
    with pytest.raises(AssertionError):
        assert_exact(
            lambda rows, pack, window: by_documents(rows, find_pack(*text_only), window), ["tiiit"], None
        )
    assert dense_mask(["tiiit"], None).sum() == 15 + 3


text_only = (torch.zeros(5, dtype=torch.long), None)


def test_rows_that_are_no_pack_get_the_mask_of_transformers():
    rows, _ = random_rows(6)
    mask = dense_mask(["ttiit", "-"], 3)[None, None]
    module = SimpleNamespace(num_key_value_groups=HEADS // KEY_HEADS, is_causal=True)
    output, _ = attend(module, *rows, mask, scaling=SCALE, sliding_window=3)
    torch.testing.assert_close(output, by_mask(rows, mask))
