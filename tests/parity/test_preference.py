"""Preference losses and their gradients: those of the published formulas, for any split of a step."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from preferences import (
    PAD,
    encode,
    encode_others,
    label_rows,
    make_step,
    pair_rows,
    plain_log_probs,
    published_kto,
    published_loss,
)
from test_packing import pack_format

from partwise.config import ObjectiveConfig
from partwise.data.align import align_batches
from partwise.data.pixels import with_own_pixels
from partwise.engine.single import Engine
from partwise.model.attention import use_packed_attention
from partwise.model.parts import adapters_off, frozen_copy
from partwise.records import StepData
from partwise.training.preference import METRICS, Preference

CPU = torch.device("cpu")
LORA = {
    "vision_tower": "frozen",
    "projector": "frozen",
    "language_model": {"mode": "lora", "lora_rank": 4},
}
FULL = {"vision_tower": "frozen", "projector": "full", "language_model": "full"}
LOSSES = {
    "sigmoid": ({"loss": "dpo"}, {"beta": 0.1}),
    "smoothed": (
        {"loss": "dpo", "beta": 0.3, "label_smoothing": 0.2, "sft_weight": 0.5},
        {"beta": 0.3, "label_smoothing": 0.2, "sft_weight": 0.5},
    ),
    "hinge": ({"loss": "dpo", "variant": "hinge"}, {"beta": 0.1}),
    "ipo": ({"loss": "dpo", "variant": "ipo"}, {"beta": 0.1}),
    "simpo": ({"loss": "simpo"}, {"beta": 2.0, "gamma": 1.0}),
    "orpo": ({"loss": "orpo", "beta": 0.2}, {"beta": 0.2}),
}


@pytest.fixture(scope="module")
def images(make_image):
    return [make_image(), None, make_image(color="blue"), None, make_image((84, 56), "green")]


@pytest.fixture
def prepared(open_tiny, images):
    """A Gemma-3 in fp64 whose trained tensors have moved, so that it differs from its reference."""

    def prepare(parts, family="gemma3"):
        tiny = open_tiny(family, (0, 0))
        tiny.plan(parts)
        model = tiny.model.double()
        use_packed_attention(model)
        reference = frozen_copy(model)
        torch.manual_seed(1)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if p.requires_grad:
                    p += 0.02 * torch.randn_like(p) if "lora_" not in name else 0.2 * torch.randn_like(p)
        return tiny, model, reference

    return prepare


def assert_same(ours, theirs):
    assert ours[0] == pytest.approx(theirs[0], rel=1e-6, abs=1e-9)
    assert ours[1].keys() == theirs[1].keys()
    scale = max(gradient.abs().max() for gradient in theirs[1].values())
    assert scale > 1e-6
    for name, gradient in ours[1].items():
        error = (gradient - theirs[1][name]).abs().max() / scale
        assert error < 1e-6, f"{name}: {error}"


def published(formula, model, reference_model, examples, keys, take_gradients):
    """The examples with pixels of their own, their log-probabilities under the reference, and the formula's
    loss with its gradients, from plain logits."""
    plain = [with_own_pixels(example) for example in examples]
    with torch.no_grad():
        reference = plain_log_probs(reference_model, plain)
    expected = published_loss(formula, plain_log_probs(model, plain), reference, keys)
    expected.backward()
    return plain, reference, (expected.item(), take_gradients(model))


def ours(preference, model, step_data, take_gradients):
    told = preference.accumulate(model, step_data, CPU, Engine())
    return told[0].item(), take_gradients(model), dict(zip(METRICS, told[1:].tolist(), strict=True))


@pytest.mark.parametrize("name", LOSSES)
def test_a_step_is_the_published_formula(name, prepared, images, take_gradients):
    """In one pack, in several, and in padded micro-batches of one and of two pairs; text beside images."""
    objective, keys = LOSSES[name]
    tiny, model, reference_model = prepared(LORA)
    examples = encode(tiny.chat_format, pair_rows(images), "pairs")
    formula = {"smoothed": "sigmoid"}.get(name, name)
    plain, reference, theirs = published(formula, model, reference_model, examples, keys, take_gradients)
    longest = max(
        len(a.input_ids) + len(b.input_ids) for a, b in zip(examples[::2], examples[1::2], strict=True)
    )
    source = "adapter_off" if objective["loss"] == "dpo" else "none"
    preference = Preference(ObjectiveConfig(**objective), source)
    for size, packs in ((1, None), (2, None), (9, pack_format(model)), (9, pack_format(model, longest))):
        step_data = make_step(examples, size, packs, per_row=2)
        assert size == 9 or len(step_data.batches) == -(-5 // size)
        result = ours(preference, model, step_data, take_gradients)
        assert_same(result, theirs)
    policy = [p.sum().item() for p in plain_log_probs(model, plain)]
    assert result[2]["chosen_log_prob"] == pytest.approx(sum(policy[::2]) / 5)
    assert result[2]["rejected_log_prob"] == pytest.approx(sum(policy[1::2]) / 5)
    if objective["loss"] == "dpo":
        ratios = [p - r.sum().item() for p, r in zip(policy, reference, strict=True)]
        margins = [keys["beta"] * (w - v) for w, v in zip(ratios[::2], ratios[1::2], strict=True)]
        assert result[2]["reward_margin"] == pytest.approx(sum(margins) / 5)
        assert result[2]["reward_accuracy"] == pytest.approx(sum(m > 0 for m in margins) / 5)


@pytest.mark.parametrize("source", ["copy", "precomputed"])
def test_full_training_against_either_reference(source, prepared, images, take_gradients):
    """The head trains, too: its gradient needs each answer's weight, known only when all tokens are."""
    tiny, model, reference_model = prepared(FULL)
    examples = encode(tiny.chat_format, pair_rows(images), "pairs")
    _, reference, theirs = published(
        "sigmoid", model, reference_model, examples, {"beta": 0.1}, take_gradients
    )
    if source == "precomputed":
        examples = [replace(e, reference=r.sum().item()) for e, r in zip(examples, reference, strict=True)]
    preference = Preference(
        ObjectiveConfig(loss="dpo"), source, reference_model if source == "copy" else None
    )
    for size, packs in ((2, None), (9, pack_format(model))):
        step_data = make_step(examples, size, packs, per_row=2)
        assert_same(ours(preference, model, step_data, take_gradients), theirs)


