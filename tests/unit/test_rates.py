"""The range test where the answer is known: gradient descent on a quadratic diverges above 2 / curvature."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from test_optim import Model, make_plan, run_backward

from partwise.config import TrainConfig, load_config
from partwise.rates.report import config_lines, remarks
from partwise.rates.suggest import Suggestion, Sweep, diverges, growing_rates, suggest_rate
from partwise.rates.sweep import SweepOptimizer

CURVATURES = (1.0, 10.0, 100.0)
LIMIT = 2 / max(CURVATURES)  # above it each step makes the steepest direction grow


def descend(rates: tuple[float, ...], noise: float = 0.0, num_steps: int | None = None) -> Sweep:
    """Gradient descent from (1, 1, 1) on half the sum of curvature * x^2, with these rates in turn."""
    generator = random.Random(0)
    place, losses = [1.0] * len(CURVATURES), []

    def loss() -> float:
        return sum(c * x * x for c, x in zip(CURVATURES, place, strict=True)) / 2 + generator.gauss(0, noise)

    first = loss()
    for rate in rates:
        place = [x * (1 - rate * c) for c, x in zip(CURVATURES, place, strict=True)]
        losses.append(loss())
        if diverges([first, *losses], num_steps or len(rates)):
            return Sweep(("projector",), rates[: len(losses)], tuple(losses), first, True)
    return Sweep(("projector",), rates, tuple(losses), first, False)


@pytest.mark.parametrize("noise", [0.0, 2.0])
def test_the_suggestion_lies_below_the_rate_that_diverges_and_trains(noise):
    sweep = descend(growing_rates(1e-7, 1.0, 100), noise)
    found = suggest_rate(sweep, 100)
    assert sweep.has_diverged and LIMIT < found.diverged_rate < 10 * LIMIT
    assert found.rate is not None and LIMIT / 100 < found.rate < LIMIT
    short = descend((found.rate,) * 50)
    assert short.losses[-1] < 0.2 * short.first_loss and not short.has_diverged
    # Short runs improve in the whole stretch around it, and not beyond the limit.
    for rate in (found.rate / 3, found.rate * 3):
        assert descend((rate,) * 50).losses[-1] < 0.5 * short.first_loss
    assert descend((1.5 * LIMIT,) * 50).has_diverged


def test_a_loss_that_only_varies_gives_no_suggestion():
    generator = random.Random(1)
    rates = growing_rates(1e-7, 1e-2, 60)
    sweep = Sweep(("projector",), rates, tuple(generator.gauss(2, 0.1) for _ in rates), 2.0, False)
    found = suggest_rate(sweep, 60)
    assert found.rate is None
    assert remarks({"projector": found}, together=False) == [
        "projector: no rate made the loss fall by more than it varies from step to step. Give more --steps "
        "or a larger train.global_batch_size."
    ]


def test_a_loss_that_falls_to_the_end_says_so():
    sweep = descend(growing_rates(1e-7, LIMIT / 4, 60))
    found = suggest_rate(sweep, 60)
    assert found.is_open and found.diverged_rate is None
    assert remarks({"projector": found}, together=False) == [
        "projector: the loss still fell at the highest rate. Raise --high."
    ]


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([2.0, 2.0, 2.0, 2.0, 1.0, 1.0, 1.0, 1.0], False),
        ([2.0, 2.0, 2.0, 2.0, 2.3, 2.3, 2.3, 2.3], True),
        ([2.0, 2.0, 2.0, 2.0, 2.1, 2.1, 2.1, 2.1], False),
        ([1.5, 2.5, 1.5, 2.5, 2.3, 2.3, 2.3, 2.3], False),
        ([0.02, 0.02, 0.02, 0.02, 0.09, 0.09, 0.09, 0.09], False),
        ([0.02, 0.02, 0.02, 0.02, 0.19, 0.19, 0.19, 0.19], True),
        ([2.0, math.inf], True),
        ([2.0, math.nan], True),
    ],
)
def test_when_a_loss_diverges(losses, expected):
    assert diverges(losses, num_steps=20) is expected


def test_rates_grow_by_equal_factors():
    assert growing_rates(1e-4, 1e-1, 4) == pytest.approx((1e-4, 1e-3, 1e-2, 1e-1))


@pytest.mark.parametrize(
    "swept", [("vision_tower",), ("language_model",), ("vision_tower", "language_model")]
)
def test_parts_that_are_not_swept_stand_bit_for_bit(swept):
    model = Model()
    plan = make_plan(model, vision_tower=1e-3, language_model=1e-3)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    rates = (1e-3, 1e-2, 1e-1)
    optimizer = SweepOptimizer(model, plan, TrainConfig(weight_decay=0.5), rates, swept)
    for step, rate in enumerate(rates):
        run_backward(model, step)
        optimizer.step(step)
        assert {group["lr"] for group in optimizer.adamw.param_groups} <= {rate, 0.0}
    moved = {plan.part_of(n) for n, p in model.named_parameters() if not torch.equal(p.detach(), before[n])}
    assert moved == set(swept)


def test_layers_keep_their_rates_beside_each_other():
    model = Model()
    plan = make_plan(model, vision_tower=1e-3, language_model=1e-3)
    decayed = replace(plan["language_model"], rate_fractions={"embed.weight": 0.25})
    plan = replace(plan, parts=(plan["vision_tower"], decayed))
    optimizer = SweepOptimizer(model, plan, TrainConfig(), (1e-3, 1e-2), ("language_model",))
    run_backward(model, 0)
    optimizer.step(1)
    rates = {name: group["lr"] for name, group in optimizer.groups.items()}
    assert rates["decoder.weight"] == pytest.approx(1e-2) and rates["embed.weight"] == pytest.approx(2.5e-3)
    assert optimizer.learning_rates(1) == pytest.approx({"vision_tower": 0.0, "language_model": 1e-2})


def found_rate(rate: float | None) -> Suggestion:
    return Suggestion(rate, 2.0, 1.0, 1e-2, None, False)


@pytest.fixture
def make(tmp_path) -> Callable:
    def load(text: str):
        path = tmp_path / "c.yaml"
        path.write_text(f"model: {{path: m}}\ndata: {{train: a.jsonl}}\noutput: o\n{text}\n")
        return load_config(path)

    return load


def test_the_printed_lines_are_parts_with_the_suggested_rates(make):
    config = make(
        "parts: {vision_tower: frozen, projector: full, language_model: {mode: lora, lora_rank: 8}}"
    )
    text = config_lines(config, {"projector": found_rate(1.2e-4), "language_model": found_rate(None)})
    read = make(text).parts
    assert read.settings("projector").learning_rate == 1.2e-4
    assert read.vision_tower == "frozen" and read.settings("projector").mode == "full"
    assert read.language_model == config.parts.language_model
    assert config_lines(config, {"projector": found_rate(None)}) == ""
