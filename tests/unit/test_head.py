"""Which tokens the token loss counts, and the softcap that it takes from the model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

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
