"""docs/performance.md and its plot, from benchmarks/results/speed.jsonl and what page.md says by hand.

Usage: python -m benchmarks.speed.report; writes both. A test holds that the page is what the rows give. Of
rows of one cell, contender, hardware and number of GPUs, the newest counts; one that failed does not take the
place of one that measured.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.speed.cells import CELLS
from benchmarks.speed.contenders import OURS, TITLES
from benchmarks.speed.floor import floor_tokens_per_second

ROOT = Path(__file__).parents[2]
ROWS = ROOT / "benchmarks/results/speed.jsonl"
DEMO_ROWS = ROOT / "benchmarks/results/demo.jsonl"
PAGE = ROOT / "docs/performance.md"
PLOT = ROOT / "docs/performance.png"
TEMPLATE = Path(__file__).with_name("page.md")

Row = dict[str, Any]


def main() -> None:
    rows = read_rows(ROWS)
    PAGE.write_text(page(rows, read_rows(DEMO_ROWS)))
    if measured(rows):
        draw(rows, PLOT)


def read_rows(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def newest(rows: Iterable[Row]) -> list[Row]:
    """One row for each cell, contender, hardware and number of GPUs, in the order of the cells."""
    found: dict[tuple[Any, ...], Row] = {}
    for row in sorted(rows, key=lambda row: row["date"]):
        key = (row["cell"], row["contender"], row["hardware"], row["num_gpus"])
        if "error" not in row or "error" in found.get(key, row):
            found[key] = row
    names, contenders = list(CELLS), list(TITLES)
    known = [row for row in found.values() if row["cell"] in CELLS and not row["cell"].startswith("tiny")]
    return sorted(
        known,
        key=lambda row: (
            names.index(row["cell"]),
            row["hardware"],
            row["num_gpus"],
            contenders.index(row["contender"]),
        ),
    )


def measured(rows: Iterable[Row]) -> list[Row]:
    return [row for row in newest(rows) if "error" not in row]


def fastest_rival(row: Row, rows: Sequence[Row]) -> Row | None:
    """Of the contenders with a right mask on the same hardware, in the row's cell or its rivals'."""
    cell = CELLS[row["cell"]].rivals or row["cell"]
    rivals = [
        other
        for other in rows
        if other["cell"] == cell
        and other["contender"] != OURS
        and other["mask_is_right"]
        and (other["hardware"], other["num_gpus"]) == (row["hardware"], row["num_gpus"])
    ]
    return max(rivals, key=lambda other: other["tokens_per_second"], default=None)


def ratio(row: Row, rows: Sequence[Row]) -> float | None:
    """Partwise's rate over that of the fastest other contender with a right mask."""
    rival = fastest_rival(row, rows)
    if row["contender"] != OURS or rival is None:
        return None
    return row["tokens_per_second"] / rival["tokens_per_second"]


def page(rows: Sequence[Row], demo: Sequence[Row] = ()) -> str:
    return TEMPLATE.read_text().format(
        summary=summary(rows) + demo_line(demo), cells=cell_table(), results=result_tables(rows)
    )


def summary(rows: Sequence[Row]) -> str:
    found = measured(rows)
    ratios = [(row, value) for row in found if (value := ratio(row, found)) is not None]
    if not ratios:
        return ""
    (low, least), (high, most) = (pick(ratios, key=lambda pair: pair[1]) for pick in (min, max))
    return (
        f"![tokens per second]({PLOT.name})\n\nIn {len(ratios)} comparisons Partwise trains {least:.1f} "
        f"({low['cell']}) to {most:.1f} ({high['cell']}) times as many tokens a second as the fastest other "
        "contender with a right mask.\n\n"
    )


def demo_line(demo: Sequence[Row]) -> str:
    if not demo:
        return ""
    row = max(demo, key=lambda row: row["date"])
    return (
        f"`make demo` takes {row['total_seconds']:.0f} s on {row['hardware']} with {row['num_cores']} cores, "
        f"{row['training_seconds']:.0f} s of it `partwise train` (`python -m benchmarks.demo`, commit "
        f"{row['commit']}).\n\n"
    )


@cache
def cell_table() -> str:
    lines = ["| cell | what | rows a step | floor, tokens/s | goal, tokens/s |", "|---|---|---|---|---|"]
    for name, cell in CELLS.items():
        if name.startswith("tiny"):
            continue
        goal = f"{cell.goal:,}" if cell.goal else "-"
        floor = f"{round(floor_tokens_per_second(cell, num_rows=2000), -2):,.0f}"
        lines.append(f"| {name} | {cell.title} | {cell.rows_per_step} | {floor} | {goal} |")
    return "\n".join(lines) + "\n"


