"""A toy task that a tiny model really learns in seconds, and the commands run as a user runs them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from partwise import cli
from partwise.tiny import write_tiny

COLORS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (40, 60, 220), "yellow": (230, 220, 40)}
QUESTION = "What color is the square?"
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str


@pytest.fixture
def run_cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Runs `partwise ARGUMENTS` in this process; SystemExit's code is the command's."""

    def run(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["partwise", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return Done(code, captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


@pytest.fixture(scope="session")
def run_python(environment: dict[str, str]) -> Callable[..., Done]:
    """Runs Python code in a fresh process, with arguments in sys.argv."""

    def run(code: str, *arguments: object) -> Done:
        done = subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments)],
            capture_output=True,
            text=True,
            env=environment,
        )
        return Done(done.returncode, done.stdout, done.stderr)

    return run


def write_colors(folder: Path, num_rows: int, seed: int) -> Path:
    """Coloured squares with noise as chat rows in DIR/rows.jsonl, images beside it."""
    rng = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True)
    rows = []
    for i in range(num_rows):
        color = list(COLORS)[i % len(COLORS)]
        pixels = np.array(COLORS[color]) + rng.normal(0, 25, size=(28, 28, 3))
        name = f"images/{i:03d}.png"
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(folder / name)
        messages = [
            {"role": "user", "content": f"<image>{QUESTION}"},
            {"role": "assistant", "content": color},
        ]
        rows.append(json.dumps({"messages": messages, "images": [name]}) + "\n")
    path = folder / "rows.jsonl"
    path.write_text("".join(rows))
    return path


@dataclass(frozen=True)
class Toy:
    """Paths of the toy task, and a config text for it; keys in `changes` go over the defaults."""

    base: Path
    train: Path
    held_out: Path
    question: str = QUESTION

    def config(self, folder: Path, **changes: object) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "model": {"path": str(self.base), "dtype": "float32"},
            "parts": {"vision_tower": "full", "projector": "full", "language_model": "full"},
            "data": {"train": str(self.train), "max_seq_len": 128, "num_workers": 0},
            "train": {
                "steps": 8,
                "global_batch_size": 16,
                "micro_batch_size": 8,
                "learning_rate": 3e-3,
                "adam_betas": [0.9, 0.95],
                "verify": "off",
            },
            "output": str(folder / "run"),
        }
        for key, value in changes.items():
            section, _, name = key.partition("__")
            if name:
                config[section][name] = value  # type: ignore[index]
            elif value is None:
                del config[section]
            else:
                config[section] = value
        path = folder / "config.yaml"
        path.write_text(json.dumps(config, indent=1))
        return path


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    folder = tmp_path_factory.mktemp("toy")
    return Toy(
        base=write_tiny("gemma3", folder / "base"),
        train=write_colors(folder / "train", 160, seed=0),
        held_out=write_colors(folder / "held_out", 40, seed=1),
    )
