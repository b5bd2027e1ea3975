"""The optimizer on small modules: groups, schedule, clipping, masters, state, and its errors."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from partwise.config import TrainConfig
from partwise.errors import CheckpointError, PlanError
from partwise.records import PartPlan, PartsPlan
from partwise.training.optim import Optimizer, learning_rate_factor
from partwise.training.state import SavedState, write_state


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6))
        self.embed = nn.Embedding(5, 6)
        self.decoder = nn.Linear(6, 5, bias=False)

    def forward(self, features: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.tower(features) + self.embed(ids)).float().square().mean()


PATHS = {"vision_tower": ("tower",), "language_model": ("embed", "decoder")}


def make_plan(model: nn.Module, **rates: float) -> PartsPlan:
    """Parts with a learning rate train in full, the others are frozen."""
    parts = []
    for part, paths in PATHS.items():
        names = tuple(n for n, _ in model.named_parameters() if n.startswith(paths))
        trainable = names if part in rates else ()
        parts.append(
            PartPlan(
                part=part,
                mode="full" if trainable else "frozen",
                module_paths=paths,
                num_parameters=len(names),
                num_trainable=len(trainable),
                num_layers=0,
                trainable=trainable,
                held={},
                learning_rate=rates.get(part, 0.0),
                weight_decay=0.1,
            )
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(name in part.trainable for part in parts))
    return PartsPlan(tuple(parts))


def run_backward(model: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    dtype = model.decoder.weight.dtype
    features = torch.randn(3, 4, generator=generator).to(dtype)
    model(features, torch.randint(5, (3,), generator=generator)).backward()


def make_model(dtype: torch.dtype = torch.float32) -> Model:
    torch.manual_seed(0)
    return Model().to(dtype)


def test_each_part_has_its_rate_and_norms_biases_embeddings_do_not_decay():
    model = make_model()
    optimizer = Optimizer(model, make_plan(model, vision_tower=1e-3, language_model=1e-4), TrainConfig(), 10)
    groups = {
        tuple(g["names"]): (g["part"], g["lr"], g["weight_decay"]) for g in optimizer.adamw.param_groups
    }
    assert groups == {
        ("tower.0.weight",): ("vision_tower", 1e-3, 0.1),
        ("tower.0.bias", "tower.1.weight", "tower.1.bias"): ("vision_tower", 1e-3, 0.0),
        ("decoder.weight",): ("language_model", 1e-4, 0.1),
        ("embed.weight",): ("language_model", 1e-4, 0.0),
    }
    assert optimizer.learning_rates(5) == pytest.approx({"vision_tower": 5e-4, "language_model": 5e-5})


def test_a_tied_head_does_not_decay():
    model = make_model()
    model.decoder.weight = model.embed.weight
    optimizer = Optimizer(model, make_plan(model, language_model=1e-4), TrainConfig(), 10)
    assert [(g["names"], g["weight_decay"]) for g in optimizer.adamw.param_groups] == [
        (["embed.weight"], 0.0)
    ]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 0.8, 0.6, 0.4]),
        ("cosine", [0.5, 1, 1, 0.2 + 0.4 * (1 + 2**-0.5), 0.6, 0.2 + 0.4 * (1 - 2**-0.5)]),
    ],
)
def test_schedule_warms_up_and_falls_to_its_fraction(schedule, expected):
    least = 0.2
    train = TrainConfig(learning_rate_schedule=schedule, warmup_steps=2, min_learning_rate_fraction=least)
    assert [learning_rate_factor(step, 6, train) for step in range(6)] == pytest.approx(expected)


def test_warm_up_longer_than_the_run_never_reaches_the_peak():
    train = TrainConfig(warmup_steps=10)
    assert [learning_rate_factor(step, 3, train) for step in range(3)] == pytest.approx([0.1, 0.2, 0.3])


def test_equals_torch_adamw_bitwise_on_fp32():
    model, reference = make_model(), make_model()
    train = TrainConfig(learning_rate_schedule="constant", max_grad_norm=1e9, adam_betas=(0.9, 0.95))
    plan = make_plan(model, vision_tower=1e-3, language_model=1e-3)
    optimizer = Optimizer(model, plan, train, 5)
    decayed = [reference.tower[0].weight, reference.decoder.weight]
    rest = [p for p in reference.parameters() if not any(p is d for d in decayed)]
    adamw = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
        lr=1e-3,
        betas=(0.9, 0.95),
        fused=True,
    )
    for step in range(5):
        run_backward(model, step)
        run_backward(reference, step)
        optimizer.step(step)
        adamw.step()
        adamw.zero_grad()
    for mine, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_clips_by_the_global_norm_and_returns_norms_per_part():
    model = make_model()
    plan = make_plan(model, vision_tower=1e-3, language_model=1e-3)
    optimizer = Optimizer(model, plan, TrainConfig(max_grad_norm=0.01), 5)
    run_backward(model)
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    norms = optimizer.step(0)
    for part, paths in PATHS.items():
        parts = [g.flatten() for name, g in gradients.items() if name.startswith(paths)]
        torch.testing.assert_close(norms[part], torch.cat(parts).norm())
    total = torch.cat([g.flatten() for g in gradients.values()]).norm()
    assert total > 0.01
    moment = optimizer.adamw.state[optimizer.masters["decoder.weight"]]["exp_avg"]
    torch.testing.assert_close(moment, 0.1 * gradients["decoder.weight"] * 0.01 / total, rtol=1e-4, atol=0)


def test_masters_of_bf16_weights_collect_gradients_in_fp32():
    model = make_model(torch.bfloat16)
    optimizer = Optimizer(model, make_plan(model, language_model=1e-3), TrainConfig(), 5)
    exact = torch.zeros(5, 6)
    for seed in range(40):
        single = make_model(torch.bfloat16)
        run_backward(single, seed)
        exact += single.decoder.weight.grad.float()
        run_backward(model, seed)
    assert model.decoder.weight.grad is None
    assert torch.equal(optimizer.masters["decoder.weight"].grad, exact)
    optimizer.step(0)
    assert torch.equal(model.decoder.weight, optimizer.masters["decoder.weight"].bfloat16())


def test_a_part_without_gradient_is_left_as_it_is():
    model = make_model()
    optimizer = Optimizer(model, make_plan(model, vision_tower=1e-3, language_model=1e-3), TrainConfig(), 5)
    before = copy.deepcopy(model.tower.state_dict())
    model.decoder(model.embed(torch.tensor([1]))).sum().backward()
    norms = optimizer.step(0)
    assert norms["vision_tower"] == 0
    assert all(torch.equal(value, before[name]) for name, value in model.tower.state_dict().items())
    assert optimizer.never_reached == {f"tower.{name}" for name in before}


def save_state(folder, state):
    """What a fresh process would read."""
    write_state(folder / "state.safetensors", state, {})
    return SavedState([folder / "state.safetensors"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_goes_to_another_optimizer_bitwise(dtype, tmp_path):
    model, other = make_model(dtype), make_model(dtype)
    rates = {"vision_tower": 1e-3, "language_model": 1e-2}
    optimizer = Optimizer(model, make_plan(model, **rates), TrainConfig(), 8)
    for step in range(3):
        run_backward(model, step)
        optimizer.step(step)
    saved = save_state(tmp_path, optimizer.state_dict())
    resumed = Optimizer(other, make_plan(other, **rates), TrainConfig(), 8)
    resumed.load(saved)
    for step in range(3, 8):
        for one, its_optimizer in ((model, optimizer), (other, resumed)):
            run_backward(one, step)
            its_optimizer.step(step)
    for key, value in optimizer.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_state_of_other_parts_is_refused_with_names(tmp_path):
    model = make_model()
    state = Optimizer(model, make_plan(model, language_model=1e-3), TrainConfig(), 8).state_dict()
    other = Optimizer(model, make_plan(model, vision_tower=1e-3), TrainConfig(), 8)
    with pytest.raises(CheckpointError) as caught:
        other.load(save_state(tmp_path, state))
    assert str(caught.value) == (
        "the saved state does not fit the plan: 4 tensors that train now are not in it "
        "(tower.0.bias, tower.0.weight, tower.1.bias), 2 in it do not train now "
        "(decoder.weight, embed.weight). Resume with the parts that the run was started with."
    )


def test_state_of_another_shape_is_refused(tmp_path):
    model = make_model()
    optimizer = Optimizer(model, make_plan(model, language_model=1e-3), TrainConfig(), 8)
    state = {**optimizer.state_dict(), "master/embed.weight": torch.zeros(9, 6)}
    with pytest.raises(CheckpointError) as caught:
        optimizer.load(save_state(tmp_path, state))
    assert str(caught.value) == (
        "the saved state of embed.weight is (9, 6), but this run's is (5, 6). "
        "Resume with the config of the run."
    )


def test_nothing_to_train_is_a_plan_error():
    model = make_model()
    with pytest.raises(PlanError, match="nothing would train: every part is frozen"):
        Optimizer(model, make_plan(model), TrainConfig(), 8)
