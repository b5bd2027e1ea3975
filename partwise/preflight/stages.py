"""The checks of a run in stages: once what is the run's, for each stage what is the stage's.

In: checks and the Context of a run. Out: their findings, in which those of a stage name it, and a forecast of
all stages as a table. Rows that stages share are read once. Where there are no stages, a check is itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

from rich.table import Table

from partwise.errors import UserError
from partwise.preflight.context import Context
from partwise.records import Finding
from partwise.tables import format_bytes, format_count, format_seconds

Check = Callable[[Context], list[Finding]]


def find_all(check: Check, context: Context, of_stage: bool, of_rows: bool) -> list[Finding]:
    """What the check says of the run, or of each stage; `of_rows`: of each stage with rows of its own.

    Raises:
        UserError: as the check.
    """
    if not of_stage or not context.job.stages[0].name:
        return check(context)
    stages = [stage for stage in context.stages if not of_rows or stage.like is None]
    return [finding for stage in stages for finding in find_named(check, stage)]


def find_named(check: Check, stage: Context) -> list[Finding]:
    """What the check says of one stage, named where there are several. Raises: UserError, named as well."""
    name = stage.job.name
    if not name:
        return check(stage)
    told = f'stage "{name}": '
    try:
        found = check(stage)
    except UserError as error:
        if str(error).startswith('stage "'):
            raise  # it names the stage that it is about, which may be another
        raise type(error)(f"{told}{error}") from error
    return [replace(f, message=told + f.message, values={**f.values, "stage": name}) for f in found]


def forecast(context: Context, findings: Iterable[Finding]) -> Table | None:
    """What each stage trains, and what it takes, and all of them; None where there are no stages."""
    if not context.job.stages[0].name:
        return None
    table, found = Table(), list(findings)
    table.add_column("stage")
    table.add_column("trains")
    for name in ("steps", "trainable", "memory", "time"):
        table.add_column(name, justify="right", no_wrap=True)
    peaks = [value_of(found, "memory", stage, "peak_bytes") for stage in context.stages]
    times = [value_of(found, "time", stage, "seconds") for stage in context.stages]
    for stage, peak, seconds in zip(context.stages, peaks, times, strict=True):
        table.add_row(
            stage.job.name,
            ", ".join(trained(stage)),
            f"{'at most ' if stage.job.span.until else ''}{stage.job.num_steps:,}",
            format_count(sum(part.num_trainable for part in stage.job.plan.parts)),
            "?" if peak is None else format_bytes(peak),
            "?" if seconds is None else format_seconds(seconds),
        )
    table.add_section()
    table.add_row(
        "all",
        "",
        f"{context.job.num_steps:,}",
        format_count(sum(part.num_trainable for part in context.job.plan.parts)),
        "?" if None in peaks else format_bytes(max(filter(None, peaks), default=0)),
        "?" if None in times else format_seconds(sum(filter(None, times))),
    )
    return table


def trained(stage: Context) -> Iterator[str]:
    """The parts that train in the stage, with their layers."""
    for part in stage.job.plan.parts:
        settings = stage.config.parts.settings(part.part)
        if part.trainable and settings is not None:
            yield f"{part.part} {settings.mode}" + (f" {settings.layers}" if settings.layers else "")


def value_of(findings: Sequence[Finding], check: str, stage: Context, key: str) -> float | None:
    values = [f.values for f in findings if f.check == check and f.values.get("stage") == stage.job.name]
    return next((found[key] for found in values if key in found), None)
