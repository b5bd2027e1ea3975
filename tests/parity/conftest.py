"""Tiny models with real rows for the numerics: text, one image, several images, of unlike lengths."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from partwise.config import Config, ModelConfig
from partwise.data.chat import ChatFormat
from partwise.data.collate import collate
from partwise.model.load import LoadedModel, load_model, media_token_ids
from partwise.model.parts import apply_plan, resolve_plan
from partwise.model.quantize import quantize_parts
from partwise.records import Conversation, Example, Image, Message, PartsPlan, StepData, Text

QUESTIONS = ("What is this?", "Name the colour, please.", "And here?", "Which digit do you see in it?")
ANSWERS = ("7", "a red disc", "It is the number 3, as far as one can see.", "blue")


@dataclass(frozen=True)
class Tiny:
    """A tiny model and rows for it. `messages` are the rows as transformers takes them."""

    loaded: LoadedModel
    conversations: list[Conversation]
    chat_format: ChatFormat
    messages: list[list[dict[str, Any]]]
    examples: list[Example]

    @property
    def model(self) -> Any:
        return self.loaded.model

    def split(self, sizes: Sequence[int], step: int = 0) -> StepData:
        """All rows in order as micro-batches of these sizes."""
        assert sum(sizes) == len(self.examples)
        rows, batches = iter(self.examples), []
        for size in sizes:
            batches.append(collate([next(rows) for _ in range(size)], pad_token_id=0))
        return StepData(step, tuple(batches))

    def config(self, parts: dict[str, Any], **train: Any) -> Config:
        return make_config(self.loaded.path, parts, **train)

    def plan(self, parts: dict[str, Any], **train: Any) -> tuple[PartsPlan, Config]:
        """The plan, applied to the model, and its config."""
        config = self.config(parts, **train)
        plan = resolve_plan(self.model, config)
        quantize_parts(self.model, plan, self.model.device)
        apply_plan(self.model, plan)
        return plan, config


def make_config(path: str | Path, parts: dict[str, Any], **train: Any) -> Config:
    return Config.model_validate(
        {
            "model": {"path": str(path)},
            "parts": parts,
            "data": {"train": "rows.jsonl"},
            "train": {"learning_rate": 1e-3, **train},
            "output": "run",
        }
    )


def make_rows(num_images: Sequence[int], make_image: Callable) -> tuple[list[Conversation], list[list[dict]]]:
    """One row per entry, with so many images in its question: as Conversations and as plain messages."""
    conversations, plain = [], []
    for row, count in enumerate(num_images):
        colors = ["red", "green", "blue", "black"]
        images = [make_image((56 + 28 * (row % 2), 56), colors[(row + i) % 4]) for i in range(count)]
        question, answer = QUESTIONS[row % 4] * (1 + row % 3), ANSWERS[(row + row // 4) % 4]
        user = (*(Image(image, f"image {i}") for i, image in enumerate(images)), Text(question))
        messages = (Message("user", user), Message("assistant", (Text(answer),)))
        conversations.append(Conversation(messages, "rows.jsonl", row))
        plain.append(
            [
                {
                    "role": "user",
                    "content": [
                        *({"type": "image", "image": image} for image in images),
                        {"type": "text", "text": question},
                    ],
                },
                {"role": "assistant", "content": [{"type": "text", "text": answer}]},
            ]
        )
    return conversations, plain


@pytest.fixture(scope="session")
def open_tiny(tiny_folder: Callable[[str], Path], make_image: Callable) -> Callable[..., Tiny]:
    """A fresh tiny model of a family with rows of so many images each."""

    def open_family(family: str, num_images: Sequence[int] = (1,) * 8, dtype: str = "float32") -> Tiny:
        loaded = load_model(ModelConfig(path=str(tiny_folder(family)), dtype=dtype))
        conversations, messages = make_rows(num_images, make_image)
        chat_format = ChatFormat(
            loaded.processor, media_token_ids(loaded.model.config, loaded.processor), 512, "error"
        )
        examples = [chat_format(conversation) for conversation in conversations]
        return Tiny(loaded, conversations, chat_format, messages, examples)

    return open_family


def gradients_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Gradients by name, taken away from the model."""
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return gradients


@pytest.fixture(scope="session")
def take_gradients() -> Callable[[torch.nn.Module], dict[str, torch.Tensor]]:
    return gradients_of
