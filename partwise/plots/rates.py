"""Range tests -> one PNG: the loss over the learning rate, a panel for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from partwise.plots.curves import COLORS


def draw_sweep(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Writes the picture of the records of find-lr.json."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * len(records) + 1, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, record in zip(figure.subplots(1, len(records), squeeze=False)[0], records, strict=True):
        rates = record["rates"]
        axes.plot(rates, record["losses"], color=COLORS[0], alpha=0.3, linewidth=1)
        axes.plot(rates, record["smoothed"], color=COLORS[0], linewidth=2)
        axes.plot([record["bottom_rate"]], [record["bottom_loss"]], "o", color=COLORS[0], label="bottom")
        for rate in sorted(set(record["now"].values())):
            axes.axvline(rate, color=COLORS[6], linestyle=(0, (2, 2)), label=f"now {rate:.2g}")
        if record["rate"] is not None:
            axes.axvline(
                record["rate"], color=COLORS[1], linewidth=2, label=f"suggested {record['rate']:.2g}"
            )
        axes.set_ylim(*shown_losses(record))
        axes.set_xscale("log")
        axes.set_title(" + ".join(record["parts"]), fontsize=10, loc="left")
        axes.set_xlabel("learning rate", fontsize=9)
        axes.set_ylabel("loss per target token (nats)", fontsize=9)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


def shown_losses(record: Mapping[str, Any]) -> tuple[float, float]:
    """The losses that the picture shows: what shoots up at the end would flatten all the rest."""
    low, high = min(record["losses"]), record["start_loss"]
    reach = max(high - low, 0.05 * abs(high), 1e-6)
    return low - 0.1 * reach, high + 0.6 * reach
