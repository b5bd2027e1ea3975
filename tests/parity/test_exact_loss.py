"""One step's loss and gradients: the same for any split, and what plain transformers gives."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F  # noqa: N812 - the name everyone reads

from partwise.records import IGNORE_INDEX
from partwise.training.step import batch_loss_sum

FAMILIES = ("gemma3", "llava", "llava-next", "qwen2-vl", "qwen2.5-vl")
ROWS = {"text": (0,) * 8, "image": (1,) * 8, "mixed": (0, 1, 2, 0, 1, 0, 0, 1)}
SPLITS = ([8], [1] * 8, [3, 5], [2, 2, 2, 2])
CPU = torch.device("cpu")


def step_loss(model, step_data) -> torch.Tensor:
    """The mean over the step's target tokens, with its gradients on the parameters."""
    num_target_tokens = sum(batch.num_target_tokens for batch in step_data.batches)
    total = torch.zeros((), dtype=torch.float64)
    for batch in step_data.batches:
        loss = batch_loss_sum(model, batch, CPU) / num_target_tokens
        loss.backward()
        total += loss.detach()
    return total


def reference_loss(tiny) -> torch.Tensor:
    """Plain transformers: each row alone, unpadded, its logits, and the sum over all rows / their targets."""
    losses, count = [], 0
    for messages, example in zip(tiny.messages, tiny.examples, strict=True):
        inputs = encode_row(tiny.loaded.processor, messages, tiny.model.dtype)
        assert torch.equal(inputs["input_ids"][0], example.input_ids)
        logits = tiny.model(**inputs, use_cache=False).logits[0, :-1]
        targets = example.labels[1:]
        losses.append(F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum"))
        count += int((targets != IGNORE_INDEX).sum())
    loss = torch.stack(losses).sum() / count
    loss.backward()
    return loss.detach()


def encode_row(processor, messages, dtype) -> dict[str, torch.Tensor]:
    inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("family", FAMILIES)
def test_any_split_equals_plain_transformers(family, rows, open_tiny, take_gradients):
    tiny = open_tiny(family, ROWS[rows])
    tiny.model.double()
    expected = reference_loss(tiny)
    expected_gradients = take_gradients(tiny.model)
    assert len(expected_gradients) > 10
    scale = max(gradient.abs().max() for gradient in expected_gradients.values())
    for sizes in SPLITS:
        loss = step_loss(tiny.model, tiny.split(sizes))
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0, msg=f"loss of {sizes}")
        gradients = take_gradients(tiny.model)
        assert gradients.keys() == expected_gradients.keys()
        for name, gradient in gradients.items():
            error = (gradient - expected_gradients[name]).abs().max() / scale
            assert error < 1e-6, f"{name} in {sizes}: {error}"


def test_the_mean_of_micro_batch_means_is_another_loss(open_tiny):
    """The rows are unlike enough that averaging per micro-batch would be seen."""
    tiny = open_tiny("llama", ROWS["text"])
    step_data = tiny.split([3, 5])
    exact = step_loss(tiny.model, step_data)
    means = [batch_loss_sum(tiny.model, b, CPU).item() / b.num_target_tokens for b in step_data.batches]
    assert abs(sum(means) / 2 - exact.item()) > 1e-3
