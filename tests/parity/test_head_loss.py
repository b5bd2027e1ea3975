"""The token loss against cross-entropy on full logits: value and gradients, and what is made on the way."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name everyone reads
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from partwise.model import head as head_module
from partwise.model.head import is_plain_linear, token_loss_sum
from partwise.model.quantize import quantize_linear
from partwise.records import IGNORE_INDEX

B, T, D, V = 3, 40, 16, 50
CAP = 2.0


class Case:
    """Hidden states, labels and a head. `tied`: the hidden states come from the head's own weight."""

    def __init__(self, bias=False, softcap=None, frozen=False, fixed_hidden=False, tied=False) -> None:
        generator = torch.Generator().manual_seed(0)
        self.softcap, self.tied = softcap, tied
        self.labels = torch.randint(V, (B, T), generator=generator)
        self.labels[torch.rand(B, T, generator=generator) < 0.4] = IGNORE_INDEX
        self.head = nn.Linear(D, V, bias=bias, dtype=torch.float64)
        for parameter in self.head.parameters():
            nn.init.normal_(parameter, generator=generator)
        self.head.requires_grad_(not frozen)
        self.input = torch.randn(B, T, D, dtype=torch.float64, generator=generator)
        self.input.requires_grad_(not fixed_hidden)

    @property
    def num_targets(self) -> int:
        return int((self.labels[:, 1:] != IGNORE_INDEX).sum())

    @property
    def hidden(self) -> Tensor:
        return self.input + F.embedding(self.labels.clamp(0), self.head.weight) if self.tied else self.input

    def loss(self) -> Tensor:
        return token_loss_sum(self.hidden, self.labels, self.head, self.softcap)

    def reference(self) -> Tensor:
        logits = self.head(self.hidden)[:, :-1]
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        targets = self.labels[:, 1:].flatten()
        return F.cross_entropy(logits.flatten(0, 1), targets, ignore_index=IGNORE_INDEX, reduction="sum")

    def gradients(self, loss: Tensor) -> list[Tensor]:
        """Those of a share of the loss, as a step takes it."""
        tensors = [tensor for tensor in (self.input, *self.head.parameters()) if tensor.requires_grad]
        return list(torch.autograd.grad(loss / 7, tensors))

    def to(self, dtype: torch.dtype) -> Case:
        self.head.to(dtype)
        self.input = self.input.detach().to(dtype).requires_grad_(self.input.requires_grad)
        return self


CASES = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": CAP},
    "bias and softcap": {"bias": True, "softcap": CAP},
    "frozen head": {"bias": True, "frozen": True},
    "head alone": {"bias": True, "fixed_hidden": True},
    "tied": {"tied": True, "softcap": CAP},
}


@pytest.mark.parametrize("chunk_rows", [1, 7, 1024])
@pytest.mark.parametrize("name", CASES)
def test_equals_cross_entropy_on_full_logits(name, chunk_rows, monkeypatch):
    monkeypatch.setattr(head_module, "CHUNK_ROWS", chunk_rows)
    case = Case(**CASES[name])
    ours, reference = case.loss(), case.reference()
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours, reference, rtol=1e-14, atol=0)
    for mine, theirs in zip(case.gradients(ours), case.gradients(reference), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-13)


