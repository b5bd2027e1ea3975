"""A mixture as real rows: chat messages and pictures in one folder, in the order in which all read them.

In: a model folder and a cell. Out: rows.jsonl for `partwise train` and samples.jsonl for its contenders: the
same messages, with how many tokens and targets each has. Every word is one token, so lengths are exact: each
row is tokenised here, and a row that has another length is an error. samples.jsonl is in the order of the
steps; rows.jsonl is permuted so that Partwise's own shuffling gives that order.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer

from benchmarks.speed.cells import Cell
from benchmarks.speed.mixtures import SEED, Lengths, draw_rows
from partwise.data.loader import epoch_order

NUM_PICTURES = 64
WORDS = " the picture is red circle a two of blue"  # each of these, with the space before it, is one token


def write_rows(cell: Cell, base: Path, folder: Path, num_rows: int) -> list[Lengths]:
    """rows.jsonl, samples.jsonl and pictures in `folder`; the lengths, in the order of the steps."""
    lengths = draw_rows(cell.mixture, num_rows)
    writer = RowWriter(base, cell)
    samples = [writer.sample(row) for row in lengths]
    folder.mkdir(parents=True)
    if any(row.num_images for row in lengths):
        write_pictures(folder, cell.model.sizes["image_size"])
    write_lines(folder / "samples.jsonl", samples)
    shuffled = [json.dumps({key: sample[key] for key in ("messages", "images")}) for sample in samples]
    rows = np.empty(num_rows, dtype=object)
    rows[epoch_order(num_rows, SEED, 0)] = shuffled
    (folder / "rows.jsonl").write_text("".join(f"{row}\n" for row in rows))
    return lengths


class RowWriter:
    """Turns lengths into messages that have exactly these lengths in the tokens of the model in `base`."""

    def __init__(self, base: Path, cell: Cell) -> None:
        self.cell = cell
        opens = AutoProcessor if cell.model.sees_images else AutoTokenizer
        self.processor: Any = opens.from_pretrained(base)
        self.tokenizer = getattr(self.processor, "tokenizer", self.processor)
        ids = self.tokenizer.encode(WORDS, add_special_tokens=False)
        self.words = [self.tokenizer.decode([i]) for i in ids]
        assert len(self.words) == len(WORDS.split()), self.words
        self.rng = np.random.default_rng([SEED, 1])
        self.next_picture = 0
        probe = self.messages("1", "1", 0)
        self.num_around = self.count(probe, 0) - 2

    def sample(self, row: Lengths) -> dict[str, Any]:
        # The token that ends the turn is a target, too.
        num_answer = row.num_targets - 1
        num_question = row.num_tokens - self.num_around - num_answer - self.image_tokens * row.num_images
        messages = self.messages(self.text(num_question), self.text(num_answer), row.num_images)
        if (found := self.count(messages, row.num_images)) != row.num_tokens:
            raise ValueError(f"a row of {found} tokens was written for {row}")
        images = [self.take_picture() for _ in range(row.num_images)]
        prompt, completion = self.written(messages, row.num_images)
        return {
            "messages": messages,
            "images": images,
            "prompt": prompt,
            "completion": completion,
            "num_tokens": row.num_tokens,
            "num_targets": row.num_targets,
        }

    @property
    def image_tokens(self) -> int:
        """Soft tokens, begin and end, and a blank line before and after."""
        return self.cell.model.sizes.get("mm_tokens", 0) + 6

    def messages(self, question: str, answer: str, num_images: int) -> list[dict[str, str]]:
        return [
            {"role": "user", "content": "<image>" * num_images + question},
            {"role": "assistant", "content": answer},
        ]

    def text(self, num_tokens: int) -> str:
        """So many tokens: a digit, which never merges with what stands before it, and words."""
        if num_tokens < 1:
            raise ValueError(f"a text of {num_tokens} tokens: the row leaves no room for it")
        picked = self.rng.integers(0, len(self.words), size=num_tokens - 1)
        return str(self.rng.integers(0, 10)) + "".join(self.words[i] for i in picked)

    def count(self, messages: list[dict[str, str]], num_images: int) -> int:
        """Tokens of the conversation as the model's own template writes it; pictures by what they become."""
        written = "".join(self.written(messages, 0))
        written = written.replace("<image>" * num_images, "", 1)
        return len(self.tokenizer.encode(written, add_special_tokens=False)) + num_images * self.image_tokens

    def written(self, messages: list[dict[str, str]], num_images: int) -> tuple[str, str]:
        """The question with all that leads to an answer, and the answer to the end of its turn."""
        question, answer = messages
        text = question["content"].removeprefix("<image>" * num_images)
        content = [{"type": "image"}] * num_images + [{"type": "text", "text": text}]
        turns = [{"role": "user", "content": content}, answer]
        prompt = self.processor.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
        return prompt, self.processor.apply_chat_template(turns, tokenize=False).removeprefix(prompt)

    def take_picture(self) -> str:
        self.next_picture += 1
        return picture_name(self.next_picture % NUM_PICTURES)


def picture_name(index: int) -> str:
    return f"{index:02d}.jpg"


def write_pictures(folder: Path, size: int) -> None:
    """Noise over a coarse pattern: about as many bytes as a photograph of this size."""
    rng = np.random.default_rng([SEED, 2])
    for index in range(NUM_PICTURES):
        coarse = rng.integers(0, 256, size=(14, 14, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)
        noise = rng.integers(-20, 21, size=(size, size, 3))
        pixels = np.clip(np.asarray(picture).astype(int) + noise, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / picture_name(index), quality=80)


def write_lines(path: Path, records: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
