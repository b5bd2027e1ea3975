"""Packs: the loss and gradients of padded rows, and documents that do not see each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

from partwise.data.align import align_batches
from partwise.data.collate import collate, filler_batch, join_batches, micro_batches
from partwise.data.packing import PackFormat
from partwise.data.pixels import with_own_pixels
from partwise.families import IMAGE_RUN_FIELDS
from partwise.model.attention import packing_obstacle, use_packed_attention
from partwise.model.positions import grid_positions
from partwise.records import IGNORE_INDEX, Batch, Example, Pack, StepData
from partwise.training.step import accumulate_loss, batch_loss_sum, model_inputs

CPU, PAD = torch.device("cpu"), 0
FAMILIES = ("gemma3", "llava", "llava-next", "qwen2-vl", "qwen2.5-vl")
TEXT_FAMILIES = ("gemma3-text", "llama")
ROWS = (0, 1, 2, 0, 3, 0, 0, 1)
WINDOW = 7  # less than an image of Gemma-3 has tokens


def pack_format(model, max_tokens: int = 10_000) -> PackFormat:
    has_axes = hasattr(model.base_model, "get_rope_index")
    positions = partial(grid_positions, model) if has_axes else None
    return PackFormat(max_tokens, IMAGE_RUN_FIELDS.get(model.config.model_type), positions)


def prepare(model):
    """In fp64, but for norms and positions, with packed attention and small windows where there are any."""
    model.double()
    assert packing_obstacle(model.config, "sdpa") == ""
    use_packed_attention(model)
    windows = [layer.self_attn for layer in model.get_decoder().layers if window_of(layer.self_attn)]
    for attention in windows:
        attention.sliding_window = attention.config.sliding_window = WINDOW
    return model


def window_of(attention) -> int | None:
    return getattr(attention, "sliding_window", getattr(attention.config, "sliding_window", None))


@pytest.fixture(params=[*FAMILIES, *TEXT_FAMILIES])
def tiny(request, open_tiny):
    """Rows of no to three images."""
    tiny = open_tiny(request.param, (0,) * 8 if request.param in TEXT_FAMILIES else ROWS)
    prepare(tiny.model)
    return tiny


def step_gradients(model, batches, take_gradients) -> tuple[float, dict[str, Tensor]]:
    loss = accumulate_loss(model, StepData(0, tuple(batches)), CPU)
    return loss.item(), take_gradients(model)


def assert_same(ours: tuple[float, dict[str, Tensor]], theirs: tuple[float, dict[str, Tensor]]) -> None:
    assert ours[0] == pytest.approx(theirs[0], rel=1e-7)
    assert ours[1].keys() == theirs[1].keys()
    scale = max(gradient.abs().max() for gradient in theirs[1].values())
    for name, gradient in ours[1].items():
        error = (gradient - theirs[1][name]).abs().max() / scale
        assert error < 1e-6, f"{name}: {error}"


@pytest.mark.parametrize("room", [1.0, 0.4], ids=["one pack", "several packs"])
def test_a_packed_step_is_the_padded_step(tiny, room, take_gradients):
    padded = step_gradients(tiny.model, micro_batches(tiny.examples, PAD, 3), take_gradients)
    total = sum(len(example.input_ids) for example in tiny.examples)
    batches = micro_batches(tiny.examples, PAD, 3, pack_format(tiny.model, int(room * total) + 1))
    assert len(batches) == (1 if room == 1 else 3) and all(batch.pack for batch in batches)
    assert_same(step_gradients(tiny.model, batches, take_gradients), padded)


def test_gradient_checkpointing_changes_nothing(tiny, take_gradients):
    batches = micro_batches(tiny.examples, PAD, 3, pack_format(tiny.model))
    expected = step_gradients(tiny.model, batches, take_gradients)
    tiny.model.train()
    tiny.model.get_decoder().activation_checkpointing_enable({"use_reentrant": False})
    assert_same(step_gradients(tiny.model, batches, take_gradients), expected)


def one_document(batch: Batch) -> Batch:
    assert batch.pack is not None
    return replace(batch, pack=Pack(((0, batch.input_ids.shape[1]),), batch.pack.image_runs))


def without_image_runs(batch: Batch) -> Batch:
    assert batch.pack is not None
    return replace(batch, pack=Pack(batch.pack.documents))


def with_running_positions(batch: Batch) -> Batch:
    assert batch.position_ids is not None
    running = torch.arange(batch.input_ids.shape[1]).expand_as(batch.position_ids)
    return replace(batch, position_ids=running)


@pytest.mark.parametrize("change", [one_document, without_image_runs, with_running_positions])
def test_the_comparison_would_see_a_wrong_mask(change: Callable[[Batch], Batch], open_tiny, take_gradients):
    tiny = open_tiny("gemma3", ROWS)
    prepare(tiny.model)
    (batch,) = micro_batches(tiny.examples, PAD, 3, pack_format(tiny.model))
    expected = step_gradients(tiny.model, [batch], take_gradients)
    wrong = step_gradients(tiny.model, [change(batch)], take_gradients)
    with pytest.raises(AssertionError):
        assert_same(wrong, expected)


def test_the_comparison_would_see_a_lost_window(open_tiny, take_gradients):
    tiny = open_tiny("gemma3", ROWS)
    prepare(tiny.model)
    batches = micro_batches(tiny.examples, PAD, 3, pack_format(tiny.model))
    expected = step_gradients(tiny.model, batches, take_gradients)
    windows = [layer.self_attn for layer in tiny.model.get_decoder().layers if window_of(layer.self_attn)]
    assert windows
    for attention in windows:
        attention.sliding_window = None
    with pytest.raises(AssertionError):
        assert_same(step_gradients(tiny.model, batches, take_gradients), expected)


def text_example(length: int, row: int) -> Example:
    ids = torch.arange(3 + row, 3 + row + length) % 60
    labels = ids.clone()
    labels[0] = IGNORE_INDEX
    return Example(ids, labels, {}, {}, length - 1, "a.jsonl", row)


@pytest.mark.parametrize("model_type", ["mistral", "qwen2"])
def test_other_decoders(model_type, take_gradients):
    """Those of LLaVA folders. Mistral has a window in every layer, Qwen2 in its upper ones where it is on."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": WINDOW}
    extra = {"use_sliding_window": True, "max_window_layers": 1} if model_type == "qwen2" else {}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes, **heads, **extra))
    prepare(model)
    assert sum(window_of(layer.self_attn) == WINDOW for layer in model.get_decoder().layers) >= 2
    examples = [text_example(length, row) for row, length in enumerate((13, 1, 25, 9))]
    padded = step_gradients(model, micro_batches(examples, PAD, 2), take_gradients)
    packed = micro_batches(examples, PAD, 2, pack_format(model))
    assert_same(step_gradients(model, packed, take_gradients), padded)