def result_tables(rows: Sequence[Row]) -> str:
    found = newest(rows)
    if not found:
        return "Nothing is measured yet: `benchmarks/results/speed.jsonl` has no rows.\n"
    tables = [result_table(found, hardware) for hardware in dict.fromkeys(row["hardware"] for row in found)]
    return "\n".join(tables)


def result_table(rows: Sequence[Row], hardware: str) -> str:
    lines = [
        f"### {hardware}\n",
        "| cell | contender | GPUs | tokens/s | of the floor | goal | peak GiB | micro-batch | mask "
        "| times the fastest other |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    good = [row for row in rows if "error" not in row]
    notes = []
    for row in rows:
        if row["hardware"] != hardware:
            continue
        head = f"| {row['cell']} | {TITLES[row['contender']]} | {row['num_gpus']} |"
        if "error" in row:
            lines.append(f"{head} - | - | - | - | - | - | - |")
            notes.append(f"- {row['cell']}, {TITLES[row['contender']]}: {escape(row['error'])}")
            continue
        lines.append(f"{head} {' | '.join(figures(row, good))} |")
        notes += remarks(row)
    told = "\n" + "\n".join(dict.fromkeys(notes)) + "\n" if notes else ""
    return "\n".join(lines) + "\n" + told


def figures(row: Row, rows: Sequence[Row]) -> list[str]:
    goal = CELLS[row["cell"]].goal
    against = ratio(row, rows)
    times = f"{against:.2f}" if against is not None else ""
    reached = (
        f"{row['tokens_per_second'] / goal / row['num_gpus']:.0%}"
        if goal and row["contender"] == OURS
        else ""
    )
    checkpointing = ", checkpointing" if row["gradient_checkpointing"] else ""
    return [
        f"{row['tokens_per_second']:,}",
        f"{row['floor_fraction']:.0%}",
        reached,
        f"{row['peak_memory_bytes'] / 2**30:.1f}",
        f"{row['micro_batch_size']}{checkpointing}",
        {True: "right", False: "**wrong**", None: "unknown"}[row["mask_is_right"]],
        times,
    ]


def remarks(row: Row) -> list[str]:
    name = f"- {row['cell']}, {TITLES[row['contender']]}"
    told = [f"{name}: {escape(row['warning'])}"] if "warning" in row else []
    if not row["mask_is_right"]:
        told.append(f"{name}: {escape(row['mask_reason'])}")
    if "scaling" in row and row["num_gpus"] > 1:
        told.append(f"{name}, {row['num_gpus']} GPUs: {row['scaling']:.2f} times one GPU")
    return told


def escape(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def draw(rows: Sequence[Row], path: Path) -> None:
    """A group of bars for each cell on the hardware with most rows; the floor as a line over each group."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = [row for row in measured(rows) if row["num_gpus"] == 1]
    machines = [row["hardware"] for row in found]
    hardware = max(dict.fromkeys(machines), key=machines.count)
    found = [row for row in found if row["hardware"] == hardware]
    cells = list(dict.fromkeys(row["cell"] for row in found))
    contenders = [name for name in TITLES if any(row["contender"] == name for row in found)]
    width = 0.8 / len(contenders)
    figure, axis = plt.subplots(figsize=(max(7, 1.4 * len(cells)), 4.2), layout="constrained")
    for index, contender in enumerate(contenders):
        mine = [row for row in found if row["contender"] == contender]
        where = [cells.index(row["cell"]) + (index - (len(contenders) - 1) / 2) * width for row in mine]
        bars = axis.bar(where, [row["tokens_per_second"] for row in mine], width, label=TITLES[contender])
        for bar, row in zip(bars, mine, strict=True):
            bar.set_hatch("" if row["mask_is_right"] else "////")
    for index, cell in enumerate(cells):
        floor = next(row["floor_tokens_per_second"] for row in found if row["cell"] == cell)
        axis.hlines(floor, index - 0.4, index + 0.4, color="black", linewidth=1)
    axis.set_xticks(range(len(cells)), cells)
    axis.set(
        ylabel="tokens per second", title=f"{hardware}; black: the floor; hatched: mask not known to be right"
    )
    axis.grid(axis="y", alpha=0.3)
    figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=len(contenders))
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
