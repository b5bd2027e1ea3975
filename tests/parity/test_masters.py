"""bf16 weights with fp32 masters learn as fp32 weights do; bf16 weights under plain AdamW hardly move."""

from __future__ import annotations

import torch

from partwise.training.optim import Optimizer
from partwise.training.step import batch_loss_sum, train_step

CPU = torch.device("cpu")
PARTS = {"projector": "full", "language_model": "full"}
TRAIN = {"learning_rate": 1e-5, "learning_rate_schedule": "constant", "max_grad_norm": 1e9}
STEPS = 12


def update_of(tensors: dict[str, torch.Tensor], before: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([(tensors[name].detach().double() - before[name].double()).flatten() for name in before])


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return torch.nn.functional.cosine_similarity(a, b, dim=0).item()


def test_bf16_with_masters_moves_as_fp32_does(open_tiny):
    exact, rounded, plain = (
        open_tiny("gemma3", (1, 0, 1, 0)),
        *(open_tiny("gemma3", (1, 0, 1, 0), "bfloat16") for _ in range(2)),
    )
    # All start from the same, representable weights.
    exact.model.load_state_dict({n: t.float() for n, t in rounded.model.state_dict().items()})
    plan, config = exact.plan(PARTS, **TRAIN)
    rounded.plan(PARTS, **TRAIN)
    plain.plan(PARTS, **TRAIN)
    optimizers = {id(t): Optimizer(t.model, plan, config.train, STEPS) for t in (exact, rounded)}
    before = {n: m.detach().clone() for n, m in optimizers[id(exact)].masters.items()}
    adamw = torch.optim.AdamW(
        [p for p in plain.model.parameters() if p.requires_grad], lr=1e-5, weight_decay=0
    )
    for step in range(STEPS):
        for tiny in (exact, rounded):
            train_step(tiny.model, tiny.split([2, 2], step), optimizers[id(tiny)], CPU)
        for batch in (step_data := plain.split([2, 2], step)).batches:
            count = sum(b.num_target_tokens for b in step_data.batches)
            (batch_loss_sum(plain.model, batch, CPU) / count).backward()
        adamw.step()
        adamw.zero_grad()

    expected = update_of(optimizers[id(exact)].masters, before)
    with_masters = update_of(optimizers[id(rounded)].masters, before)
    without = update_of(dict(plain.model.named_parameters()), before)
    assert cosine(with_masters, expected) > 0.99
    assert 0.99 < with_masters.norm() / expected.norm() < 1.01
    assert cosine(without, expected) < 0.5
    assert (without == 0).double().mean() > 0.8
