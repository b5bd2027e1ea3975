"""Curves -> one interactive HTML page that needs nothing else: no network, no library.

In: curves and panels. Out: the text of the page: page.html with the numbers in it as JSON. Names of runs and
stages are text wherever they come from: nothing in them can become a tag or a script. No file is written.
"""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from dataclasses import asdict
from importlib.resources import files
from typing import Any

from partwise.plots.curves import Axis, Curves, Panel

# A page holds about this many points of each line; of a longer run every second one, or every third, ...
MAX_POINTS = 4000


def curves_page(runs: Sequence[Curves], panels: Sequence[Panel], axis: Axis, smoothing: float) -> str:
    data = {
        "axis": axis,
        "smoothing": smoothing,
        "runs": [run_data(run) for run in runs],
        "panels": [asdict(panel) for panel in panels],
    }
    title = html.escape(", ".join(run.name for run in runs))
    template = files("partwise.plots").joinpath("page.html").read_text(encoding="utf-8")
    # The title last: what a user named a folder cannot be taken for a place in the page.
    return template.replace("@DATA@", script_json(data), 1).replace("@TITLE@", title, 2)


def run_data(run: Curves) -> dict[str, Any]:
    stride = -(-len(run.steps) // MAX_POINTS)
    kept = slice((len(run.steps) - 1) % stride, None, stride)  # the last step stays
    return {
        "name": run.name,
        "stride": stride,
        "steps": run.steps[kept],
        "tokens": run.target_tokens[kept],
        "values": {key: [shorten(value) for value in values[kept]] for key, values in run.values.items()},
        "evals": [
            {"step": step, "tokens": run.place("tokens", step), "loss": shorten(loss)}
            for step, loss in run.evals
        ],
        "stages": [
            {
                "name": stage.name,
                "steps": [stage.first, stage.last],
                "tokens": [run.place("tokens", stage.first), run.place("tokens", stage.last)],
            }
            for stage in run.stages
        ],
    }


def shorten(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")


def script_json(data: Any) -> str:
    """JSON that may stand between script tags: it holds no "<", so that nothing in it can end them."""
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