@pytest.mark.parametrize("family", ["llama", "qwen2.5-vl"])
def test_other_families(family, prepared, images, take_gradients):
    parts = {"language_model": LORA["language_model"]}
    tiny, model, reference_model = prepared(parts, family)
    shown = [None] * 5 if family == "llama" else images
    examples = encode(tiny.chat_format, pair_rows(shown), "pairs")
    _, _, theirs = published("sigmoid", model, reference_model, examples, {"beta": 0.1}, take_gradients)
    preference = Preference(ObjectiveConfig(loss="dpo"))
    step_data = make_step(examples, 9, pack_format(model), per_row=2)
    assert_same(ours(preference, model, step_data, take_gradients), theirs)


def test_kto_compares_with_the_divergence_of_the_whole_step(prepared, images, take_gradients):
    keys = {"beta": 0.1, "good": 1.5, "bad": 0.7}
    tiny, model, reference_model = prepared(LORA)
    rows = label_rows(images)
    examples, others = encode(tiny.chat_format, rows, "labels"), encode_others(tiny.chat_format, rows)
    plain, plain_others = ([with_own_pixels(e) for e in some] for some in (examples, others))
    with torch.no_grad():
        reference = plain_log_probs(reference_model, plain)
        pairs = zip(
            plain_log_probs(model, plain_others), plain_log_probs(reference_model, plain_others), strict=True
        )
        z = torch.stack([p.sum() - r.sum() for p, r in pairs]).mean().clamp(min=0)
    labels = [row["label"] for row in rows]
    expected = published_kto(plain_log_probs(model, plain), reference, labels, z, keys)
    expected.backward()
    theirs = (expected.item(), take_gradients(model))
    objective = ObjectiveConfig(loss="kto", desirable_weight=1.5, undesirable_weight=0.7)
    for size, packs in ((1, None), (3, None), (9, pack_format(model))):
        step_data = make_step(examples, size, packs, per_row=1, others=others)
        assert_same(ours(Preference(objective), model, step_data, take_gradients), theirs)


def test_a_fresh_adapter_starts_at_the_logarithm_of_two(open_tiny, images):
    tiny = open_tiny("gemma3", (0, 0))
    tiny.plan(LORA)
    step_data = make_step(encode(tiny.chat_format, pair_rows(images), "pairs"), 2, None, per_row=2)
    told = Preference(ObjectiveConfig(loss="dpo")).accumulate(tiny.model, step_data, CPU, Engine())
    assert told[0].item() == pytest.approx(0.6931471805599453, abs=1e-12)
    assert told[1].item() == 0


def test_switching_adapters_off_leaves_what_trains_as_it_was(prepared):
    _, model, reference_model = prepared({**LORA, "language_model": {"mode": "lora", "use_dora": True}})
    inputs = {"input_ids": torch.arange(5, 20)[None], "token_type_ids": torch.zeros(1, 15, dtype=torch.long)}
    before = {name for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        on, plain = model(**inputs).logits, reference_model(**inputs).logits
        with adapters_off(model):
            assert {name for name, p in model.named_parameters() if p.requires_grad} == before
            off = model(**inputs).logits
        again = model(**inputs).logits
    torch.testing.assert_close(off, plain, rtol=0, atol=2e-6)  # DoRA was made in fp32
    assert torch.equal(on, again) and not torch.allclose(on, off)


def test_fillers_of_other_ranks_are_no_answers(prepared, images, take_gradients):
    tiny, model, _ = prepared(LORA)
    examples = encode(tiny.chat_format, pair_rows([None, None]), "pairs")
    text, image = (encode(tiny.chat_format, pair_rows([shown]), "pairs")[0] for shown in (None, images[0]))
    preference = Preference(ObjectiveConfig(loss="dpo"))
    for packs in (None, pack_format(model)):
        step_data = make_step(examples, 1, packs, per_row=2)
        batches = align_batches(
            step_data.batches, [True] * len(step_data.batches) + [False], text, image, PAD, packs
        )
        assert len(batches) == len(step_data.batches) + 1
        aligned = ours(preference, model, StepData(0, batches), take_gradients)
        assert_same(aligned, ours(preference, model, step_data, take_gradients))
