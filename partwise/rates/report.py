"""What `partwise find-lr` prints and writes: a table, lines for the config, a picture and the numbers.

In: a config and what to sweep. Out: suggestions; find-lr.png and find-lr.json in a folder beside the run's.
The run's folder is left as it is, also where there is none: training takes an empty one only.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from partwise.config import Config
from partwise.config.document import write_yaml
from partwise.errors import ConfigError
from partwise.plots.rates import draw_sweep
from partwise.rates.suggest import Suggestion, Sweep, growing_rates, smooth_losses, suggest_rate
from partwise.rates.sweep import sweep_rates
from partwise.tables import describe_mode
from partwise.training.job import Job
from partwise.training.stages import open_job

LEAST_STEPS = 20


def find_rates(
    config: Config,
    console: Console,
    num_steps: int = 100,
    low: float = 1e-7,
    high: float = 1.0,
    together: bool = False,
    out: Path | None = None,
) -> dict[str, Suggestion]:
    """The suggestion for each part that trains: each with the others standing, or all `together`.

    Raises:
        ConfigError: the bounds are none, or the folder cannot be written.
        UserError: as training would.
    """
    if num_steps < LEAST_STEPS:
        raise ConfigError(f"--steps {num_steps}: a range test needs at least {LEAST_STEPS}.")
    if not 0 < low < high:
        raise ConfigError(f"--low {low:g} --high {high:g}: give two rates above 0, the lower one first.")
    job = open_job(config, only_looks=True)
    parts = [part.part for part in job.plan.parts if part.trainable]
    groups = [parts] if together else [[part] for part in parts]
    rates = growing_rates(low, high, num_steps)
    found: list[tuple[Sweep, Suggestion]] = []
    for group in groups:
        console.print(f"sweeping {' and '.join(group)} from {low:g} to {high:g} in {num_steps} steps")
        sweep = sweep_rates(job, rates, group)
        found.append((sweep, suggest_rate(sweep, num_steps)))
    suggestions = {part: suggestion for sweep, suggestion in found for part in sweep.parts}
    console.print(rates_table(job, suggestions))
    for line in remarks(suggestions, together):
        console.print(line, soft_wrap=True)
    if text := config_lines(config, suggestions):
        console.print(f"for the config:\n{text}", markup=False)
    folder = out or Path(f"{config.output.rstrip('/')}-find-lr")
    for path in write_files(folder, job, found, num_steps):
        console.print(f"wrote {path}", soft_wrap=True)
    return suggestions


def rates_table(job: Job, suggestions: dict[str, Suggestion]) -> Table:
    """Each part's rate now and the suggested one; the loss before and at its bottom, and where that was."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("part", "mode"):
        table.add_column(name, no_wrap=True)
    for name in ("now", "loss", "bottom", "diverges", "suggested"):
        table.add_column(name, justify="right", no_wrap=True)
    for part, found in suggestions.items():
        plan = job.plan[part]
        table.add_row(
            part,
            describe_mode(plan).partition(" on ")[0],
            show_rate(plan.learning_rate),
            f"{found.start_loss:.3g} to {found.bottom_loss:.3g}",
            show_rate(found.bottom_rate),
            "-" if found.diverged_rate is None else show_rate(found.diverged_rate),
            "-" if found.rate is None else show_rate(found.rate),
        )
    return table


def show_rate(rate: float) -> str:
    """Two digits: 2e-05, 0.0042."""
    return f"{rate:.2g}"


def remarks(suggestions: dict[str, Suggestion], together: bool) -> list[str]:
    """What the table cannot say: a suggestion that is missing, or of a curve that was cut off."""
    lines = []
    for part, found in suggestions.items():
        if found.rate is None:
            lines.append(
                f"{part}: no rate made the loss fall by more than it varies from step to step. Give more "
                "--steps or a larger train.global_batch_size."
            )
        elif found.is_open:
            lines.append(f"{part}: the loss still fell at the highest rate. Raise --high.")
    if len(suggestions) > 1 and not together:
        lines.append("each part was swept alone; --together sweeps them at once, with one rate for all")
    return lines


def config_lines(config: Config, suggestions: dict[str, Suggestion]) -> str:
    """The config's `parts` with the suggested rates; "" where there is none."""
    if all(found.rate is None for found in suggestions.values()):
        return ""
    written = config.parts.model_dump(mode="json", exclude_unset=True, exclude_none=True)
    for part, found in suggestions.items():
        if found.rate is not None:
            settings = written[part] if isinstance(written[part], dict) else {"mode": written[part]}
            written[part] = {**settings, "learning_rate": found.rate}
    return write_yaml({"parts": written}).rstrip()


def write_files(
    folder: Path, job: Job, found: Sequence[tuple[Sweep, Suggestion]], num_steps: int
) -> list[Path]:
    picture, numbers = folder / "find-lr.png", folder / "find-lr.json"
    records = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for sweep, suggestion in found:
            losses = [loss for loss in sweep.losses if math.isfinite(loss)]
            smoothed = smooth_losses(losses, num_steps)
            records.append(
                {
                    "parts": sweep.parts,
                    "now": {part: job.plan[part].learning_rate for part in sweep.parts},
                    "rates": sweep.rates[: len(losses)],
                    "losses": losses,
                    "smoothed": smoothed,
                    **asdict(suggestion),
                }
            )
        numbers.write_text(json.dumps(records, indent=1) + "\n")
        draw_sweep(records, picture)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error}. Name another folder with --out.") from error
    return [picture, numbers]
