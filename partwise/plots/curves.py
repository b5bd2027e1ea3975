"""metrics.jsonl -> the curves of runs, and which of them share a panel.

In: run folders. Out: numbers per logged step, and panels that picture.py and page.py draw alike: of one run a
line for each part, of several runs a panel for each part with a line for each run. Nothing is drawn here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any, Literal, NamedTuple

from partwise.errors import CheckpointError
from partwise.records import PART_NAMES
from partwise.training.metrics import METRICS_FILE, read_metrics

Axis = Literal["steps", "tokens"]

# A run's smoothed line averages over about this fraction of its logged steps.
SMOOTHING_FRACTION = 0.05

# Okabe and Ito's colours, which people with any colour vision tell apart; without yellow and black, which one
# of the page's two backgrounds would swallow. Dashes tell the lines apart without any colour.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#7f7f7f")
DASHES = ((), (7, 2), (2, 2), (8, 2, 2, 2))

PER_PART = {
    "grad_norms": "gradient norm",
    "update_ratios": "update / weights",
    "learning_rates": "learning rate",
}
WHOLE = {"memory": "peak memory (GiB)", "tokens_per_second": "input tokens per second"}


class Stage(NamedTuple):
    """A stretch of a run: its name, and the logged steps that it begins after and ends with."""

    name: str
    first: int
    last: int


@dataclass(frozen=True)
class Curves:
    """One run. `values` holds a number per logged step for each quantity, None where there is none.

    Those of parts are named "grad_norms/projector". `target_tokens` are those trained on until each step;
    between logged steps, as many as in the logged one. `evals` are (step, loss).
    """

    name: str
    steps: tuple[int, ...]
    target_tokens: tuple[int, ...]
    values: dict[str, list[float | None]]
    evals: tuple[tuple[int, float], ...]
    stages: tuple[Stage, ...]

    def place(self, axis: Axis, step: int) -> float:
        """Where a step lies on the axis; of a step that was not logged, the logged one before it."""
        if axis == "steps":
            return step
        done = [
            tokens for number, tokens in zip(self.steps, self.target_tokens, strict=True) if number <= step
        ]
        return done[-1] if done else 0

    @property
    def parts(self) -> list[str]:
        """The parts that train."""
        named = {key.partition("/")[2] for key in self.values}
        return [part for part in PART_NAMES if part in named]


@dataclass(frozen=True)
class Line:
    """`run` is the run's place among those that are drawn, `key` names its values."""

    run: int
    key: str
    label: str
    color: str
    dash: tuple[int, ...]


@dataclass(frozen=True)
class Panel:
    title: str
    is_log: bool
    lines: tuple[Line, ...]


def read_runs(run_folders: Sequence[Path]) -> list[Curves]:
    """Raises: CheckpointError where a run has no logged step."""
    names = [Path(folder).resolve().name for folder in run_folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in run_folders]
    return [read_curves(Path(folder), name) for folder, name in zip(run_folders, names, strict=True)]


def read_curves(run_folder: Path, name: str) -> Curves:
    """Raises: CheckpointError where the run has no logged step."""
    records = list(read_metrics(run_folder))
    steps = [record for record in records if "loss" in record]
    if not steps:
        raise CheckpointError(
            f"{run_folder / METRICS_FILE} has no logged step, so there is nothing to draw. "
            "Give the output folder of a run that has trained."
        )
    numbers = [record["step"] for record in steps]
    gaps = (after - before for before, after in zip([0, *numbers], numbers, strict=False))
    tokens = accumulate(gap * record["num_target_tokens"] for gap, record in zip(gaps, steps, strict=True))
    flat = [flatten(record) for record in steps]
    return Curves(
        name=name,
        steps=tuple(numbers),
        target_tokens=tuple(tokens),
        values={
            key: [values.get(key) for values in flat] for key in dict.fromkeys(k for v in flat for k in v)
        },
        evals=tuple((r["step"], r["eval_loss"]) for r in records if finite(r.get("eval_loss")) is not None),
        stages=tuple(find_stages(steps)),
    )


def flatten(record: Mapping[str, Any]) -> dict[str, float]:
    """What is drawn of a step's record; numbers that are not finite are left out."""
    found = {
        "loss": record["loss"],
        **{f"{kind}/{part}": v for kind in PER_PART for part, v in record.get(kind, {}).items()},
        "memory": record["peak_memory_bytes"] / 2**30,
        "tokens_per_second": record["num_input_tokens"] / max(record["step_seconds"], 1e-9),
    }
    return {key: value for key, value in found.items() if finite(value) is not None}


def finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def find_stages(steps: Sequence[Mapping[str, Any]]) -> Iterator[Stage]:
    """The stretches of logged steps with one `stage`; none of a run without stages."""
    before = 0
    for name, group in groupby(steps, key=lambda record: record.get("stage")):
        last = [record["step"] for record in group][-1]
        if name is not None:
            yield Stage(str(name), before, last)
        before = last


def make_panels(runs: Sequence[Curves]) -> list[Panel]:
    """The panels of these runs: the loss first; those of parts without any number are left out."""
    panels = [Panel("loss per target token (nats)", False, run_lines(runs, "loss"))]
    parts = [part for part in PART_NAMES if any(part in run.parts for run in runs)]
    for kind, title in PER_PART.items():
        keys = {part: f"{kind}/{part}" for part in parts}
        if len(runs) == 1:
            lines = (part_line(part, key) for part, key in keys.items() if key in runs[0].values)
            panels.append(Panel(f"{title} per part", True, tuple(lines)))
        else:
            panels += [Panel(f"{title}: {part}", True, run_lines(runs, key)) for part, key in keys.items()]
    panels += [Panel(title, False, run_lines(runs, key)) for key, title in WHOLE.items()]
    return [panel for panel in panels if panel.lines]


def run_lines(runs: Sequence[Curves], key: str) -> tuple[Line, ...]:
    return tuple(
        Line(i, key, run.name, COLORS[i % len(COLORS)], DASHES[i % len(DASHES)])
        for i, run in enumerate(runs)
        if key in run.values
    )


def part_line(part: str, key: str) -> Line:
    place = PART_NAMES.index(part)
    return Line(0, key, part, COLORS[place], DASHES[place])


def smooth(values: Sequence[float | None], fraction: float = SMOOTHING_FRACTION) -> list[float | None]:
    """Mean of each value and its neighbours on both sides, so that the line does not lag behind the values.

    The window spans about `fraction` of them and narrows evenly towards both ends. None counts nothing.
    """
    reach = round(fraction * len(values) / 2)
    sums = [0.0, *accumulate(value or 0.0 for value in values)]
    counts = [0, *accumulate(int(value is not None) for value in values)]
    smoothed: list[float | None] = []
    for index in range(len(values)):
        side = min(reach, index, len(values) - 1 - index)
        first, last = index - side, index + side + 1
        count = counts[last] - counts[first]
        smoothed.append((sums[last] - sums[first]) / count if count else None)
    return smoothed
