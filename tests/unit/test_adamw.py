"""AdamW with 8-bit moments: its update beside torch's, what it keeps, and what a refused step leaves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from partwise.config import TrainConfig
from partwise.model.codes import CODE_BLOCK, LEAST_CODED
from partwise.records import PartPlan, PartsPlan
from partwise.training import adamw
from partwise.training.adamw import PackedAdamW, moments
from partwise.training.optim import Optimizer
from partwise.training.state import SavedState, write_state

WIDTH = 96  # 96 x 96 is more than LEAST_CODED elements, and ends inside a block of codes


class Model(nn.Module):
    """A matrix that is packed, and a norm that is not, below a fixed target."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH, bias=False)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        features = torch.randn(8, WIDTH, generator=generator) * torch.logspace(-2, 0, WIDTH)
        return (self.norm(self.linear(features)) - features.roll(1, dims=1)).square().mean()


def make(states: str = "8bit", **train: float) -> tuple[Model, Optimizer]:
    torch.manual_seed(0)
    model = Model()
    names = tuple(name for name, _ in model.named_parameters())
    part = PartPlan("language_model", "full", ("",), 1, 1, 0, names, {}, 1e-3, 0.01)
    settings = TrainConfig(optimizer_states=states, learning_rate_schedule="constant", **train)
    return model, Optimizer(model, PartsPlan((part,)), settings, 200)


def run(model: Model, optimizer: Optimizer, first: int, last: int) -> list[float]:
    losses = []
    for step in range(first, last):
        loss = model(step)
        loss.backward()
        optimizer.step(step, loss.detach())
        losses.append(loss.item())
    return losses


def test_large_tensors_are_packed_and_small_ones_are_not() -> None:
    model, optimizer = make()
    run(model, optimizer, 0, 1)
    states = {name: optimizer.adamw.state[master] for name, master in optimizer.masters.items()}
    assert model.linear.weight.numel() >= LEAST_CODED > model.norm.weight.numel()
    assert {kind: value.dtype for kind, value in states["linear.weight"].items()} == {
        "step": torch.float32,
        "exp_avg_codes": torch.uint8,
        "exp_avg_scales": torch.float32,
        "root_codes": torch.uint8,
        "root_scales": torch.float32,
    }
    assert set(states["norm.weight"]) == {"step", "exp_avg", "exp_avg_sq"}
    kept = sum(value.nbytes for value in states["linear.weight"].values())
    assert kept == 2 * WIDTH**2 + 2 * 4 * (WIDTH**2 // CODE_BLOCK) + 4


def test_the_first_step_is_torchs_to_the_bit() -> None:
    """Moments are rounded after they were used."""
    (packed, its_optimizer), (plain, other) = make(), make("float32")
    run(packed, its_optimizer, 0, 1)
    run(plain, other, 0, 1)
    for mine, theirs in zip(packed.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_the_loss_stays_beside_that_of_fp32_states() -> None:
    packed, plain = run(*make(), 0, 200), run(*make("float32"), 0, 200)
    assert packed != plain
    assert plain[-1] < 0.6 * plain[0]
    for mine, theirs in zip(packed, plain, strict=True):
        assert abs(mine - theirs) < 0.04 * theirs


@pytest.mark.parametrize("piece", [CODE_BLOCK, 4 * CODE_BLOCK])
def test_pieces_change_nothing(monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    whole, _ = model_and_losses = make()
    run(*model_and_losses, 0, 5)
    monkeypatch.setattr(adamw, "PIECE", piece)
    pieced, optimizer = make()
    run(pieced, optimizer, 0, 5)
    assert torch.equal(whole.linear.weight, pieced.linear.weight)
    assert optimizer.adamw.state[optimizer.masters["linear.weight"]]["step"] == 5


def test_state_goes_to_another_optimizer_bitwise(tmp_path: Path) -> None:
    model, optimizer = make()
    run(model, optimizer, 0, 3)
    state = {key: value.clone() for key, value in optimizer.state_dict().items()}
    other, resumed = make()
    write_state(tmp_path / "state.safetensors", state, {})
    resumed.load(SavedState([tmp_path / "state.safetensors"]))
    run(model, optimizer, 3, 8)
    run(other, resumed, 3, 8)
    assert optimizer.state_dict().keys() == resumed.state_dict().keys() == state.keys()
    for key, value in optimizer.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key


def test_a_step_that_is_not_finite_changes_nothing_from_then_on() -> None:
    model, optimizer = make()
    run(model, optimizer, 0, 3)
    before = {key: value.clone() for key, value in optimizer.state_dict().items()}
    (model(3) * float("nan")).backward()
    optimizer.step(3)
    run(model, optimizer, 4, 6)
    assert optimizer.stopped == 1
    for key, value in optimizer.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_a_tensor_without_gradient_is_left_as_it_is() -> None:
    model, optimizer = make()
    model.norm(torch.randn(2, WIDTH)).square().sum().backward()
    weight = model.linear.weight.detach().clone()
    optimizer.step(0)
    assert torch.equal(model.linear.weight, weight)
    assert optimizer.masters["linear.weight"] not in optimizer.adamw.state


def test_a_small_second_moment_is_never_rounded_to_zero() -> None:
    """One element's gradient is a millionth of another's, and then gone: its step must not explode."""
    parameter = nn.Parameter(torch.zeros(LEAST_CODED))
    optimizer = PackedAdamW([parameter], lr=1e-3, fused=True)
    optimizer.found_inf = torch.zeros(())
    gradient = torch.ones(LEAST_CODED)
    gradient[1] = 1e-8
    parameter.grad = gradient
    optimizer.step()
    before = parameter.detach().clone()
    parameter.grad = torch.where(gradient < 1, 0.0, gradient)
    optimizer.step()
    assert (parameter - before).abs().max() < 1.5e-3
    (mean, square), *_ = moments(optimizer.state[parameter])
    assert square[1] > 0 and mean.shape == parameter.shape


def test_a_root_above_zero_never_has_the_code_of_zero() -> None:
    """Else a weight whose gradient is gone for a step would move by its first moment over eps."""
    _, _, root_codes, _ = adamw.pack(torch.zeros(3), torch.tensor([0.0, 1e-20, 1.0]))
    assert root_codes.tolist() == [0, 1, 255]


def test_weights_without_gradient_stand_among_others_that_move() -> None:
    parameter = nn.Parameter(torch.zeros(LEAST_CODED))
    optimizer = PackedAdamW([parameter], lr=1e-3, weight_decay=0.0, fused=True)
    optimizer.found_inf = torch.zeros(())
    for seed in range(5):
        parameter.grad = torch.randn(LEAST_CODED, generator=torch.Generator().manual_seed(seed))
        parameter.grad[::3] = 0
        optimizer.step()
    assert (parameter[::3] == 0).all() and (parameter[1::3] != 0).all()


def test_directions_are_what_the_update_was() -> None:
    model, optimizer = make(weight_decay=0.0)
    run(model, optimizer, 0, 20)
    before = model.linear.weight.detach().clone()
    run(model, optimizer, 20, 21)
    moved = (before * (1 - 1e-3 * 0.01) - model.linear.weight.detach()).reshape(-1)
    told = 1e-3 * torch.cat(list(optimizer.directions("linear.weight")))
    assert (told - moved).norm() < 0.05 * moved.norm()
    rate = optimizer.groups["linear.weight"]["lr"]
    norm = rate * torch.cat(list(optimizer.directions("linear.weight"))).norm()
    assert optimizer.update_norm(["linear.weight"]).item() == pytest.approx(norm.item(), rel=1e-5)
