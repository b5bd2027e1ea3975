"""The proof of what moved and what stands, on small modules, and the update that a broken step skips."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from partwise.config import TrainConfig
from partwise.errors import TrainingError
from partwise.records import PartPlan, PartsPlan
from partwise.training.optim import Optimizer
from partwise.training.proof import Proof, add_to_report, fingerprint, frozen_tensors

LORA_LIKE = ("decoder.down", "decoder.up")


class Model(nn.Module):
    """A tower, and a decoder with a low-rank path whose second factor starts at zero."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tower = nn.Linear(4, 6)
        self.register_buffer("scale", torch.ones(1))
        self.decoder = nn.Linear(6, 5, bias=False)
        self.decoder.down = nn.Parameter(torch.randn(6, 2))
        self.decoder.up = nn.Parameter(torch.zeros(2, 5))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        hidden = self.tower(features) * self.scale
        low_rank = hidden @ self.decoder.down @ self.decoder.up
        return (self.decoder(hidden) + low_rank - 1).float().square().mean()


def make_part(model: nn.Module, part: str, path: str, rate: float, names: tuple[str, ...]) -> PartPlan:
    mode = "full" if names else "frozen"
    return PartPlan(part, mode, (path,), 1, len(names), 0, names, {}, rate, 0.0)


def make_run(dtype=torch.float32, rate=1e-3, names=LORA_LIKE):
    model = Model().to(dtype)
    tower = tuple(name for name in names if name.startswith("tower"))
    decoder = tuple(name for name in names if name.startswith("decoder"))
    plan = PartsPlan(
        (
            make_part(model, "vision_tower", "tower", rate, tower),
            make_part(model, "language_model", "decoder", rate, decoder),
        )
    )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    optimizer = Optimizer(model, plan, TrainConfig(), 10)
    return model, optimizer, Proof(model, plan, optimizer)


def take_steps(model: nn.Module, optimizer: Optimizer, count: int = 1) -> None:
    for step in range(count):
        model(torch.ones(3, 4, dtype=model.tower.weight.dtype)).backward()
        optimizer.step(step)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_zero_gradient_stands_in_step_1_and_moves_later(dtype):
    model, optimizer, proof = make_run(dtype)
    take_steps(model, optimizer)
    finding = proof.check(1)
    assert finding.message == (
        "step 1: 1 of 2 trainable tensors moved, 1 stand with a gradient of exactly zero, "
        "0 of 3 frozen tensors changed"
    )
    assert finding.values["standing"] == {"with a gradient of exactly zero": ["decoder.down"]}
    take_steps(model, optimizer, 2)
    assert proof.check(3).message == "step 3: all 2 trainable tensors moved, 0 of 3 frozen tensors changed"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_bit_of_a_frozen_tensor_is_found(dtype):
    model, optimizer, proof = make_run(dtype)
    with torch.no_grad():
        model.tower.bias[2] = 0.0
    proof = Proof(model, proof.plan, optimizer)
    take_steps(model, optimizer)
    with torch.no_grad():
        model.tower.bias[2] = -0.0  # equal as a number, another bit
    with pytest.raises(TrainingError) as caught:
        proof.check(1)
    assert str(caught.value).startswith(
        "step 1: 1 tensors of which each changed although it is frozen: vision_tower: 1 (tower.bias). "
    )


def test_a_tensor_that_the_update_leaves_out_is_found():
    model, optimizer, proof = make_run(names=("tower.weight", "decoder.weight"))
    group = optimizer.groups["tower.weight"]
    group["params"] = []
    take_steps(model, optimizer)
    with pytest.raises(TrainingError, match=r"each did not move: vision_tower: 1 \(tower\.weight\)"):
        proof.check(1)


def test_a_tensor_that_the_model_no_longer_uses_is_found():
    model, optimizer, proof = make_run(names=("tower.weight", "decoder.weight"))
    take_steps(model, optimizer)
    model.tower.weight = nn.Parameter(model.tower.weight.detach().clone())
    with pytest.raises(TrainingError, match=r"each did not move: vision_tower: 1 \(tower\.weight\)"):
        proof.check(1)


def test_a_rate_too_small_is_a_reason_and_a_rate_of_zero_is_none():
    model, optimizer, proof = make_run(rate=1e-30, names=("tower.weight",))
    take_steps(model, optimizer)
    assert "1 stand with an update too small for their values at this learning rate" in proof.check(1).message
    model, optimizer, proof = make_run(rate=0.0, names=("tower.weight",))
    take_steps(model, optimizer)
    with pytest.raises(TrainingError, match="did not move"):
        proof.check(1)


def test_a_part_that_no_row_has_reached_yet_is_named():
    model, optimizer, proof = make_run(names=("tower.weight", "decoder.weight"))
    model.decoder(torch.ones(6)).sum().backward()
    optimizer.step(0)
    assert "1 of 2 trainable tensors moved, 1 stand not reached by a row yet" in proof.check(1).message


def test_steps_up_and_down_do_not_cancel():
    before = torch.ones(4, dtype=torch.bfloat16)
    after = before.clone()
    after.view(torch.int16)[:] += torch.tensor([1, -1, 2, -2], dtype=torch.int16)
    assert fingerprint(before)[0] == fingerprint(after)[0]
    assert not torch.equal(fingerprint(before), fingerprint(after))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.bfloat16, torch.float32, torch.int64])
def test_tensors_of_all_types_and_shapes_have_fingerprints(dtype):
    for shape in ((), (0,), (3, 2)):
        assert fingerprint(torch.ones(shape).to(dtype)).shape == (2,)
    assert torch.equal(fingerprint(torch.ones(4, 6).T), fingerprint(torch.ones(24)))


def test_buffers_count_only_where_nothing_may_update_them():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2))
    part = make_part(model, "language_model", "1", 1e-3, ("1.weight", "1.bias"))
    optimizer = Optimizer(model, PartsPlan((part,)), TrainConfig(), 3)
    assert frozen_tensors(model, optimizer).keys() == {"0.weight", "0.bias"}
    model[0].eval()
    assert "0.running_mean" in frozen_tensors(model, optimizer)


def test_the_report_holds_one_proof_per_step(tmp_path):
    model, optimizer, proof = make_run()
    (tmp_path / "report.json").write_text('[{"check": "plan", "values": {}}]')
    take_steps(model, optimizer)
    for step in (1, 1, 2):
        add_to_report(tmp_path, proof.check(step))
    report = json.loads((tmp_path / "report.json").read_text())
    assert [(f["check"], f["values"].get("step")) for f in report] == [
        ("plan", None),
        ("proof", 1),
        ("proof", 2),
    ]


@pytest.mark.parametrize("broken", ["loss", "gradient"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_that_is_not_finite_changes_nothing_nor_does_any_after_it(dtype, broken):
    model, optimizer, _ = make_run(dtype)
    take_steps(model, optimizer, 2)
    before = {key: value.clone() for key, value in optimizer.state_dict().items()}
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    model(torch.ones(3, 4, dtype=dtype)).backward()
    if broken == "gradient":
        optimizer.masters["decoder.up"].grad[0, 0] = float("inf")
    optimizer.step(2, torch.tensor(float("nan") if broken == "loss" else 1.0).double())
    assert optimizer.stopped == 1
    model(torch.ones(3, 4, dtype=dtype)).backward()
    optimizer.step(3, torch.tensor(1.0).double())
    assert all(torch.equal(value, before[key]) for key, value in optimizer.state_dict().items())
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