def hidden_states(model, batch: Batch) -> Tensor:
    with torch.no_grad():
        return model.base_model(**model_inputs(model, batch, CPU)).last_hidden_state[0]


def changed(example: Example, position: int) -> Example:
    """With another text token at this position, and pixels of another brightness."""
    ids = example.input_ids.clone()
    ids[position] = ids[position] - 1
    media = {n: t * 0.5 if t.is_floating_point() else t for n, t in example.media.items()}
    return replace(example, input_ids=ids, media=media)


def test_a_document_does_not_see_what_changes_in_another(tiny):
    """Documents of images before and behind it, and what comes later in its own text."""
    packs = pack_format(tiny.model)
    one, two, three = (with_own_pixels(tiny.examples[i]) for i in (4, 1, 2))
    batch = collate([one, two, three], PAD, packs)
    start, end = batch.pack.documents[1]
    before = hidden_states(tiny.model, batch)
    others = collate([changed(one, -1), two, changed(three, -1)], PAD, packs)
    after = hidden_states(tiny.model, others)
    assert torch.equal(before[start:end], after[start:end])
    assert not torch.equal(before[:start], after[:start]) and not torch.equal(before[end:], after[end:])
    later = hidden_states(tiny.model, collate([one, replace(changed(two, -3), media=two.media)], PAD, packs))
    torch.testing.assert_close(later[: end - 3], before[: end - 3], rtol=0, atol=1e-9)
    assert (later[end - 3 : end] - before[end - 3 : end]).abs().amax(1).gt(1e-6).all()


