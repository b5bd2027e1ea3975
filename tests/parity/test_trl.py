"""Losses of TRL's own trainers, step by step on the same weights, where TRL is installed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from preferences import PAD, encode, encode_others, label_rows, make_step, pair_rows, plain_log_probs

from partwise.config import ObjectiveConfig
from partwise.data.collate import collate
from partwise.data.pixels import with_own_pixels
from partwise.engine.single import Engine
from partwise.model.parts import frozen_copy
from partwise.records import IGNORE_INDEX
from partwise.training.preference import Preference
from partwise.training.step import model_inputs

pytest.importorskip("trl", reason="TRL is not installed")
CPU = torch.device("cpu")
NUM_STEPS = 4
# TRL sums log-probabilities in fp32: some 20 of about -6 for each answer.
TOLERANCE = {"rel": 1e-6, "abs": 1e-6}


def trl_batch(model, examples):
    """Our examples as TRL's collator makes them: all chosen answers, then all rejected ones, padded."""
    return padded(model, [*examples[::2], *examples[1::2]])


def padded(model, examples):
    batch = collate([with_own_pixels(example) for example in examples], PAD)
    inputs = model_inputs(model, batch, CPU)
    del inputs["use_cache"]
    return {**inputs, "completion_mask": (batch.labels != IGNORE_INDEX).long()}


def make_trainer(model, reference, processor, rows, tmp_path, **settings):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    dataset = Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": row["prompt"].removeprefix("<image>")}],
                "chosen": [{"role": "assistant", "content": row["chosen"]}],
                "rejected": [{"role": "assistant", "content": row["rejected"]}],
                **({"images": row["images"]} if "images" in row else {}),
            }
            for row in rows
        ]
    )
    arguments = DPOConfig(str(tmp_path), report_to=[], use_cpu=True, bf16=False, beta=0.1, **settings)
    return DPOTrainer(model, reference, arguments, train_dataset=dataset, processing_class=processor)


def descend(preference, model, step_data, theirs, take_gradients, rate):
    """Our loss and theirs, which must agree with their gradients, and then a step of gradient descent."""
    theirs.backward()
    expected = take_gradients(model)
    ours = preference.accumulate(model, step_data, CPU, Engine())[0]
    gradients = take_gradients(model)
    assert ours.item() == pytest.approx(theirs.item(), **TOLERANCE)
    scale = max(g.abs().max() for g in expected.values())
    error = max((gradients[n] - g).abs().max() for n, g in expected.items()) / scale
    assert error < 1e-4, f"{error} of {scale}"
    with torch.no_grad():
        for name, gradient in gradients.items():
            model.get_parameter(name).sub_(rate * gradient)
    return ours.item(), theirs.item()


# With rates at which no pair is done with after four steps.
@pytest.mark.parametrize(("variant", "rate"), [("sigmoid", 0.05), ("hinge", 0.005), ("ipo", 0.001)])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_dpo_has_the_losses_of_the_dpo_trainer(
    family, variant, rate, open_tiny, make_image, take_gradients, tmp_path
):
    tiny = open_tiny(family, (0, 0))
    image = None if family == "llama" else make_image()
    rows = pair_rows([image, image, image])
    examples = encode(tiny.chat_format, rows, "pairs")
    model, reference = tiny.model, frozen_copy(tiny.model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("vision_tower" not in name)
    trainer = make_trainer(
        model,
        frozen_copy(model),
        tiny.loaded.processor,
        rows,
        tmp_path,
        loss_type=[variant],
        label_smoothing=0.0,
    )
    preference = Preference(ObjectiveConfig(loss="dpo", variant=variant), "copy", reference)
    step_data = make_step(examples, 2, None, per_row=2)
    model.eval()
    losses = []
    for _ in range(NUM_STEPS):
        theirs = trainer.compute_loss(model, trl_batch(model, examples))
        losses.append(descend(preference, model, step_data, theirs, take_gradients, rate))
    print(family, variant, losses)  # shown by pytest -s
    assert losses[-1][0] < losses[0][0]


def test_kto_has_the_losses_of_the_kto_trainer(open_tiny, take_gradients, tmp_path):
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    tiny = open_tiny("llama", (0, 0))
    rows = label_rows([None] * 4)
    examples, others = encode(tiny.chat_format, rows, "labels"), encode_others(tiny.chat_format, rows)
    model, reference = tiny.model, frozen_copy(tiny.model)
    dataset = Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": row["prompt"]}],
                "completion": [{"role": "assistant", "content": row["completion"]}],
                "label": row["label"],
            }
            for row in rows
        ]
    )
    arguments = KTOConfig(
        str(tmp_path), report_to=[], use_cpu=True, bf16=False, beta=0.1, desirable_weight=1.5
    )
    trainer = KTOTrainer(
        model, frozen_copy(model), arguments, train_dataset=dataset, processing_class=tiny.loaded.processor
    )
    preference = Preference(ObjectiveConfig(loss="kto", desirable_weight=1.5), "copy", reference)
    step_data = make_step(examples, 2, None, per_row=1, others=others)
    model.eval()
    losses = []
    for _ in range(NUM_STEPS):
        told = {f"KL_{name}": value for name, value in padded(model, others).items()}
        batch = {**padded(model, examples), **told, "label": torch.tensor([row["label"] for row in rows])}
        theirs = trainer._compute_loss(model, batch, False)
        losses.append(descend(preference, model, step_data, theirs, take_gradients, rate=0.5))
    print("kto", losses)
    assert losses[-1][0] < losses[0][0]


def test_orpo_and_simpo_have_the_losses_of_their_trainers(open_tiny):
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    tiny = open_tiny("llama", (0, 0))
    examples = encode(tiny.chat_format, pair_rows([None] * 4), "pairs")
    with torch.no_grad():
        log_probs = plain_log_probs(tiny.model, examples)
    chosen, rejected = (torch.stack([p.mean() for p in log_probs[first::2]]) for first in (0, 1))
    step_data = make_step(examples, 2, None, per_row=2)
    accelerator = SimpleNamespace(device=CPU)

    simpo = SimpleNamespace(
        loss_type="simpo", beta=2.0, simpo_gamma=1.0, label_smoothing=0.0, alpha=0.0, accelerator=accelerator
    )
    expected = CPOTrainer.cpo_loss(simpo, chosen, rejected)[0].mean()
    ours = Preference(ObjectiveConfig(loss="simpo"), "none").accumulate(tiny.model, step_data, CPU, Engine())
    assert ours[0].item() == pytest.approx(expected.item(), **TOLERANCE)

    orpo = SimpleNamespace(beta=0.1, accelerator=accelerator)
    ratio = ORPOTrainer.odds_ratio_loss(orpo, chosen, rejected)[0].mean()
    token_loss = -torch.cat(log_probs[::2]).mean()
    ours = Preference(ObjectiveConfig(loss="orpo"), "none").accumulate(tiny.model, step_data, CPU, Engine())
    assert ours[0].item() == pytest.approx((token_loss - ratio).item(), **TOLERANCE)
