"""metrics.jsonl -> plots/loss.png: loss and gradient norm over the steps, of one run or several."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from partwise.errors import CheckpointError
from partwise.training.metrics import METRICS_FILE, read_metrics

# A run's smoothed line averages over about this fraction of its logged steps.
SMOOTHING_FRACTION = 0.05


def plot_runs(run_folders: Sequence[Path]) -> Path:
    """plots/loss.png in the first of the runs, all of them drawn over each other.

    Raises:
        CheckpointError: a run has no logged step.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    figure = Figure(figsize=(8, 6), layout="constrained")
    FigureCanvasAgg(figure)
    loss_axes, norm_axes = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    for index, run_folder in enumerate(run_folders):
        draw_run(loss_axes, norm_axes, Path(run_folder), f"C{index}")
    loss_axes.set_ylabel("loss per target token (nats)")
    norm_axes.set_ylabel("gradient norm")
    norm_axes.set_yscale("log")
    norm_axes.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
    norm_axes.yaxis.set_major_formatter("{x:g}")
    norm_axes.yaxis.set_minor_locator(NullLocator())
    norm_axes.set_xlabel("step")
    for axes in (loss_axes, norm_axes):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    loss_axes.legend(frameon=False)

    path = Path(run_folders[0]) / "plots" / "loss.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=150)
    return path


def draw_run(loss_axes: Any, norm_axes: Any, run_folder: Path, color: str) -> None:
    """One run: raw loss faint, smoothed loss strong, evaluations as points; gradient norm below."""
    records = list(read_metrics(run_folder))
    steps = [record for record in records if "loss" in record]
    evals = [record for record in records if "eval_loss" in record]
    if not steps:
        raise CheckpointError(
            f"{run_folder / METRICS_FILE} has no logged step, so there is nothing to draw. "
            "Give the output folder of a run that has trained."
        )
    name = run_folder.resolve().name
    numbers, losses = [record["step"] for record in steps], [record["loss"] for record in steps]
    loss_axes.plot(numbers, losses, color=color, alpha=0.25, linewidth=1)
    marker = "s" if len(steps) == 1 else ""
    smoothed = smooth(losses)
    loss_axes.plot(
        numbers, smoothed, color=color, marker=marker, linewidth=1.8, label=f"{name}: train, smoothed"
    )
    if evals:
        loss_axes.plot(
            [record["step"] for record in evals],
            [record["eval_loss"] for record in evals],
            color=color,
            marker="o",
            linestyle="--",
            linewidth=1,
            label=f"{name}: eval",
        )
    norm_axes.plot(numbers, [record["grad_norm"] for record in steps], color=color, linewidth=1)


def smooth(values: Sequence[float], fraction: float = SMOOTHING_FRACTION) -> list[float]:
    """Mean of each value and its neighbours on both sides, so that the line does not lag behind the values.

    The window spans about `fraction` of them and narrows evenly towards both ends.
    """
    reach = round(fraction * len(values) / 2)
    smoothed = []
    for index in range(len(values)):
        side = min(reach, index, len(values) - 1 - index)
        window = values[index - side : index + side + 1]
        smoothed.append(sum(window) / len(window))
    return smoothed
