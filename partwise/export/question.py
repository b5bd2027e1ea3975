"""A made-up question about a made-up picture, as a model's inputs: what exported folders are compared on.

It needs none of a run's data, so that a folder can be exported anywhere.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image as PILImage
from torch import Tensor

from partwise.data.chat import prompt_inputs
from partwise.data.template import tokenizer_of
from partwise.lineage.reload import logits_of
from partwise.lineage.verify import InputSide, Probe
from partwise.records import Conversation, Image, Message, Text

QUESTION = "What is in the upper left corner, and how many of them are there?"
NUM_LOGITS = 16


def question_probe(processor: Any, num_weights: int, device: str, trust_remote_code: bool) -> Probe:
    """The question without a picture, and with one where the model takes any; fp32, no logits yet."""
    contents: list[tuple[Text | Image, ...]] = [(Text(QUESTION),)]
    if hasattr(processor, "image_processor") and processor.chat_template:
        contents.append((Image(make_picture(), "a made-up picture"), Text(QUESTION)))
    return Probe(
        rows=tuple(question_inputs(processor, content) for content in contents),
        logits=(),
        num_logits=NUM_LOGITS,
        input_side=InputSide.of(processor),
        dtype="float32",
        device=device,
        num_weights=num_weights,
        trust_remote_code=trust_remote_code,
    )


def question_inputs(processor: Any, contents: tuple[Text | Image, ...]) -> dict[str, Tensor]:
    if not processor.chat_template:
        inputs = tokenizer_of(processor)([QUESTION], return_tensors="pt")
        return {name: inputs[name] for name in ("input_ids", "attention_mask")}
    conversation = Conversation((Message("user", contents),), source="a made-up question", row=0)
    made = prompt_inputs(processor, conversation)
    return {name: value for name, value in made.items() if isinstance(value, Tensor)}


def answer_logits(model: Any, probe: Probe) -> tuple[Tensor, ...]:
    """The model's logits for the probe's rows, in eval mode."""
    num_logits = torch.tensor(probe.num_logits)
    return tuple(logits_of(model.eval(), {**row, "num_logits": num_logits}) for row in probe.rows)


def make_picture() -> PILImage.Image:
    """96 by 64 pixels of noise over a slope: no two patches are alike."""
    noise = np.random.default_rng(0).integers(0, 128, size=(64, 96, 3))
    slope = np.linspace(0, 127, 96)[None, :, None]
    return PILImage.fromarray((noise + slope).astype(np.uint8))
