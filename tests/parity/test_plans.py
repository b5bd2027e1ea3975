"""After some steps of a plan: frozen tensors are bit-identical, and all that trains moved."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from partwise.errors import TrainingError
from partwise.records import PartsPlan
from partwise.training.optim import Optimizer
from partwise.training.step import batch_loss_sum, read_outcomes, train_step

CPU = torch.device("cpu")
LORA = {"mode": "lora", "lora_rank": 4}
PLANS = {
    "projector full, language lora": {"projector": "full", "language_model": LORA},
    "all full": {"vision_tower": "full", "projector": "full", "language_model": "full"},
    "projector only": {"projector": "full"},
    "last layer": {"language_model": {"mode": "full", "layers": "-1:"}},
    "vision lora": {"vision_tower": LORA},
    "qlora": {"projector": "full", "language_model": {**LORA, "quantization": "nf4"}},
    "projector over nf4": {"projector": "full", "language_model": {"mode": "frozen", "quantization": "nf4"}},
}


@pytest.mark.parametrize("plan_name", PLANS)
@pytest.mark.parametrize("family", ["gemma3", "llava-next", "qwen2.5-vl"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_exactly_the_plan_trains(family, plan_name, dtype, open_tiny):
    tiny = open_tiny(family, (1, 0, 2), dtype)
    plan, config = tiny.plan(PLANS[plan_name])
    model, trainable = tiny.model, set(plan.trainable)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert trainable <= before.keys()
    optimizer = Optimizer(model, plan, config.train, 3)
    masters = {name: master.detach().clone() for name, master in optimizer.masters.items()}
    losses = []
    for step in range(3):
        outcome = train_step(model, tiny.split([2, 1], step), optimizer, CPU)
        losses.append(read_outcomes([outcome])[0].loss)
        assert all(p.grad is None for p in model.parameters())

    changed = {n for n, tensor in model.state_dict().items() if not torch.equal(tensor, before[n])}
    tied = {n for n in before if n.endswith("lm_head.weight")} if model.config.tie_word_embeddings else set()
    assert changed - tied <= trainable
    moved = {name for name, master in optimizer.masters.items() if not torch.equal(master, masters[name])}
    assert moved == trainable
    if dtype == "float32":
        assert changed | tied == trainable | tied
    assert losses[2] < losses[0]


def test_held_tensors_get_no_gradient_even_when_they_are_open(open_tiny):
    tiny = open_tiny("llava-next", (1, 1))
    plan, _ = tiny.plan({"vision_tower": "full", "projector": "full"})
    held = {name for part in plan.parts for name in part.held}
    assert held
    tiny.model.requires_grad_(True)
    batch_loss_sum(tiny.model, tiny.split([2]).batches[0], CPU).backward()
    reached = {name for name, p in tiny.model.named_parameters() if p.grad is not None}
    assert not held & reached


def test_a_trainable_tensor_that_no_gradient_reaches_stops_the_run(open_tiny):
    tiny = open_tiny("llava-next", (1, 1))
    plan, config = tiny.plan({"vision_tower": "full", "projector": "full"})
    vision = plan["vision_tower"]
    wrong = replace(vision, trainable=(*vision.trainable, *vision.held), held={})
    plan = PartsPlan(tuple(wrong if part is vision else part for part in plan.parts))
    tiny.model.requires_grad_(True)
    first, num_dead = sorted(vision.held, key=list(wrong.trainable).index)[0], len(vision.held)
    with pytest.raises(TrainingError) as caught:
        train_step(tiny.model, tiny.split([2]), Optimizer(tiny.model, plan, config.train, 3), CPU)
    assert str(caught.value).startswith(
        f"step 1: no gradient has reached {num_dead} of the {len(wrong.trainable)} tensors of vision_tower "
        f"that the plan trains: {first}"
    )


def test_text_rows_leave_the_vision_side_as_it_is(open_tiny):
    tiny = open_tiny("gemma3", (0, 0))
    plan, config = tiny.plan({"vision_tower": "full", "projector": "full"})
    before = {name: tensor.clone() for name, tensor in tiny.model.state_dict().items()}
    optimizer = Optimizer(tiny.model, plan, config.train, 3)
    values = read_outcomes([train_step(tiny.model, tiny.split([1, 1]), optimizer, CPU)])[0]
    assert values.loss > 0 and values.grad_norms == {"vision_tower": 0.0, "projector": 0.0}
    assert all(torch.equal(t, before[name]) for name, t in tiny.model.state_dict().items())
