"""Our loss curve beside plain transformers in fp32: 300 steps on the digits at real head dimensions.

Usage: python -m benchmarks.convergence OUT.jsonl [STEPS]; the CPU will do, a GPU takes the flash kernels and
compiled layers. A Gemma-3 of six layers with heads of 256, and a tower with heads of 72, start from random
weights. All curves see the same rows in the same steps:

- ours: `partwise train` in bfloat16, in packs;
- reference: plain transformers, float32, rows padded, one batch a step;
- two more by plain transformers in bfloat16 autocast, accumulated over micro-batches in shuffled order.

How far a curve may be from the reference and still be the same training, the two others show. A distance is
the mean over the steps of the difference of losses, each smoothed over 20 steps.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor

from benchmarks.plain import IGNORE_INDEX, plain_batch
from benchmarks.step import describe_machine, read_steps
from partwise.data.loader import epoch_order
from partwise.tiny import write_tiny

DIGITS = Path(__file__).parents[1] / "examples/digits"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NUM_STEPS = 300
ROWS_PER_STEP = 16
MICRO_BATCH = 4
LEARNING_RATE = 5e-4
WINDOW = 20
SHAPE = {
    "image_size": 32,
    "mm_tokens": 16,
    "text": {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 6,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window": 16,
        "layer_types": ["full_attention" if i % 6 == 5 else "sliding_attention" for i in range(6)],
    },
    "vision": {"patch_size": 8, "hidden_size": 144, "intermediate_size": 288, "num_attention_heads": 2},
}
Curve = list[float]


def main() -> None:
    out, num_steps = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else NUM_STEPS
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sys.path.insert(0, str(DIGITS))
        from prepare import write_rows

        write_rows(folder / "data")
        write_tiny("gemma3", folder / "base", **SHAPE)
        ours = run_ours(folder, num_steps)
        reference = run_plain(folder, num_steps)
        others = [run_plain(folder, num_steps, shuffle_seed=seed) for seed in (1, 2)]
    distances = [distance(curve, reference) for curve in (ours, *others)]
    row = {
        "cell": "digits at real head dimensions",
        "command": "python -m benchmarks.convergence OUT.jsonl",
        **describe_machine(),
        "steps": num_steps,
        "last_losses": [round(smooth(curve)[-1], 5) for curve in (ours, reference, *others)],
        "distance_ours": round(distances[0], 6),
        "distances_of_references": [round(value, 6) for value in distances[1:]],
        "is_inside": distances[0] <= max(distances[1:]),
        "curves": {
            name: [round(loss, 5) for loss in curve]
            for name, curve in zip(
                ("ours", "fp32", "bf16-1", "bf16-2"), (ours, reference, *others), strict=True
            )
        },
    }
    print(json.dumps(row | {"curves": "..."}), flush=True)
    with out.open("a") as file:
        file.write(json.dumps(row) + "\n")


def smooth(curve: Curve) -> Curve:
    return [sum(curve[max(0, i - WINDOW + 1) : i + 1]) / min(i + 1, WINDOW) for i in range(len(curve))]


def distance(curve: Curve, reference: Curve) -> float:
    pairs = zip(smooth(curve), smooth(reference), strict=True)
    return sum(abs(mine - theirs) for mine, theirs in pairs) / len(curve)


def run_ours(folder: Path, num_steps: int) -> Curve:
    config = {
        "model": {"path": str(folder / "base"), "dtype": "bfloat16"},
        "parts": {"vision_tower": "full", "projector": "full", "language_model": "full"},
        "data": {"train": str(folder / "data/train.jsonl"), "max_seq_len": 128, "packing": True},
        "train": {
            "steps": num_steps,
            "global_batch_size": ROWS_PER_STEP,
            "micro_batch_size": MICRO_BATCH,
            "learning_rate": LEARNING_RATE,
            "learning_rate_schedule": "constant",
            "verify": "off",
            **({"compile": True} if DEVICE.type == "cuda" else {}),
        },
        "output": str(folder / "run"),
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "partwise.cli", "train", str(folder / "run.yaml")]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stdout[-1500:] + done.stderr[-1500:])
    return [step["loss"] for step in read_steps(folder / "run")]


def run_plain(folder: Path, num_steps: int, shuffle_seed: int | None = None) -> Curve:
    """A plain loop: AdamW on fp32 weights, clipped, the mean over the step's targets."""
    model = AutoModelForImageTextToText.from_pretrained(folder / "base", dtype=torch.float32)
    model = model.to(DEVICE).train()
    processor = AutoProcessor.from_pretrained(folder / "base")
    processor.tokenizer.padding_side = "right"
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    lines = (folder / "data/train.jsonl").read_text().splitlines()
    order = epoch_order(len(lines), 0, 0)
    shuffler = random.Random(shuffle_seed)
    curve = []
    for step in range(num_steps):
        rows = [json.loads(lines[i]) for i in order[step * ROWS_PER_STEP : (step + 1) * ROWS_PER_STEP]]
        micro_batches = [rows]
        if shuffle_seed is not None:
            shuffler.shuffle(rows)
            micro_batches = [rows[i : i + MICRO_BATCH] for i in range(0, len(rows), MICRO_BATCH)]
        batches = [collate(processor, part, folder / "data") for part in micro_batches]
        num_targets = sum(int((batch["labels"] != IGNORE_INDEX).sum()) for batch in batches)
        low = torch.autocast(DEVICE.type, torch.bfloat16) if shuffle_seed is not None else nullcontext()
        total = 0.0
        for batch in batches:
            with low:
                loss = model(**batch, num_items_in_batch=num_targets).loss
            loss.backward()
            total += loss.item()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        curve.append(total)
    return curve


def collate(processor: Any, rows: list[dict[str, Any]], folder: Path) -> dict[str, torch.Tensor]:
    """A padded batch with targets on what follows the model's turn marker, its end of turn included."""
    prompts, answers = [], []
    for row in rows:
        question, answer = (message["content"] for message in row["messages"])
        content = [{"type": "image"}, {"type": "text", "text": question.removeprefix("<image>")}]
        prompt = [{"role": "user", "content": content}]
        prompts.append(processor.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True))
        answers.append(f"{answer}<end_of_turn>")
    images = [[Image.open(folder / row["images"][0])] for row in rows]
    batch = plain_batch(processor, prompts, answers, images)
    return {name: value.to(DEVICE) for name, value in batch.items()}


if __name__ == "__main__":
    main()
