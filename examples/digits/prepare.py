"""Handwritten digits as chat rows: scikit-learn's 1,797 real scans -> PNG files and JSON lines.

The split is fixed by seed: 360 held-out scans, of which the training rows see no copy. The training images
are slightly rotated, shifted and scaled copies of the other 1,437. A row asks one question about one
image; of each held-out scan all three are asked.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from partwise.tiny import write_tiny

NUM_HELD_OUT = 360
NUM_COPIES = 12000
IMAGE_SIZE = 32
QUESTIONS = {
    "Which digit is this?": str,
    "Is it odd or even?": lambda digit: "odd" if digit % 2 else "even",
    "Is it larger than five?": lambda digit: "yes" if digit > 5 else "no",
}
QUESTION_SHARES = (0.6, 0.2, 0.2)


def write_rows(folder: Path, seed: int = 0) -> None:
    """Write images/, train.jsonl and held_out.jsonl into `folder`."""
    scans, digits = load_digits(return_X_y=True)
    scans = (scans.reshape(-1, 8, 8) * 15.9375).astype(np.uint8)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(scans))
    held_out, train = order[:NUM_HELD_OUT], order[NUM_HELD_OUT:]
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(NUM_COPIES):
        index = train[i % len(train)]
        question = rng.choice(list(QUESTIONS), p=QUESTION_SHARES)
        image = distort(scans[index], rng)
        rows.append(write_row(folder, f"train-{i:05d}", image, int(digits[index]), str(question)))
    (folder / "train.jsonl").write_text("".join(rows))
    rows = [
        write_row(folder, f"held-out-{i:03d}", enlarge(scans[index]), int(digits[index]), question)
        for i, index in enumerate(held_out)
        for question in QUESTIONS
    ]
    (folder / "held_out.jsonl").write_text("".join(rows))


def write_base(folder: Path) -> None:
    """The demo's Gemma-3 with random weights, as a whole Hugging Face folder."""
    write_tiny(
        "gemma3",
        folder,
        image_size=IMAGE_SIZE,
        mm_tokens=16,
        vision={"patch_size": 8, "hidden_size": 96, "intermediate_size": 192},
    )


def write_row(folder: Path, name: str, image: Image.Image, digit: int, question: str) -> str:
    image.save(folder / "images" / f"{name}.png")
    messages = [
        {"role": "user", "content": f"<image>{question}"},
        {"role": "assistant", "content": QUESTIONS[question](digit)},
    ]
    row = {"messages": messages, "images": [f"images/{name}.png"], "question": question}
    return json.dumps(row) + "\n"


def enlarge(scan: np.ndarray) -> Image.Image:
    return Image.fromarray(scan).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC).convert("RGB")


def distort(scan: np.ndarray, rng: np.random.Generator) -> Image.Image:
    """The scan rotated by up to 12 degrees, scaled by up to 10 % and shifted by up to 2 pixels."""
    angle, scale = np.radians(rng.uniform(-12, 12)), rng.uniform(0.9, 1.1)
    cos, sin = np.cos(angle) / scale, np.sin(angle) / scale
    centre = IMAGE_SIZE / 2
    dx, dy = rng.uniform(-2, 2, size=2)
    matrix = (
        *(cos, sin, centre - cos * (centre + dx) - sin * (centre + dy)),
        *(-sin, cos, centre + sin * (centre + dx) - cos * (centre + dy)),
    )
    return enlarge(scan).transform(
        (IMAGE_SIZE, IMAGE_SIZE), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR
    )
