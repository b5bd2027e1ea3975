"""The whole path once, on real images: train a tiny Gemma-3, export it, ask it about scans it has not seen.

Every stage is a command that you could type; this file types them, then shows what was learned. Run it with
`make demo`. It writes runs/digits/ and starts it afresh each time.
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path

import matplotlib
from PIL import Image
from prepare import write_base, write_rows
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from transformers.utils.logging import disable_progress_bar

from partwise.model.load import empty_model
from partwise.model.parts import find_parts

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path("examples/digits")
FOLDER = Path("runs/digits")
DIGIT_QUESTION = "Which digit is this?"
BARS = "▁▂▃▄▅▆▇█"
SHADES = " ░▒▓█"
console = Console(highlight=False)


def main() -> None:
    start = time.perf_counter()
    disable_progress_bar()
    shutil.rmtree(FOLDER, ignore_errors=True)
    console.rule("data: scikit-learn's handwritten digits as chat rows")
    write_rows(FOLDER / "data")
    write_base(FOLDER / "base")
    run("partwise", "preview", HERE / "config.yaml", "--row", "0")
    console.rule("train every part of a Gemma-3 that starts from random weights")
    run("partwise", "train", HERE / "config.yaml")
    console.rule("export, and reload with plain transformers in a fresh process")
    run("partwise", "export", FOLDER / "run", "--out", FOLDER / "model")
    out = FOLDER / "answers.json"
    run("python", HERE / "answer.py", FOLDER / "model", FOLDER / "data/held_out.jsonl", out)
    records = json.loads(out.read_text())
    metrics = [json.loads(line) for line in (FOLDER / "run/metrics.jsonl").read_text().splitlines()]
    show_loss(metrics)
    show_parts(metrics)
    show_scans(records)
    show_answers(records)
    draw_picture(records, metrics, FOLDER / "demo.png")
    console.print(f"picture: {FOLDER / 'demo.png'}; {time.perf_counter() - start:.0f} s in all")
    digits = [record for record in records if record["question"] == DIGIT_QUESTION]
    right, control = fraction_right(digits, "answer"), fraction_right(digits, "answer_to_shuffled")
    console.print(f"held-out accuracy {right:.2f} (shuffled images {control:.2f})")


def run(program: str, *arguments: object) -> None:
    """Run a program of this virtual environment, with its output on our terminal."""
    command = [str(Path(sys.executable).with_name(program)), *map(str, arguments)]
    console.print(f"[bold]$ {' '.join([program, *map(str, arguments)])}[/bold]")
    done = subprocess.run(command)
    if done.returncode:
        sys.exit(done.returncode)


def fraction_right(records: list[dict], key: str) -> float:
    return sum(record[key] == record["truth"] for record in records) / len(records)


def show_loss(metrics: list[dict]) -> None:
    """The training loss as one line of bars on a logarithmic scale, first step to last."""
    losses = [line["loss"] for line in metrics if "loss" in line]
    width = min(56, len(losses))
    bins = [losses[i * len(losses) // width : (i + 1) * len(losses) // width] for i in range(width)]
    logs = [math.log(sum(values) / len(values)) for values in bins]
    low, high = min(logs), max(logs)
    bars = "".join(BARS[round((len(BARS) - 1) * (value - low) / (high - low))] for value in logs)
    console.print(f"loss {losses[0]:.2f} [cyan]{bars}[/cyan] {losses[-1]:.3f}")


def show_parts(metrics: list[dict]) -> None:
    """What each part did: how far its weights moved, and how large its gradients were."""
    before = load_file(FOLDER / "base/model.safetensors")
    after = load_file(FOLDER / "model/model.safetensors")
    last = [line for line in metrics if "grad_norms" in line][-1]
    table = Table(title="what each part did", title_justify="left", title_style="bold")
    for column in ("part", "parameters", "weights moved by", "last gradient norm"):
        table.add_column(column, justify="left" if column == "part" else "right")
    for name, part in find_parts(empty_model(FOLDER / "base")).items():
        keys = [key for key in before if any(path_matches(key, path) for path in part.module_paths)]
        moved = sum(((after[k] - before[k]) ** 2).sum().item() for k in keys) ** 0.5
        size = sum((before[k] ** 2).sum().item() for k in keys) ** 0.5
        table.add_row(
            name, f"{part.num_parameters:,}", f"{moved / size:.0%}", f"{last['grad_norms'][name]:.3f}"
        )
    console.print(table)


def path_matches(key: str, module_path: str) -> bool:
    """Whether a tensor of the file lies in a module; the file leaves out the leading "model."."""
    return key.startswith(module_path.removeprefix("model.") + ".") or key.startswith(module_path + ".")


def show_scans(records: list[dict]) -> None:
    """Four held-out scans drawn with characters, the model's answer and the truth below each."""
    shown = [record for record in records if record["question"] == DIGIT_QUESTION][::80][:4]
    drawings = [draw_scan(Path(record["image"])) for record in shown]
    for lines in zip(*drawings, strict=True):
        console.print("   ".join(lines))
    captions = [f"answer {record['answer']}, truth {record['truth']}" for record in shown]
    console.print("   ".join(f"{caption:^16}" for caption in captions))


