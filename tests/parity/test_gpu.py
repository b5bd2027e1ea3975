"""On a GPU: the same losses as on the CPU, and an update that the host does not wait for."""

from __future__ import annotations

import pytest
import torch

from partwise.engine.device import peak_memory_bytes, pick_device
from partwise.engine.fsdp import Fsdp
from partwise.engine.join import connected_alone
from partwise.model import head as head_module
from partwise.model.head import token_loss_sum
from partwise.model.quantize import dequantized, quantize_linear
from partwise.training.optim import Optimizer
from partwise.training.proof import Proof
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


@pytest.mark.parametrize("vocab_size", [300, 70_000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_head_multiplies_16_bits_into_fp32(dtype, vocab_size, monkeypatch):
    """Over several chunks, and with logits whose softmax is written over them."""
    monkeypatch.setattr(head_module, "CHUNK_ROWS", 64)
    torch.manual_seed(0)
    head = torch.nn.Linear(96, vocab_size, dtype=dtype, device="cuda")
    torch.nn.init.normal_(head.weight)
    hidden = torch.randn(1, 201, 96, device="cuda").to(dtype).requires_grad_()
    labels = torch.randint(vocab_size, (1, 201))
    inputs = [hidden, head.weight, head.bias]
    exact_inputs = [tensor.detach().double().requires_grad_() for tensor in inputs]
    logits = torch.nn.functional.linear(*exact_inputs)[0, :-1]
    exact = torch.nn.functional.cross_entropy(logits, labels[0, 1:].cuda(), reduction="sum")
    called = token_loss_sum(hidden, labels, torch.nn.Sequential(head))
    loss = token_loss_sum(hidden, labels, head)
    assert loss.item() == pytest.approx(exact.item(), rel=1e-6)
    assert abs(loss.item() - exact.item()) <= max(abs(called.item() - exact.item()), 1e-6 * exact.item())
    grads = [
        torch.autograd.grad(value / 200, tensors)
        for value, tensors in ((loss, inputs), (called, inputs), (exact, exact_inputs))
    ]
    for mine, theirs, right in zip(*grads, strict=True):
        assert mine.dtype == dtype
        error = mine.double().dist(right)
        assert error <= max(theirs.double().dist(right), 1e-5 * right.norm())


@pytest.mark.parametrize("family", ["gemma3", "llava-next"])
def test_pinned_bytes_become_the_processors_pixels(family, open_tiny):
    """As they do on the CPU, without the host waiting for the copy."""
    tiny = open_tiny(family, (1, 0, 2, 1))
    batch = tiny.split([4]).batches[0].pin_memory()
    assert batch.input_ids.is_pinned() and batch.media["pixel_values"].is_pinned()
    expected = model_inputs(tiny.model, batch, torch.device("cpu"), torch.bfloat16)
    model_inputs(tiny.model, batch, pick_device(), torch.bfloat16)  # the table is copied once
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = model_inputs(tiny.model, batch, pick_device(), torch.bfloat16)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert found.keys() == expected.keys() and found["pixel_values"].dtype == torch.bfloat16
    for name, tensor in expected.items():
        assert not isinstance(tensor, torch.Tensor) or torch.equal(found[name].cpu(), tensor), name


def train_in_shards(tiny, parts, device: torch.device, offload: bool, **settings: str):
    """Losses, norms and what is observed of three steps; the optimizer, and a proof of them; the weights."""
    plan, config = tiny.plan(parts, **settings)
    engine = Fsdp(offload=offload)
    with connected_alone():
        engine.spread(tiny.model, plan, tiny.model.dtype, device)
        optimizer = Optimizer(tiny.model, plan, config.train, 3, engine)
        proof = Proof(tiny.model, plan, optimizer)
        outcomes = [
            train_step(tiny.model, tiny.split([2, 2], step), optimizer, device, observe=True)
            for step in range(3)
        ]
        numbers = [[value.loss, value.grad_norm] for value in read_outcomes(outcomes)]
        observed = [outcome.observed.values.flatten().tolist() for outcome in outcomes]
        finding = proof.check(3)
        weights = {name: engine.whole(parameter) for name, parameter in optimizer.parameters.items()}
    return numbers, observed, optimizer, finding, weights


@pytest.mark.parametrize("states", ["float32", "8bit"])
@pytest.mark.parametrize("parts", [{"language_model": "full"}, {"projector": "full"}], ids=list)
def test_an_optimizer_on_the_host_does_the_same(parts, states, open_tiny):
    """Also beside a frozen vision side, which stays on the GPU."""
    device = pick_device()
    (numbers, observed, optimizer, finding, weights), expected = (
        train_in_shards(open_tiny("gemma3", (1, 0, 2, 1)), parts, device, offload, optimizer_states=states)
        for offload in (True, False)
    )
    lie_on = {m.device.type for m in optimizer.masters.values()}
    lie_on |= {tensor.device.type for tensor in optimizer.state_dict().values()}
    assert lie_on == {optimizer.stopped.device.type} == {"cpu"}
    assert expected[2].stopped.device.type == "cuda"
    tolerance = 1e-3 if states == "float32" else 5e-3
    for found, wanted in zip(numbers + observed, expected[0] + expected[1], strict=True):
        assert found == pytest.approx(wanted, rel=tolerance, abs=1e-9)
    assert finding.message == expected[3].message
    for name, weight in weights.items():
        wanted = expected[4][name]
        assert weight.dist(wanted) < 10 * tolerance * wanted.norm(), name


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
