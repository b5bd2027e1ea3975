"""On a GPU: flash attention over packs against a dense mask in fp32, what it allocates, and whole models."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from partwise.data.collate import micro_batches
from partwise.data.packing import PackFormat
from partwise.families import IMAGE_RUN_FIELDS
from partwise.model import attention
from partwise.model.attention import use_packed_attention
from partwise.model.flash import PackLayout, pack_attention
from partwise.model.positions import grid_positions
from partwise.records import Pack, StepData
from partwise.training.step import accumulate_loss

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

HEADS, KEY_HEADS, WIDTH, SCALE, WINDOW = 8, 4, 256, 1 / 16, 1024
# Lengths of documents, and where in them images of 256 tokens begin; the last are two tokens, and padding.
DOCUMENTS = ((2300, (5, 300, 2044)), (1200, (0,)), (1, ()), (530, (17, 273)), (2, ()), (63, ()))
IMAGE = 256


def make_pack(documents=DOCUMENTS) -> Pack:
    spans, runs, start = [], [], 0
    for length, images in documents:
        spans.append((start, start + length))
        firsts = [start + first for first in images]
        # Images that touch are one run, as for the model itself.
        for first in firsts:
            if runs and runs[-1][1] == first and first - IMAGE in firsts:
                runs[-1] = (runs[-1][0], first + IMAGE)
            else:
                runs.append((first, first + IMAGE))
        start += length
    return Pack(tuple(spans), tuple(runs))


def dense_mask(pack: Pack, window: int | None) -> Tensor:
    num_tokens = pack.documents[-1][1]
    mask = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device="cuda").tril()
    for first, last in pack.image_runs:
        mask[first:last, first:last] = True
    inside = torch.zeros_like(mask)
    for start, end in pack.documents:
        inside[start:end, start:end] = True
    mask &= inside
    return mask if window is None else mask.triu(1 - window)


def random_rows(num_tokens: int, dtype=torch.bfloat16) -> tuple[list[Tensor], Tensor]:
    """Query, key and value (T, H, K) and a gradient of the output."""
    torch.manual_seed(0)
    heads = (HEADS, KEY_HEADS, KEY_HEADS)
    rows = [torch.randn(num_tokens, h, WIDTH, device="cuda", dtype=dtype, requires_grad=True) for h in heads]
    return rows, torch.randn(num_tokens, HEADS, WIDTH, device="cuda", dtype=dtype)


def attend_flash(rows: list[Tensor], layout: PackLayout, window: int | None) -> Tensor:
    return pack_attention(*rows, layout.table, layout.sizes, SCALE, window)[0]


def with_gradients(output: Tensor, rows: list[Tensor], gradient: Tensor) -> list[Tensor]:
    return [output.detach(), *torch.autograd.grad(output, rows, gradient)]


def dense(rows: list[Tensor], gradient: Tensor, mask: Tensor, dtype) -> list[Tensor]:
    rows = [row.detach().to(dtype).requires_grad_() for row in rows]
    batch = [row.transpose(0, 1)[None] for row in rows]
    output = scaled_dot_product_attention(*batch, attn_mask=mask, scale=SCALE, enable_gqa=True)
    return with_gradients(output[0].transpose(0, 1), rows, gradient.to(dtype))


def relative_error(ours: Tensor, exact: Tensor) -> float:
    return ((ours.float() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("window", [None, WINDOW, 100])
def test_flash_attention_is_as_near_to_fp32_as_a_dense_mask_in_bf16(window):
    pack = make_pack()
    rows, gradient = random_rows(pack.documents[-1][1])
    mask = dense_mask(pack, window)
    exact = dense(rows, gradient, mask, torch.float32)
    usual = dense(rows, gradient, mask, torch.bfloat16)
    layout = PackLayout.of(pack, torch.device("cuda"))
    flash = with_gradients(attend_flash(rows, layout, window), rows, gradient)
    for name, ours, theirs, truth in zip(
        ("output", "query", "key", "value"), flash, usual, exact, strict=True
    ):
        error, allowed = relative_error(ours, truth), 1.5 * relative_error(theirs, truth) + 2e-3
        print(f"window {window}, {name}: {error:.2e}, a dense mask {relative_error(theirs, truth):.2e}")
        assert error < min(allowed, 2e-2), name
    lost = dense(rows, gradient, dense_mask(Pack(pack.documents), window), torch.float32)
    assert relative_error(lost[0], exact[0]) > 5e-2  # what is compared would see lost images


def test_short_runs_and_documents():
    """Where the longest piece is one token, kernels take other ways."""
    for pack in (Pack(((0, 4), (4, 9)), ((1, 3), (5, 7))), Pack(tuple((i, i + 1) for i in range(7)))):
        rows, gradient = random_rows(pack.documents[-1][1])
        exact = dense(rows, gradient, dense_mask(pack, None), torch.float32)
        layout = PackLayout.of(pack, torch.device("cuda"))
        flash = attend_flash(rows, layout, None)
        for ours, truth in zip(with_gradients(flash, rows, gradient), exact, strict=True):
            assert (ours.float() - truth).abs().max() < 5e-2


def test_nothing_is_as_large_as_all_tokens_by_all_tokens_and_the_host_waits_for_nothing():
    documents = ((1500, (5, 300)), (548, (0,))) * 32
    pack = make_pack(documents)
    num_tokens = pack.documents[-1][1]
    assert num_tokens == 65_536
    rows, gradient = random_rows(num_tokens)
    rows = [row[:, :2, :64].detach().contiguous().requires_grad_() for row in rows]
    gradient = gradient[:, :2, :64].contiguous()
    layout = PackLayout.of(pack, torch.device("cuda"))
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.set_sync_debug_mode("error")
    try:
        output = attend_flash(rows, layout, WINDOW)
        torch.autograd.grad(output, rows, gradient)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    grown = torch.cuda.max_memory_allocated() - before
    print(f"{grown / 2**20:.0f} MiB more; a mask would be {num_tokens**2 / 2**20:.0f} MiB")
    assert grown < num_tokens**2 / 10


@pytest.mark.parametrize("family", ["gemma3", "llava-next", "qwen2.5-vl", "llama"])
def test_packed_steps_of_models_are_padded_steps(family, open_tiny, monkeypatch, take_gradients):
    tiny = open_tiny(family, (0,) * 6 if family == "llama" else (0, 1, 2, 0, 3, 1), "bfloat16")
    tiny.model.to("cuda")
    use_packed_attention(tiny.model)
    num_calls = 0

    def counted(*args):
        nonlocal num_calls
        num_calls += 1
        return pack_attention(*args)

    monkeypatch.setattr(attention, "pack_attention", counted)
    has_axes = hasattr(tiny.model.base_model, "get_rope_index")
    positions = partial(grid_positions, tiny.model) if has_axes else None
    packs = PackFormat(10_000, IMAGE_RUN_FIELDS.get(tiny.model.config.model_type), positions)
    results = []
    for batches in (micro_batches(tiny.examples, 0, 2), micro_batches(tiny.examples, 0, 2, packs)):
        loss = accumulate_loss(tiny.model, StepData(0, batches), torch.device("cuda"))
        gradients = take_gradients(tiny.model)
        results.append((loss.item(), torch.cat([g.flatten().float() for g in gradients.values()])))
    assert num_calls >= tiny.model.config.get_text_config().num_hidden_layers
    (padded, their_gradient), (packed, our_gradient) = results
    assert packed == pytest.approx(padded, rel=1e-2)
    assert torch.cosine_similarity(our_gradient, their_gradient, dim=0) > 0.995