def draw_scan(path: Path) -> list[str]:
    """The scan as 8 lines of 16 characters, one character for two pixels of the 8 by 8 original."""
    pixels = Image.open(path).convert("L").resize((16, 8))
    shades = "".join(SHADES[value * len(SHADES) // 256] for value in pixels.tobytes())
    return [shades[i : i + 16] for i in range(0, len(shades), 16)]


def show_answers(records: list[dict]) -> None:
    table = Table(title="held-out scans", title_justify="left", title_style="bold")
    for column in ("question", "truth", "answer", "answer to another scan"):
        table.add_column(column)
    for record in records[::121][:9]:
        style = "green" if record["answer"] == record["truth"] else "red"
        table.add_row(
            record["question"],
            record["truth"],
            f"[{style}]{record['answer']}[/{style}]",
            record["answer_to_shuffled"],
        )
    console.print(table)
    table = Table(title="held-out accuracy, exact match", title_justify="left", title_style="bold")
    for column in ("question", "right image", "shuffled images", "questions"):
        table.add_column(column, justify="left" if column == "question" else "right")
    for question in dict.fromkeys(record["question"] for record in records):
        asked = [record for record in records if record["question"] == question]
        right, control = fraction_right(asked, "answer"), fraction_right(asked, "answer_to_shuffled")
        table.add_row(question, f"{right:.3f}", f"{control:.3f}", str(len(asked)))
    console.print(table)


def draw_picture(records: list[dict], metrics: list[dict], path: Path) -> None:
    """Fifteen held-out scans with question, answer and truth, beside the loss."""
    figure = plt.figure(figsize=(12, 4.6), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1.25, 1])
    shown = [records[3 * i + i % 3] for i in range(15)]
    for axis, record in zip(left.subplots(3, 5).flat, shown, strict=True):
        axis.imshow(Image.open(record["image"]))
        correct = record["answer"] == record["truth"]
        axis.set_title(record["question"], fontsize=7)
        label = record["answer"] if correct else f"{record['answer']} (truth {record['truth']})"
        axis.set_xlabel(label, fontsize=11, color="green" if correct else "red", fontweight="bold")
        axis.set_xticks([])
        axis.set_yticks([])
    left.suptitle("held-out scans: question above, the model's answer below", fontsize=10)
    axis = right.subplots()
    train = [(line["step"], line["loss"]) for line in metrics if "loss" in line]
    held_out = [(line["step"], line["eval_loss"]) for line in metrics if "eval_loss" in line]
    axis.plot(*zip(*train, strict=True), linewidth=1, label="training loss")
    axis.plot(*zip(*held_out, strict=True), "o-", label="held-out loss")
    axis.set(xlabel="step", ylabel="loss per target token (nats)", yscale="log")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
