"""The digits demo by three ways to open its parts, at equal steps: in stages, at once, or one part alone.

Usage: python -m benchmarks.stages OUT.jsonl [STEPS]; needs no GPU. The model to start from has a tower and a
language model that know digits, and a projector drawn anew, as when two trained models are joined. Each way
runs with three seeds, interleaved. One JSON line per run: what it answers on held-out scans, with the right
image and with another row's, and how long its steps took. Without arguments it writes the table of
docs/stages.md from results/stages.jsonl; a test holds that the page has it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file, save_file

from benchmarks.step import append_row, describe_machine

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/stages.md"
RESULTS = ROOT / "benchmarks/results/stages.jsonl"
MARKED = re.compile(r"(<!-- ways:start -->\n).*?(<!-- ways:end -->)", re.S)
DIGITS = ROOT / "examples/digits"
PROJECTOR = "multi_modal_projector"
SEEDS = (0, 1, 2)
NUM_STEPS = 300
OPEN = {
    "vision_tower": {"mode": "full", "learning_rate": 2e-4},
    "projector": "full",
    "language_model": "full",
}
MEANS = ("accuracy", "accuracy_with_another_image", "eval_loss", "input_tokens", "seconds_of_steps")
WAYS: dict[str, dict[str, Any]] = {
    "progressive": {"parts": OPEN, "schedule": "progressive"},
    "all at once": {"parts": OPEN},
    "projector only": {"parts": {"projector": "full"}},
}


def main() -> None:
    if len(sys.argv) == 1:
        PAGE.write_text(page())
        return
    out, num_steps = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else NUM_STEPS
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_base(folder)
        for seed in SEEDS:
            for way in WAYS:
                row = {
                    "cell": "digits, parts opened",
                    "way": way,
                    "seed": seed,
                    "command": "python -m benchmarks.stages OUT.jsonl",
                    **describe_machine(),
                    "load_average": round(os.getloadavg()[0], 2),
                    **run_way(folder, way, seed, num_steps),
                }
                append_row(out, row)


def write_base(folder: Path) -> None:
    """data/, and base/: the demo's model after its training, with the projector that it began with."""
    sys.path.insert(0, str(DIGITS))
    import prepare

    prepare.write_rows(folder / "data")
    prepare.write_base(folder / "random")
    config = yaml.safe_load((DIGITS / "config.yaml").read_text())
    train(folder, "trained", config | {"model": {"path": str(folder / "random"), "dtype": "float32"}})
    shutil.copytree(folder / "trained/final", folder / "base")
    (folder / "base/partwise.json").unlink()  # its weights are about to change
    file = folder / "base/model.safetensors"
    weights, drawn = load_file(file), load_file(folder / "random/model.safetensors")
    save_file(
        {k: drawn[k] if PROJECTOR in k else v for k, v in weights.items()}, file, metadata={"format": "pt"}
    )


def run_way(folder: Path, way: str, seed: int, num_steps: int) -> dict[str, Any]:
    config = yaml.safe_load((DIGITS / "config.yaml").read_text())
    settings = {
        "steps": num_steps,
        "learning_rate": 1e-3,
        "warmup_steps": num_steps // 20,
        "seed": seed,
        "log_every": 1,
        "save_every": None,
        "eval_every": None,
        "verify": "off",
    }
    del config["train"]["epochs"]
    config |= {"model": {"path": str(folder / "base"), "dtype": "float32"}, **WAYS[way]}
    config["train"] |= settings
    run = train(folder, f"{way.replace(' ', '-')}-{seed}", config)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    steps = [record for record in records if "loss" in record]
    answers = folder / "answers.json"
    command = [sys.executable, DIGITS / "answer.py", run / "final", folder / "data/held_out.jsonl", answers]
    subprocess.run([str(word) for word in command], check=True, capture_output=True)
    asked = json.loads(answers.read_text())
    return {
        "steps": steps[-1]["step"],
        "input_tokens": sum(step["num_input_tokens"] for step in steps),
        "seconds_of_steps": round(sum(step["step_seconds"] for step in steps), 1),
        "accuracy": share(asked, "answer"),
        "accuracy_with_another_image": share(asked, "answer_to_shuffled"),
        "eval_loss": next(record["eval_loss"] for record in reversed(records) if "eval_loss" in record),
    }


def train(folder: Path, name: str, config: dict[str, Any]) -> Path:
    """The run folder of one run, checks and all."""
    rows = {
        kind: str(folder / f"data/{file}.jsonl") for kind, file in (("train", "train"), ("eval", "held_out"))
    }
    config = config | {"data": config["data"] | rows, "output": str(folder / name)}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    done = subprocess.run(
        [sys.executable, "-m", "partwise.cli", "train", str(path)], capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(done.stdout[-1500:] + done.stderr[-1500:])
    return folder / name


def page() -> str:
    """docs/stages.md with the table of what was measured."""
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    lines = [
        "| way | held-out accuracy, each seed | mean | with another image | loss | tokens | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for way in WAYS:
        mine = [row for row in rows if row["way"] == way]
        means = {key: statistics.fmean(row[key] for row in mine) for key in mine[0] if key in MEANS}
        cells = (
            way,
            ", ".join(f"{row['accuracy']:.3f}" for row in mine),
            f"{means['accuracy']:.3f}",
            f"{means['accuracy_with_another_image']:.3f}",
            f"{means['eval_loss']:.3f}",
            f"{means['input_tokens']:,.0f}",
            f"{means['seconds_of_steps']:.0f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    table = "\n".join(lines) + "\n"
    return MARKED.sub(lambda match: match[1] + table + match[2], PAGE.read_text())


def share(asked: list[dict[str, Any]], key: str) -> float:
    return round(sum(record[key] == record["truth"] for record in asked) / len(asked), 4)


if __name__ == "__main__":
    main()
