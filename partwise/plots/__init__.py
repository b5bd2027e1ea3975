"""Runs as pictures: metrics.jsonl -> plots/curves.png and plots/curves.html.

In: run folders. Out: files in plots/ of the first. curves.py reads, picture.py draws, page.py makes the page.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from partwise.errors import ConfigError
from partwise.plots.curves import SMOOTHING_FRACTION, Axis, make_panels, read_runs
from partwise.plots.page import curves_page
from partwise.plots.picture import draw_curves


def plot_runs(
    run_folders: Sequence[Path], axis: Axis = "steps", smoothing: float = SMOOTHING_FRACTION
) -> list[Path]:
    """The picture and the page of these runs, drawn over each other, in plots/ of the first.

    `smoothing` is the fraction of a run's logged steps that its smoothed line averages over.

    Raises:
        CheckpointError: a run has no logged step.
        ConfigError: the files cannot be written.
    """
    runs = read_runs(run_folders)
    panels = make_panels(runs)
    folder = Path(run_folders[0]) / "plots"
    picture, page = folder / "curves.png", folder / "curves.html"
    try:
        folder.mkdir(exist_ok=True)
        draw_curves(runs, panels, axis, smoothing, picture)
        page.write_text(curves_page(runs, panels, axis, smoothing), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error}. Free space, or draw a copy.") from error
    return [picture, page]
