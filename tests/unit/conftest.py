"""Configs from a few lines of YAML, tiny models with real weights, and an image batch for each family."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from partwise.config import Config

MakeConfig = Callable[[str], "Config"]
LoadTiny = Callable[..., "PreTrainedModel"]
ImageBatch = Callable[[str], "dict[str, torch.Tensor]"]


@pytest.fixture
def make_config(tmp_path: Path) -> MakeConfig:
    """A config with these lines under `parts`."""
    from partwise.config import load_config

    def make(parts: str) -> Config:
        path = tmp_path / "run.yaml"
        lines = textwrap.indent(textwrap.dedent(parts).strip(), "  ")
        path.write_text(f"model: {{path: m}}\ndata: {{train: a.jsonl}}\noutput: o\nparts:\n{lines}\n")
        return load_config(path)

    return make


@pytest.fixture(scope="session")
def load_tiny(tiny_folder: Callable[[str], Path]) -> LoadTiny:
    """A fresh fp32 model of a family, as transformers loads it."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    def load(family: str) -> PreTrainedModel:
        text_only = family in ("llama", "gemma3-text")
        auto = AutoModelForCausalLM if text_only else AutoModelForImageTextToText
        return auto.from_pretrained(tiny_folder(family), dtype="float32")

    return load


@pytest.fixture(scope="session")
def image_batch(tiny_folder: Callable[[str], Path], make_image: Callable) -> ImageBatch:
    """One conversation with one image, as the family's processor makes it; text only where there is none."""
    from partwise.model.load import load_processor

    batches: dict[str, dict[str, torch.Tensor]] = {}

    def batch(family: str) -> dict[str, torch.Tensor]:
        if family not in batches:
            image = [] if family in ("llama", "gemma3-text") else [{"type": "image", "image": make_image()}]
            question = {"role": "user", "content": [*image, {"type": "text", "text": "which colour?"}]}
            answer = {"role": "assistant", "content": [{"type": "text", "text": "red"}]}
            processor = load_processor(tiny_folder(family))
            batches[family] = dict(
                processor.apply_chat_template(
                    [question, answer], tokenize=True, return_dict=True, return_tensors="pt"
                )
            )
        return dict(batches[family])

    return batch
