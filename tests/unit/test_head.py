"""The token loss against cross-entropy on full logits: value, gradients, memory of chunks, softcap."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from partwise.model import head as head_module
from partwise.model.head import logit_softcap, token_loss_sum
from partwise.records import IGNORE_INDEX

B, T, D, V = 3, 40, 16, 50


@pytest.fixture
def case() -> tuple[torch.Tensor, torch.Tensor, nn.Linear]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(B, T, D, dtype=torch.float64, generator=generator).requires_grad_()
    labels = torch.randint(V, (B, T), generator=generator)
    labels[torch.rand(B, T, generator=generator) < 0.4] = IGNORE_INDEX
    head = nn.Linear(D, V, bias=False, dtype=torch.float64)
    nn.init.normal_(head.weight, generator=generator)
    return hidden, labels, head


def full_loss_sum(hidden: torch.Tensor, labels: torch.Tensor, head: nn.Module) -> torch.Tensor:
    logits = head(hidden)[:, :-1]
    return nn.functional.cross_entropy(
        logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
    )


@pytest.mark.parametrize("chunk_rows", [1, 7, 1024])
def test_equals_cross_entropy_on_full_logits(case, chunk_rows, monkeypatch):
    monkeypatch.setattr(head_module, "CHUNK_ROWS", chunk_rows)
    hidden, labels, head = case
    ours, reference = token_loss_sum(hidden, labels, head), full_loss_sum(hidden, labels, head)
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours, reference, rtol=1e-14, atol=0)

    inputs = (hidden, head.weight)
    for mine, theirs in zip(
        torch.autograd.grad(ours, inputs), torch.autograd.grad(reference, inputs), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-13)


def test_hidden_t_predicts_label_t_plus_one(case):
    hidden, _, head = case
    labels = torch.full((1, 4), IGNORE_INDEX)
    labels[0, 2:] = torch.tensor([7, 2])
    log_probs = head(hidden[:1, :4]).log_softmax(-1)
    expected = -(log_probs[0, 1, 7] + log_probs[0, 2, 2])
    torch.testing.assert_close(token_loss_sum(hidden[:1, :4], labels, head), expected)


def test_first_label_never_counts(case):
    hidden, labels, head = case
    changed = labels.clone()
    changed[:, 0] = 3
    assert torch.equal(token_loss_sum(hidden, labels, head), token_loss_sum(hidden, changed, head))


def test_16_bit_logits_are_summed_in_fp32(case):
    hidden, labels, head = case
    loss = token_loss_sum(hidden.bfloat16(), labels, head.bfloat16())
    assert loss.dtype == torch.float32
    logits = head(hidden.bfloat16())[:, :-1].double()
    reference = nn.functional.cross_entropy(
        logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
    )
    torch.testing.assert_close(loss.double(), reference, rtol=1e-6, atol=0)


def test_no_target_token_gives_zero_loss_and_zero_gradients(case):
    hidden, labels, head = case
    loss = token_loss_sum(hidden, torch.full_like(labels, IGNORE_INDEX), head)
    loss.backward()
    assert loss.item() == 0
    assert not hidden.grad.any() and not head.weight.grad.any()


def test_only_a_chunk_of_logits_exists_at_a_time(case, monkeypatch):
    """The head sees labelled rows only, a chunk at a time, and once more in the backward pass."""
    monkeypatch.setattr(head_module, "CHUNK_ROWS", 8)
    hidden, labels, head = case
    seen: list[int] = []
    head.register_forward_hook(lambda module, args, logits: seen.append(len(logits)))
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape[-1]) or t, lambda t: t):
        loss = token_loss_sum(hidden, labels, head)
    assert V not in saved
    num_targets = int((labels[:, 1:] != IGNORE_INDEX).sum())
    assert sum(seen) == num_targets and max(seen) == 8
    loss.backward()
    assert sum(seen) == 2 * num_targets


def test_softcap_squashes_the_logits(case):
    hidden, labels, head = case
    capped = nn.Sequential(head, Softcap(5.0))
    torch.testing.assert_close(
        token_loss_sum(hidden, labels, head, softcap=5.0), full_loss_sum(hidden, labels, capped)
    )


class Softcap(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        return self.value * torch.tanh(logits / self.value)


def test_softcap_is_read_where_the_models_own_forward_applies_it(tiny_folder):
    """Held against the models: the text model squashes its logits, the image-and-text one does not."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    ids = torch.tensor([[2, 20, 30, 40, 50, 60]])
    for family, auto, expected in (
        ("gemma3-text", AutoModelForCausalLM, 0.5),
        ("gemma3", AutoModelForImageTextToText, None),
    ):
        model = auto.from_pretrained(tiny_folder(family), dtype=torch.float64).eval()
        model.config.get_text_config().final_logit_softcapping = 0.5
        assert logit_softcap(model) == expected
        with torch.no_grad():
            hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
            ours = token_loss_sum(hidden, ids, model.get_output_embeddings(), logit_softcap(model))
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        torch.testing.assert_close(
            ours, nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"), rtol=1e-6, atol=0
        )
