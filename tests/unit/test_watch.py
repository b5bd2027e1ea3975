"""What is observed of a step is what copies give, and alarms go off when they should, once."""

from __future__ import annotations

import math
import random
from dataclasses import asdict, replace

import pytest
import torch
from torch import nn

from partwise.config import TrainConfig
from partwise.records import PartPlan, PartsPlan, StepMetrics
from partwise.training.optim import Optimizer
from partwise.training.watch import Watch, observe_gradients, observe_update

PARTS = ("projector", "language_model")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_observed_numbers_are_those_of_the_real_update(dtype):
    torch.manual_seed(0)
    model = nn.ModuleDict({"embed": nn.Embedding(10, 4), "unused": nn.Linear(4, 4), "head": nn.Linear(4, 3)})
    model.to(dtype)
    paths = {"vision_tower": "unused", "projector": "embed", "language_model": "head"}
    parts = []
    for part, path in paths.items():
        names = tuple(n for n, _ in model.named_parameters() if n.startswith(path))
        parts.append(PartPlan(part, "full", (path,), 1, len(names), 0, names, {}, 1e-2, 0.0))
    optimizer = Optimizer(model, PartsPlan(tuple(parts)), TrainConfig(), 9)
    for step in range(3):
        before = {name: master.detach().clone() for name, master in optimizer.masters.items()}
        model["head"](model["embed"](torch.tensor([1, 1, 7]))).float().square().sum().backward()
        gradients = observe_gradients(optimizer)
        optimizer.step(step)
        observed = observe_update(optimizer, gradients)
        assert observed.parts == PARTS
        zero_fractions, ratios = observed.values
        assert zero_fractions.tolist() == [0.8, 0.0]
        for part, ratio in zip(PARTS, ratios.tolist(), strict=True):
            names = optimizer.names[part]
            moved = math.hypot(*((optimizer.masters[n] - before[n]).norm().item() for n in names))
            size = math.hypot(*(optimizer.masters[n].norm().item() for n in names))
            assert ratio == pytest.approx(moved / size, rel=1e-4)


def test_a_step_without_gradients_has_nothing_to_observe():
    model = nn.ModuleDict({"head": nn.Linear(4, 3)})
    part = PartPlan("projector", "full", ("head",), 1, 1, 0, ("head.weight",), {}, 1e-2, 0.0)
    assert observe_gradients(Optimizer(model, PartsPlan((part,)), TrainConfig(), 9)) is None


def make_metrics(step: int, loss: float = 2.0, reached=PARTS, **changes: dict[str, float]) -> StepMetrics:
    """Metrics of a healthy step with noise; `changes` multiply the numbers of parts."""
    noise = random.Random(step)
    scale = {name: {**dict.fromkeys(PARTS, 1.0), **values} for name, values in changes.items()}
    norms = scale.get("norms", dict.fromkeys(PARTS, 1.0))
    ratios = scale.get("ratios", dict.fromkeys(PARTS, 1.0))
    rate = 1e-3 * (1 - step / 1000)
    return StepMetrics(
        step=step,
        epoch=step / 10,
        loss=loss * noise.uniform(0.5, 1.5),
        grad_norm=1.0,
        grad_norms={p: noise.uniform(0.2, 5) * norms[p] if p in reached else 0.0 for p in PARTS},
        update_ratios={p: rate * noise.uniform(0.5, 2) * ratios[p] for p in reached},
        zero_gradient_fractions=dict.fromkeys(reached, 0.0),
        learning_rates=dict.fromkeys(PARTS, rate),
        num_input_tokens=1,
        num_target_tokens=1,
        num_dropped={},
        step_seconds=0.1,
        data_wait_seconds=0.0,
        peak_memory_bytes=1,
    )


def alarms(watch: Watch, metrics: list[StepMetrics]) -> list[tuple[int, str, str]]:
    return [(m.step, alarm.kind, alarm.part) for m in metrics for alarm in watch.see(m)]


