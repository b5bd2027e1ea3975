"""On a GPU: the same losses as on the CPU, and an update that the host does not wait for."""

from __future__ import annotations

import pytest
import torch

from partwise.engine.device import peak_memory_bytes, pick_device
from partwise.model.head import token_loss_sum
from partwise.model.quantize import dequantized, quantize_linear
from partwise.training.optim import Optimizer
from partwise.training.step import model_inputs, read_outcomes, train_step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


QLORA = {"mode": "lora", "lora_rank": 64, "quantization": "nf4"}


def train(tiny, parts, device: torch.device, steps: int = 4, **settings: str) -> list[float]:
    tiny.model.to(device)
    plan, config = tiny.plan(parts, **settings)
    same_adapters(tiny.model)
    optimizer = Optimizer(tiny.model, plan, config.train, steps)
    outcomes = [train_step(tiny.model, tiny.split([2, 2], step), optimizer, device) for step in range(steps)]
    return [values.loss for values in read_outcomes(outcomes)]


@torch.no_grad()
def same_adapters(model: torch.nn.Module) -> None:
    """New adapters are drawn on the device, where the same seed gives other numbers."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5)


@pytest.mark.parametrize("states", ["float32", "8bit"])
@pytest.mark.parametrize("language_model", ["full", QLORA], ids=["full", "qlora"])
@pytest.mark.parametrize("family", ["gemma3", "llava-next", "qwen2.5-vl"])
def test_losses_are_those_of_the_cpu(family, language_model, states, open_tiny):
    parts = {"projector": "full", "language_model": language_model}
    device = pick_device()
    assert device.type == "cuda"
    on_gpu = train(open_tiny(family, (1, 0, 2, 1)), parts, device, optimizer_states=states)
    on_cpu = train(open_tiny(family, (1, 0, 2, 1)), parts, torch.device("cpu"), optimizer_states=states)
    # Of moments in 8 bits some round the other way, where a device's sums differ in the last digit.
    assert on_gpu == pytest.approx(on_cpu, rel=1e-3 if states == "float32" else 5e-3)
    assert on_gpu[-1] < on_gpu[0]
    assert peak_memory_bytes(device) > 0


@pytest.mark.parametrize("states", ["float32", "8bit"])
@pytest.mark.parametrize("language_model", ["full", QLORA], ids=["full", "qlora"])
def test_the_host_waits_for_nothing_in_loss_and_update(language_model, states, open_tiny):
    """The model's own forward may look at its masks; from the hidden states on, nothing is read back."""
    device = pick_device()
    tiny = open_tiny("llama", (0, 0, 0, 0), "bfloat16")
    tiny.model.to(device)
    plan, config = tiny.plan({"language_model": language_model}, optimizer_states=states)
    optimizer = Optimizer(tiny.model, plan, config.train, 5)
    train_step(tiny.model, tiny.split([2, 2]), optimizer, device)
    batch = tiny.split([4], 1).batches[0]
    hidden = tiny.model.base_model(**model_inputs(tiny.model, batch, device)).last_hidden_state
    torch.cuda.set_sync_debug_mode("error")
    try:
        token_loss_sum(hidden, batch.labels, tiny.model.get_output_embeddings()).backward()
        norms = optimizer.step(1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert norms["language_model"] > 0


@pytest.mark.parametrize("is_double", [False, True])
def test_nf4_weights_are_those_of_the_cpu(is_double):
    """Up to ties: a weight that lies between two values may go to either."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(1024, 512)
    on_cpu, on_gpu = (
        dequantized(quantize_linear(linear, is_double, device, torch.float32).weight, torch.float32).cpu()
        for device in ("cpu", "cuda")
    )
    differing = ((on_gpu - on_cpu).abs() > 1e-2 * on_cpu.abs()).float().mean()
    assert differing < 1e-4
