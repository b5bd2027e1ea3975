"""Step time and peak memory of real-shape models with random weights, through `partwise train` itself.

Usage: python benchmarks/step.py OUT.jsonl [CELL ...]; needs a GPU. Each cell is one run in a fresh process:
image questions with one image a row, tokens counted from the batches, the median over the steps after the
first three. One JSON line per cell; a cell that fails says why.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image

from partwise.tiny import write_tiny

NUM_STEPS = 12
NUM_WARMUP_STEPS = 3
ROWS_PER_STEP = 32
GEMMA_3_4B = {
    "text": {
        "vocab_size": 262208,
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window": 1024,
        "layer_types": ["full_attention" if i % 6 == 5 else "sliding_attention" for i in range(34)],
        "initializer_range": 0.02,
    },
    "vision": {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "patch_size": 14,
    },
    "image_size": 896,
    "mm_tokens": 256,
}
GEMMA_3_12B = {
    **GEMMA_3_4B,
    "text": {
        **GEMMA_3_4B["text"],
        "hidden_size": 3840,
        "intermediate_size": 15360,
        "num_hidden_layers": 48,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "layer_types": ["full_attention" if i % 6 == 5 else "sliding_attention" for i in range(48)],
    },
}
CELLS = {
    "lora": {"parts": {"language_model": {"mode": "lora", "lora_rank": 16}}},
    "lora-checkpointing": {
        "parts": {"language_model": {"mode": "lora", "lora_rank": 16}},
        "train": {"gradient_checkpointing": True, "micro_batch_size": 8},
    },
    "projector-full-language-lora": {
        "parts": {"projector": "full", "language_model": {"mode": "lora", "lora_rank": 16}}
    },
    "projector": {"parts": {"projector": "full"}},
    "full": {"parts": {"projector": "full", "language_model": "full"}, "train": {"micro_batch_size": 2}},
    "full-checkpointing": {
        "parts": {"projector": "full", "language_model": "full"},
        "train": {"gradient_checkpointing": True},
    },
    # Beside the cells that log every step, what watching a step costs.
    "lora-log-every-3": {
        "parts": {"language_model": {"mode": "lora", "lora_rank": 16}},
        "train": {"log_every": 3},
    },
    "full-checkpointing-log-every-3": {
        "parts": {"projector": "full", "language_model": "full"},
        "train": {"gradient_checkpointing": True, "log_every": 3},
    },
    "all-full-checkpointing": {
        "parts": {"vision_tower": "full", "projector": "full", "language_model": "full"},
        "train": {"gradient_checkpointing": True},
    },
}


def main() -> None:
    out, names = Path(sys.argv[1]), sys.argv[2:] or list(CELLS)
    with tempfile.TemporaryDirectory() as folder_name:
        folder = Path(folder_name)
        write_model(folder / "base")
        write_rows(folder)
        for name in names:
            row = run_cell(name, folder)
            append_row(out, row)


def write_model(folder: Path, shape: dict | None = None, family: str = "gemma3") -> None:
    """Gemma-3-4B's shape, or another, with random bfloat16 weights, made on the GPU."""
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        write_tiny(family, folder, **(shape or GEMMA_3_4B))
    torch.set_default_dtype(torch.float32)
    torch.cuda.empty_cache()


