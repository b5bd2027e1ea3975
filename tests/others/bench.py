"""What the cases share: tiny models as folders and as plain transformers models, rows, and what was said.

In: an empty folder. Out: a Bench, and the Row that each case returns. Models and processors come from
transformers' own loaders; Partwise's are made by the cases themselves.
"""

from __future__ import annotations

import logging
import textwrap
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from partwise.config import Config, load_config
from partwise.data.chat import ChatFormat
from partwise.data.rows import read_conversation
from partwise.errors import UserError
from partwise.model.load import load_model_config, load_processor, media_token_ids
from partwise.records import Dropped, Example
from partwise.tiny import write_tiny


@dataclass(frozen=True)
class Row:
    """A line of the comparison. `message` is what Partwise says word for word, where it stops."""

    situation: str
    plain: str
    partwise: str
    message: str = ""


class Bench:
    """A folder with tiny models, each written once and not to be changed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def base(self, family: str = "gemma3", seed: int = 0) -> Path:
        folder = self.folder / f"{family}-{seed}"
        return folder if folder.is_dir() else write_tiny(family, folder, seed=seed)

    def processor(self, family: str = "gemma3") -> Any:
        return AutoProcessor.from_pretrained(self.base(family))

    def load(self, family: str = "gemma3", dtype: str = "float32") -> Any:
        """A fresh plain model in eval mode."""
        auto = AutoModelForCausalLM if family == "llama" else AutoModelForImageTextToText
        return auto.from_pretrained(self.base(family), dtype=dtype)

    def inputs(self, family: str = "gemma3", colors: tuple[str, ...] = ("red",)) -> dict[str, torch.Tensor]:
        """One row with images as the plain processor makes it; its labels are all of its tokens."""
        inputs = self.processor(family).apply_chat_template(
            messages(colors), tokenize=True, return_dict=True, return_tensors="pt"
        )
        return {**inputs, "labels": inputs["input_ids"]}

    def config(self, text: str, family: str = "gemma3", train: str = "") -> Config:
        """A config file with these lines under the model's."""
        head = f"model: {{path: {self.base(family)}, dtype: float32}}\ndata: {{train: train.jsonl}}\n"
        file = self.folder / "config.yaml"
        file.write_text(f"{head}output: {self.folder / 'run'}\n{textwrap.dedent(text).strip()}\n{train}")
        return load_config(file)

    def example(
        self, row: dict[str, Any], family: str = "gemma3", max_seq_len: int = 512
    ) -> Example | Dropped:
        """What Partwise makes of a row of a data file."""
        folder = self.base(family)
        processor = load_processor(folder)
        media = media_token_ids(load_model_config(folder), processor)
        return ChatFormat(processor, media, max_seq_len, "truncate")(read_conversation(row, "train.jsonl", 6))

    def refusal(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> str:
        """What Partwise says instead of doing this; paths are told from the bench's folder."""
        try:
            function(*arguments, **options)
        except UserError as error:
            return str(error).replace(f"{self.folder}/", "")
        raise AssertionError(f"{function} refused nothing")


def picture(color: str) -> Image.Image:
    return Image.new("RGB", (56, 56), color)


def messages(colors: tuple[str, ...] = ("red",), answer: str = "red") -> list[dict[str, Any]]:
    """A question about images and its answer, as chat templates take them."""
    images = [{"type": "image", "image": picture(color)} for color in colors]
    question = [*images, {"type": "text", "text": "Which color is this?"}]
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]


def failure(function: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    """The error that a library raises here, as "ValueError: text"."""
    try:
        function(*arguments, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError(f"{function} raised nothing")


@contextmanager
def listening() -> Iterator[list[str]]:
    """Everything that Python's warnings, transformers and PEFT say in the block."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    loggers = [logging.getLogger(name) for name in ("transformers", "peft")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield said
        # What is deprecated says nothing about the run.
        said += [
            str(w.message) for w in caught if not issubclass(w.category, FutureWarning | DeprecationWarning)
        ]
    finally:
        for logger in loggers:
            logger.removeHandler(handler)


def trained_names(model: torch.nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def update(model: Any, optimizer: torch.optim.Optimizer, inputs: dict[str, torch.Tensor]) -> float:
    """One step on the model's own loss, which is returned."""
    loss = model(**inputs, use_cache=False).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


@torch.no_grad()
def loss_of(model: Any, inputs: dict[str, torch.Tensor]) -> float:
    return model.eval()(**inputs).loss.item()
