"""Seeded lengths of rows: how many tokens, target tokens and images each has.

The mixtures are those of real fine-tuning sets in shape: a few long rows among many short ones. Of text alone
every answer token is a target and questions are one word; beside images half of the text is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import log

import numpy as np

SEED = 0
# An image and the white space around it in a Gemma-3 prompt: 256 soft tokens, begin and end, line breaks.
IMAGE_TOKENS = 264
TINY_IMAGE_TOKENS = 24


@dataclass(frozen=True)
class Lengths:
    """One row. Images count within `num_tokens`; targets are of its text."""

    num_tokens: int
    num_targets: int
    num_images: int = 0


@dataclass(frozen=True)
class Mixture:
    title: str
    draw: Callable[[np.random.Generator], Lengths]


def draw_rows(name: str, num_rows: int) -> list[Lengths]:
    """The first rows of a mixture; the same on every machine."""
    rng = np.random.default_rng([SEED, list(MIXTURES).index(name)])
    return [MIXTURES[name].draw(rng) for _ in range(num_rows)]


def lognormal(rng: np.random.Generator, median: float, sigma: float, low: int, high: int) -> int:
    return int(np.clip(round(rng.lognormal(log(median), sigma)), low, high))


def answer(num_tokens: int, num_prompt: int = 14) -> Lengths:
    """Text that is nearly all answer; `num_prompt` are what the chat template writes and a short question."""
    return Lengths(num_tokens, num_targets=num_tokens - num_prompt)


def beside_images(num_text: int, num_images: int, image_tokens: int = IMAGE_TOKENS) -> Lengths:
    return Lengths(num_text + image_tokens * num_images, num_targets=num_text // 2, num_images=num_images)


def text(rng: np.random.Generator) -> Lengths:
    return answer(lognormal(rng, 420, 0.85, 32, 2048))


def questions(rng: np.random.Generator) -> Lengths:
    num_images = 1 + int(rng.random() < 0.2)
    return beside_images(lognormal(rng, 120, 0.8, 24, 1500), num_images)


def mixed(rng: np.random.Generator) -> Lengths:
    num_images = int(rng.choice((0, 1, 1, 2, 4)))
    return beside_images(lognormal(rng, 900, 1.0, 32, 8192 - 4 * IMAGE_TOKENS), num_images)


def captions(rng: np.random.Generator) -> Lengths:
    num_text = lognormal(rng, 40, 0.25, 24, 100)
    return Lengths(IMAGE_TOKENS + num_text, num_targets=num_text - 14, num_images=1)


def tiny(rng: np.random.Generator) -> Lengths:
    return beside_images(lognormal(rng, 50, 0.5, 24, 150), int(rng.integers(1, 3)), TINY_IMAGE_TOKENS)


MIXTURES = {
    "text": Mixture("chats of 32 to 2,048 tokens, median 420", text),
    "8k": Mixture("documents of 8,192 tokens", lambda rng: answer(8192)),
    "questions": Mixture("questions about one image, or two (20 %), with some 120 tokens of text", questions),
    "mixed": Mixture("no to four images with up to 8k tokens of text", mixed),
    "32k": Mixture(
        "one document of 32,768 tokens with 8 images", lambda rng: beside_images(32768 - 8 * 264, 8)
    ),
    "captions": Mixture("captions of some 40 tokens for one image", captions),
    "4k": Mixture("documents of 4,096 tokens", lambda rng: answer(4096, num_prompt=24)),
    "tiny": Mixture("short rows with one image or two", tiny),
    "tiny text": Mixture("short rows", lambda rng: answer(lognormal(rng, 60, 0.5, 24, 200))),
}