def write_rows(folder: Path) -> None:
    """Chat rows with one noise image of 896 pixels and questions and answers of many lengths."""
    rng = np.random.default_rng(0)
    words = [
        "the",
        "image",
        "shows",
        "a",
        "red",
        "circle",
        "and",
        "two",
        "blue",
        "squares",
        "on",
        "its",
        "left",
    ]
    for i in range(32):
        pixels = rng.integers(0, 256, size=(896, 896, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02d}.jpg", quality=80)
    rows = []
    for i in range(NUM_STEPS * ROWS_PER_STEP):
        question, answer = (
            " ".join(rng.choice(words, size=int(n))) for n in np.clip(rng.lognormal(3.7, 0.7, 2), 4, 300)
        )
        messages = [
            {"role": "user", "content": f"<image>{question}?"},
            {"role": "assistant", "content": answer},
        ]
        rows.append(json.dumps({"messages": messages, "images": [f"{i % 32:02d}.jpg"]}) + "\n")
    (folder / "rows.jsonl").write_text("".join(rows))


def run_cell(name: str, folder: Path) -> dict:
    cell = CELLS[name]
    config = {
        "model": {"path": str(folder / "base")},
        "parts": cell["parts"],
        "data": {"train": str(folder / "rows.jsonl"), "num_workers": 12},
        "train": {
            "steps": NUM_STEPS,
            "global_batch_size": ROWS_PER_STEP,
            "micro_batch_size": 4,
            "learning_rate": 1e-5,
            **cell.get("train", {}),
        },
        "output": str(folder / name),
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    done = subprocess.run(
        [sys.executable, "-m", "partwise.cli", "train", str(path)], capture_output=True, text=True
    )
    row = {
        "cell": f"gemma-3-4b image questions, {name}",
        "command": f"python benchmarks/step.py OUT.jsonl {name}",
        **describe_machine(),
        "micro_batch_size": config["train"]["micro_batch_size"],
        "gradient_checkpointing": config["train"].get("gradient_checkpointing", False),
    }
    if done.returncode:
        return row | {"error": done.stderr.strip()[-600:]}
    lines, measured, rates = measured_steps(folder / name)
    seconds = [line["step_seconds"] for line in measured]
    return row | {
        "runs": len(measured),
        "tokens_per_second": round(statistics.median(rates)),
        "tokens_per_second_min": round(min(rates)),
        "tokens_per_second_max": round(max(rates)),
        "step_seconds_median": round(statistics.median(seconds), 4),
        "step_seconds_mean": round(statistics.mean(seconds), 4),
        "data_wait_seconds_median": round(
            statistics.median(line["data_wait_seconds"] for line in measured), 4
        ),
        "peak_memory_bytes": max(line["peak_memory_bytes"] for line in lines),
        **told_by_report(folder / name),
        "first_loss": lines[0]["loss"],
        "last_loss": lines[-1]["loss"],
    }


def read_steps(run: Path) -> list[dict]:
    """The run's logged steps."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if "loss" in record]


def measured_steps(run: Path) -> tuple[list[dict], list[dict], list[float]]:
    """The run's logged steps, those of them after the warm-up, and the tokens per second of these."""
    steps = read_steps(run)
    measured = [step for step in steps if step["step"] > NUM_WARMUP_STEPS]
    return steps, measured, [step["num_input_tokens"] / step["step_seconds"] for step in measured]


def read_report(run: Path) -> dict[str, dict]:
    """The values of the run's last finding of each check."""
    return {f["check"]: f["values"] for f in json.loads((run / "report.json").read_text())}


def told_by_report(run: Path) -> dict:
    """What the check before the run said of its time, and what verifying final/ in a fresh process took."""
    findings = read_report(run)
    return {
        "predicted_step_seconds": findings.get("time", {}).get("step_seconds"),
        "verify_seconds": findings.get("verify", {}).get("seconds"),
        "verify_relative_error": findings.get("verify", {}).get("relative_error"),
        "verify_device": findings.get("verify", {}).get("device"),
    }


def append_row(out: Path, row: dict) -> None:
    """Print a result, and append it to a file of results as a line of JSON."""
    print(json.dumps(row), flush=True)
    with out.open("a") as file:
        file.write(json.dumps(row) + "\n")


def describe_machine() -> dict:
    """What every row says of where it was measured."""
    has_gpu = torch.cuda.is_available()
    return {
        "commit": git_commit(),
        "hardware": torch.cuda.get_device_name() if has_gpu else f"{platform.machine()} CPU",
        "versions": {n: version(n) for n in ("torch", "transformers", "peft")}
        | {"python": platform.python_version()},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def git_commit() -> str:
    """The commit that is measured; of a copy of the tree without its history, PARTWISE_COMMIT says it."""
    if commit := os.environ.get("PARTWISE_COMMIT"):
        return commit
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