class Wrapped(nn.Module):
    """A head that is no linear layer."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: Tensor) -> Tensor:
        return self.inner(hidden)


@pytest.mark.parametrize("name", CASES)
def test_a_head_that_is_called_as_a_module_gives_the_same(name, monkeypatch):
    monkeypatch.setattr(head_module, "MODULE_CHUNK_ROWS", 7)
    case = Case(**CASES[name])
    module_loss = token_loss_sum(case.hidden, case.labels, Wrapped(case.head), case.softcap)
    torch.testing.assert_close(module_loss, case.reference(), rtol=1e-14, atol=0)
    for mine, theirs in zip(case.gradients(module_loss), case.gradients(case.reference()), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-13)


def test_only_a_plain_linear_layer_is_not_called():
    head = nn.Linear(64, V, bias=False)
    assert is_plain_linear(head)
    assert not is_plain_linear(quantize_linear(head, True, "cpu", torch.float32))
    model = inject_adapter_in_model(LoraConfig(target_modules=["head"]), nn.ModuleDict({"head": head}))
    assert not is_plain_linear(model["head"])
    for register in (head.register_forward_hook, head.register_forward_pre_hook):
        hook = register(lambda *args: None)
        assert not is_plain_linear(head)
        hook.remove()
    assert is_plain_linear(head)


def test_an_adapter_on_the_head_trains_with_it():
    case = Case(frozen=True)
    config = LoraConfig(target_modules=["head"], r=2, init_lora_weights=False)
    head = inject_adapter_in_model(config, nn.ModuleDict({"head": case.head}))["head"].double()
    adapter = [parameter for name, parameter in head.named_parameters() if "lora_" in name]
    ours = torch.autograd.grad(token_loss_sum(case.hidden, case.labels, head), [case.input, *adapter])
    case.head = head
    for mine, theirs in zip(ours, torch.autograd.grad(case.reference(), [case.input, *adapter]), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", CASES)
def test_no_target_token_gives_zero_loss_and_zero_gradients(name):
    case = Case(**CASES[name])
    case.labels[:, 1:] = IGNORE_INDEX
    loss = case.loss()
    assert loss.item() == 0
    assert not any(gradient.any() for gradient in case.gradients(loss))


@pytest.mark.parametrize("name", CASES)
def test_16_bit_losses_and_gradients_are_nearer_to_the_exact_ones_than_a_modules(name, monkeypatch):
    monkeypatch.setattr(head_module, "CHUNK_ROWS", 7)
    monkeypatch.setattr(head_module, "MODULE_CHUNK_ROWS", 7)
    case = Case(**CASES[name]).to(torch.bfloat16)
    exact = Case(**CASES[name])
    exact.head.load_state_dict({name: tensor.double() for name, tensor in case.head.state_dict().items()})
    exact.input = case.input.detach().double().requires_grad_(case.input.requires_grad)
    loss, reference = case.loss(), exact.reference()
    module_loss = token_loss_sum(case.hidden, case.labels, Wrapped(case.head), case.softcap)
    assert loss.dtype == torch.float32
    if not case.tied:  # whose hidden states are rounded
        torch.testing.assert_close(loss.double(), reference, rtol=1e-6, atol=0)
    assert (loss - reference).abs() <= (module_loss - reference).abs()
    wanted = exact.gradients(reference)
    ours, theirs = case.gradients(loss), case.gradients(module_loss)
    for mine, others, right in zip(ours, theirs, wanted, strict=True):
        assert mine.dtype == torch.bfloat16
        assert mine.double().dist(right) <= others.double().dist(right)
        assert mine.double().dist(right) < 1e-2 * right.norm()


def test_a_token_that_is_all_but_sure_has_an_exact_gradient():
    """The probability less one, which 16 bits would round to 0."""
    hidden = torch.ones(1, 2, 1, dtype=torch.bfloat16, requires_grad=True)
    head = nn.Linear(1, 2, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    head.weight.copy_(torch.tensor([[9.0], [0.0]]))
    token_loss_sum(hidden, torch.tensor([[0, 0]]), head).backward()
    probability = torch.tensor(9.0, dtype=torch.float64).neg().sigmoid()
    torch.testing.assert_close(hidden.grad[0, 0, 0].double(), -9 * probability, rtol=1e-2, atol=0)


class Watch(TorchDispatchMode):
    """Notes what each operation gives that is new memory: its shape; and how many products there are."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []
        self.num_products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        results = func(*args, **(kwargs or {}))
        self.num_products += "mm" in func.__name__
        for tensor in tree_leaves(results):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in known:
                self.shapes.append(tuple(tensor.shape))
        return results


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("is_module", [False, True])
def test_no_more_than_a_chunk_of_logits_exists_at_a_time(name, is_module, monkeypatch):
    monkeypatch.setattr(head_module, "CHUNK_ROWS", 8)
    monkeypatch.setattr(head_module, "MODULE_CHUNK_ROWS", 8)
    case = Case(**CASES[name])
    with Watch() as watch:
        if is_module:
            token_loss_sum(case.hidden, case.labels, Wrapped(case.head), case.softcap).backward()
        else:
            case.loss().backward()
    rows = {shape[0] for shape in watch.shapes if len(shape) == 2 and shape[1] == V}
    assert rows and max(rows) == 8 < case.num_targets
    assert all(torch.Size(shape).numel() <= max(B * T * D, V * D, 8 * V) for shape in watch.shapes)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_logits_lie_in_one_room(dtype, monkeypatch):
    monkeypatch.setattr(head_module, "CHUNK_ROWS", 8)
    case = Case().to(dtype)
    with Watch() as watch:
        case.loss().backward()
    assert watch.shapes.count((8, V)) == 1
    # The sum over chunks; in 16 bits the weight in fp32, without CUDA, and the gradient as it is returned.
    assert watch.shapes.count((V, D)) == (1 if dtype == torch.float64 else 3)


@pytest.mark.parametrize("name", ["frozen head", "bias", "head alone"])
def test_only_gradients_that_are_needed_are_computed(name, monkeypatch):
    monkeypatch.setattr(head_module, "CHUNK_ROWS", 8)
    case = Case(**CASES[name])
    num_chunks = -(-case.num_targets // 8)
    with Watch() as watch:
        loss = case.loss()
        forward = watch.num_products
        loss.backward()
    assert forward == watch.num_products == num_chunks * {"bias": 3}.get(name, 2)
    assert ((V, D) in watch.shapes) == (name != "frozen head")
    with torch.no_grad(), Watch() as watch:
        assert torch.equal(case.loss(), loss)
    assert watch.num_products == num_chunks and (V, D) not in watch.shapes
    case.head.requires_grad_(False)
    with Watch() as watch:
        value = token_loss_sum(case.input.detach(), case.labels, case.head)
    assert watch.num_products == num_chunks and not value.requires_grad


def test_a_second_backward_pass_is_refused():
    """Gradients are scaled in place: another pass would scale them once more."""
    case = Case()
    loss = case.loss()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(case.loss(), case.input, scale, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
