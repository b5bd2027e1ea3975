"""Prompts and answers -> a padded batch as plain transformers takes it, with targets on the answers alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

IGNORE_INDEX = -100


def plain_batch(
    processor: Any, prompts: Sequence[str], answers: Sequence[str], images: Sequence[Sequence[Image.Image]]
) -> dict[str, Tensor]:
    """By one call of the model's own processor, which must pad on the right."""
    texts = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    settings = {"padding": True, "add_special_tokens": False, "return_tensors": "pt"}
    batch = dict(processor(text=texts, images=images, **settings))
    labels = torch.full_like(batch["input_ids"], IGNORE_INDEX)
    for row, answer in enumerate(answers):
        end = int(batch["attention_mask"][row].sum())
        start = end - len(processor.tokenizer.encode(answer, add_special_tokens=False))
        labels[row, start:end] = batch["input_ids"][row, start:end]
    return {**batch, "labels": labels}
