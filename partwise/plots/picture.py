"""Curves -> one PNG: a panel each, the loss across the top; stages are bands."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from partwise.plots.curves import Axis, Curves, Line, Panel, smooth

LABELS: dict[Axis, str] = {"steps": "step", "tokens": "target tokens"}
DECADES = 1e5  # a logarithmic axis ends this far below its top: schedules end near zero
BANDS = ("#e8eef4", "#f6f1e4")


def draw_curves(
    runs: Sequence[Curves], panels: Sequence[Panel], axis: Axis, smoothing: float, path: Path
) -> None:
    """Writes the picture of these panels, of which the first is the loss."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rest = panels[1:]
    num_parts = len({part for run in runs for part in run.parts})
    num_columns = 2 if len(runs) == 1 else max(2, num_parts)
    num_rows = math.ceil(len(rest) / num_columns)
    figure = Figure(figsize=(5.2 * num_columns, 4.2 + 2.5 * num_rows), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(num_rows + 1, num_columns, height_ratios=(1.7, *[1] * num_rows))
    places = [grid[0, :], *(grid[1 + i // num_columns, i % num_columns] for i in range(len(rest)))]
    for place, panel in zip(places, panels, strict=True):
        axes = figure.add_subplot(place)
        draw_panel(axes, runs, panel, axis, smoothing)
        draw_stages(axes, runs, axis, is_named=panel is panels[0])
    figure.savefig(path, dpi=110)


def draw_panel(axes: Any, runs: Sequence[Curves], panel: Panel, axis: Axis, smoothing: float) -> None:
    """Of each line what was logged, faint, and smoothed, strong; evaluations as points."""
    for line in panel.lines:
        run = runs[line.run]
        places = run.steps if axis == "steps" else run.target_tokens
        # Rates follow a schedule: there is nothing to smooth.
        is_exact = line.key.startswith(("learning_rates", "memory"))
        if not is_exact:
            axes.plot(places, raw(run, line, panel), color=line.color, alpha=0.22, linewidth=0.9)
        values = raw(run, line, panel) if is_exact else smooth(run.values[line.key], smoothing)
        axes.plot(
            places,
            values,
            color=line.color,
            linewidth=1.7,
            linestyle=(0, line.dash) if line.dash else "-",
            marker="s" if len(places) == 1 else "",
            markersize=4,
            label=line.label,
        )
        if line.key == "loss" and run.evals:
            axes.plot(
                [run.place(axis, step) for step, _ in run.evals],
                [loss for _, loss in run.evals],
                color=line.color,
                marker="o",
                markersize=5,
                markeredgecolor="white",
                linewidth=0,
                label=f"{line.label}: evaluation",
            )
    finish_axes(axes, panel, axis)
    # Colours of runs are the same everywhere, those of parts are named in each panel.
    if panel.lines[0].key == "loss" or (len(runs) == 1 and len(panel.lines) > 1):
        axes.legend(frameon=False, fontsize=8)


def raw(run: Curves, line: Line, panel: Panel) -> list[float | None]:
    """The logged values; on a logarithmic axis those above zero."""
    return [None if v is None or (panel.is_log and v <= 0) else v for v in run.values[line.key]]


def finish_axes(axes: Any, panel: Panel, axis: Axis) -> None:
    axes.set_title(panel.title, fontsize=10, loc="left")
    axes.set_xlabel(LABELS[axis], fontsize=9)
    if panel.is_log:
        finish_log_axis(axes)
    elif panel.lines[0].key != "loss":
        axes.set_ylim(bottom=0)
    axes.margins(x=0.01)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


def finish_log_axis(axes: Any) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.set_ylim(bottom=max(low, high / DECADES))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 3) if high / axes.get_ylim()[0] < 1000 else (1,)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())


def draw_stages(axes: Any, runs: Sequence[Curves], axis: Axis, is_named: bool) -> None:
    """The stages of the first run that has some, behind its lines."""
    run = next((run for run in runs if run.stages), None)
    for number, stage in enumerate(run.stages if run else ()):
        assert run is not None
        first, last = run.place(axis, stage.first), run.place(axis, stage.last)
        axes.axvspan(first, last, color=BANDS[number % 2], zorder=0, linewidth=0)
        if is_named:
            axes.text(
                (first + last) / 2, 0.98, stage.name, ha="center", va="top", fontsize=9, color="#555555",
                transform=axes.get_xaxis_transform(),
            )  # fmt: skip