def test_a_healthy_run_gives_no_alarm():
    """Noise, a falling rate and loss, and steps of text alone, which do not reach the projector."""
    steps = [make_metrics(step, 4 * 0.99**step, PARTS if step % 3 else PARTS[1:]) for step in range(1, 600)]
    assert alarms(Watch(), steps) == []


@pytest.mark.parametrize("what", ["norms", "ratios"])
def test_a_part_that_stops_learning_is_told_once(what):
    dead = {"norms": {"projector": 1e-8}, "ratios": {"projector": 1e-5}}[what]
    steps = [make_metrics(s) for s in range(1, 30)]
    steps += [make_metrics(s, **{what: dead}) for s in range(30, 60)]
    assert ("part stopped", "projector") in {(kind, part) for _, kind, part in alarms(Watch(), steps)}
    told = [alarm for alarm in alarms(Watch(), steps) if alarm[1] == "part stopped"]
    assert told == [(34, "part stopped", "projector")]


def test_a_task_that_is_solved_is_no_part_that_stops():
    dead = dict.fromkeys(PARTS, 1e-8)
    steps = [make_metrics(s) for s in range(1, 30)]
    steps += [make_metrics(s, loss=1e-5, norms=dead) for s in range(30, 60)]
    assert alarms(Watch(), steps) == []


def test_a_loss_spike_is_told_once_with_its_numbers():
    steps = [make_metrics(s) for s in range(1, 30)]
    steps += [make_metrics(30, loss=60.0), make_metrics(31), make_metrics(32, loss=60.0)]
    watch = Watch()
    assert alarms(watch, steps[:-3]) == []
    (alarm,) = watch.see(steps[-3])
    assert (alarm.kind, alarm.part) == ("loss spike", "")
    assert (
        f"the loss is {steps[-3].loss:.4g}, and the median of the 20 logged steps before is" in alarm.message
    )
    assert alarms(watch, steps[-2:]) == []


def test_a_projector_that_hardly_moves_is_told_after_many_steps():
    still = {"projector": 1e-5}
    steps = [make_metrics(s, ratios=still) for s in range(1, 60)]
    assert alarms(Watch(), steps) == [(20, "projector still", "projector")]
    assert alarms(Watch(), [make_metrics(s, ratios={"language_model": 1e-5}) for s in range(1, 60)]) == []


def test_a_resumed_run_knows_what_was_seen_and_said():
    still = {"projector": 1e-5}
    steps = [make_metrics(s, ratios=still) for s in range(1, 60)]
    seen = [asdict(metrics) for metrics in steps[:12]]
    assert alarms(Watch([*seen, {"step": 12, "eval_loss": 1.0}]), steps[12:]) == [
        (20, "projector still", "projector")
    ]
    said = {"step": 20, "warning": "projector still", "part": "projector", "message": ""}
    seen = [asdict(metrics) for metrics in steps[:25]]
    assert alarms(Watch([*seen, said]), steps[25:]) == []


@pytest.mark.parametrize(
    ("wait", "is_told"), [(0.09, True), (0.021, True), (0.019, False), (0.0, False)], ids=str
)
def test_steps_that_wait_for_rows_are_told_once(wait, is_told):
    steps = [replace(make_metrics(s), step_seconds=1.0, data_wait_seconds=wait) for s in range(1, 40)]
    assert alarms(Watch(), steps) == ([(20, "waiting for rows", "")] if is_told else [])


def test_workers_that_start_are_waited_for_once_and_slow_ones_again_and_again():
    """Of eight workers each prepares a whole step, so that every eighth step waits for all."""
    for late, told in ({1}, []), ({1, 9, 17, 25, 33}, [(20, "waiting for rows", "")]):
        steps = [
            replace(make_metrics(s), step_seconds=1.0, data_wait_seconds=0.8 if s in late else 0.0)
            for s in range(1, 40)
        ]
        assert alarms(Watch(), steps) == told


def test_a_wait_of_milliseconds_is_nothing():
    steps = [replace(make_metrics(s), step_seconds=0.02, data_wait_seconds=0.009) for s in range(1, 40)]
    assert alarms(Watch(), steps) == []
