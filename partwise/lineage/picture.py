"""A folder and its ancestors as a picture: the oldest at the top, arrows to what was made from it.

In: a Link. Out: a PNG or SVG file. Drawing only; what is known of the folders is chain.py's business.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from partwise.errors import ConfigError
from partwise.lineage.chain import Link, shown_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = {"model": "#d9d9d9", "full": "#b9dcb4", "adapter": "#b4cfe8", "merged": "#f3d9a4"}
WIDTH, HEIGHT, GAP = 6.2, 0.9, 0.5  # of a box, and between boxes, in inches
LINE_CHARACTERS = 70


def draw_lineage(link: Link, path: Path) -> None:
    """Writes the picture. Raises: ConfigError when the file cannot be written, or has another ending."""
    from matplotlib.figure import Figure

    places = dict(place_links(link))
    num_columns = 1 + max(column for column, _ in places.values())
    depth = max(row for _, row in places.values())
    figure = Figure(figsize=(num_columns * (WIDTH + GAP), (depth + 1) * (HEIGHT + GAP)), layout="constrained")
    axes = figure.add_subplot()
    axes.set_axis_off()
    axes.set_xlim(-GAP / 2, num_columns * (WIDTH + GAP) - GAP / 2)
    axes.set_ylim(-(depth + 1) * (HEIGHT + GAP), 0)
    draw_links(axes, link, places, depth)
    try:
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--picture {path} cannot be written: {error}. Name a .png or .svg file."
        ) from error


def place_links(link: Link, column: int = 0, row: int = 0) -> Iterator[tuple[int, tuple[int, int]]]:
    """id of a link -> its column and its generation, the folder itself being generation 0."""
    yield id(link), (column, row)
    for i, parent in enumerate(link.parents):
        below = list(place_links(parent, column + i, row + 1))
        column = max([column, *(place[0] - i for _, place in below)])
        yield from below


def draw_links(axes: Axes, link: Link, places: dict[int, tuple[int, int]], depth: int) -> tuple[float, float]:
    """Boxes and arrows of a link and its ancestors; the middle of the link's upper edge."""
    from matplotlib.patches import FancyBboxPatch

    column, row = places[id(link)]
    left, top = column * (WIDTH + GAP), -(depth - row) * (HEIGHT + GAP) - GAP / 2
    color = COLORS.get(link.record["kind"], "white")
    style: dict[str, Any] = {"boxstyle": "round,pad=0,rounding_size=0.1", "facecolor": color}
    axes.add_patch(FancyBboxPatch((left, top - HEIGHT), WIDTH, HEIGHT, edgecolor="#555555", **style))
    for i, text in enumerate(box_lines(link)):
        weight = "bold" if i == 0 else "normal"
        axes.text(left + 0.15, top - 0.22 - 0.26 * i, text, fontsize=9, fontweight=weight, va="center")
    for parent in link.parents:
        middle, upper = draw_links(axes, parent, places, depth)
        axes.annotate(
            "",
            xy=(left + WIDTH / 2, top),
            xytext=(middle, upper - HEIGHT),
            arrowprops={"arrowstyle": "-|>", "color": "#555555"},
        )
    return left + WIDTH / 2, top


def box_lines(link: Link) -> list[str]:
    """Kind and folder; what trained; the fingerprint."""
    record = link.record
    trained = ", ".join(
        f"{part} {mode}" for part, mode in record.get("modes", {}).items() if mode != "frozen"
    )
    steps = f"{record['step']} steps" if "step" in record else ""
    fingerprint = f"weights {record['fingerprint'][:12]}" if "fingerprint" in record else ""
    share = f"share {record['weight']:g}" if record.get("weight", 1) != 1 else ""
    state = link.state if link.state != "here" else ""
    return [
        f"{record['kind']}: {shorten(shown_path(record['path']))}",
        "; ".join(filter(None, (steps, trained))),
        "; ".join(filter(None, (fingerprint, share, state))),
    ]


def shorten(path: str) -> str:
    """The end of a path that is too long for a box."""
    return path if len(path) <= LINE_CHARACTERS else f"…{path[1 - LINE_CHARACTERS :]}"