def test_image_tokens_see_each_other_in_both_directions(open_tiny):
    """A change of an image's last patch reaches its first token, and nothing before the image."""
    tiny = open_tiny("gemma3", ROWS)
    prepare(tiny.model)
    batch = collate([tiny.examples[0], tiny.examples[1]], PAD, pack_format(tiny.model))
    ((first, last),) = batch.pack.image_runs

    def with_another_last_token(_module, args, kwargs):
        embeds = kwargs["inputs_embeds"].clone()
        embeds[0, last - 1] += 0.5
        return args, {**kwargs, "inputs_embeds": embeds}

    before = hidden_states(tiny.model, batch)
    handle = tiny.model.get_decoder().register_forward_pre_hook(with_another_last_token, with_kwargs=True)
    after = hidden_states(tiny.model, batch)
    handle.remove()
    moved = (after - before).abs().amax(1) > 1e-9
    assert moved[first:last].all() and not moved[:first].any()


@pytest.mark.parametrize("first", [5, 3], ids=["text", "images"])
def test_a_filler_is_a_document_more_that_changes_nothing(tiny, first, take_gradients):
    if "pixel_values" not in tiny.examples[4].media:
        pytest.skip("a model of text alone")
    packs = pack_format(tiny.model)
    batch = collate(tiny.examples[first : first + 2], PAD, packs)
    fillers = tiny.examples[0], tiny.examples[1]
    aligned = align_batches([batch], [True, False], *fillers, PAD, packs)
    assert all(b.pack for b in aligned) and len(aligned[0].pack.documents) >= len(batch.pack.documents)
    losses = [[batch_loss_sum(tiny.model, b, CPU) for b in batches] for batches in ([batch], aligned)]
    gradients = []
    for group in losses:
        torch.stack(group).sum().backward()
        gradients.append((torch.stack(group).sum().item(), take_gradients(tiny.model)))
    alone, filled = gradients
    vision = filled[1].keys() - alone[1].keys()
    assert bool(vision) == (first == 5) and all(not filled[1][name].any() for name in vision)
    assert_same((filled[0], {name: filled[1][name] for name in alone[1]}), alone)


def test_joined_packs_are_the_pack_of_all(tiny):
    packs = pack_format(tiny.model)
    parts = [collate(rows, PAD, packs) for rows in (tiny.examples[:3], tiny.examples[3:])]
    joined, whole = join_batches(*parts, PAD, packs), collate(tiny.examples, PAD, packs)
    assert joined.pack == whole.pack and joined.rows == whole.rows
    for name in ("input_ids", "labels", "document_ids", "position_ids"):
        assert torch.equal(getattr(joined, name), getattr(whole, name)), name
    assert all(torch.equal(joined.token_fields[n], t) for n, t in whole.token_fields.items())
    assert all(torch.equal(joined.media[n], t) for n, t in whole.media.items())
    assert filler_batch(tiny.examples[0], PAD, packs).num_target_tokens == 0


def test_a_model_with_other_attention_refuses_packs(open_tiny):
    tiny = open_tiny("llama", (0, 0))
    batch = collate(tiny.examples, PAD, pack_format(tiny.model))
    with pytest.raises(AssertionError, match="would see each other"):
        model_inputs(tiny.model, batch, CPU)


class Largest(TorchDispatchMode):
    """How many numbers the largest tensor has that any operation gives."""

    num_numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.num_numbers = max(self.num_numbers, leaf.numel())
        return result


def test_no_tensor_of_a_step_has_all_tokens_by_all_tokens(open_tiny):
    tiny = open_tiny("gemma3", ROWS)
    use_packed_attention(tiny.model)
    batch = collate(tiny.examples * 8, PAD, pack_format(tiny.model))
    num_tokens = batch.input_ids.shape[1]
    with Largest() as largest:
        batch_loss_sum(tiny.model, batch, CPU).backward()
    assert 0 < largest.num_numbers < num_tokens**2 / 4
