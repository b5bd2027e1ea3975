"""What `partwise parts` and `partwise preview` show. Nothing is trained here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from partwise.config import Config, load_config
from partwise.data.page import preview_page, read_page_row
from partwise.data.preview import preview_example
from partwise.data.rows import row_name
from partwise.errors import ConfigError, DataError
from partwise.model.load import empty_model
from partwise.model.parts import parts_table
from partwise.preflight import CHECKS, MODEL_CHECKS, check_id
from partwise.records import Dropped
from partwise.tables import format_count, held_lines, plan_table
from partwise.training.job import Job

# How many rows a page shows when none is chosen.
PAGE_ROWS = 8


def print_parts(source: str, trust_remote_code: bool, console: Console) -> None:
    """The parts of a model folder, or the plan of a config file; no weights are read."""
    if Path(source).suffix in (".yaml", ".yml"):
        print_plan(load_config(source), console)
        return
    model = empty_model(source, trust_remote_code)
    table = Table(
        title=f"{source}: {type(model).__name__}",
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    for name in ("part", "module", "parameters", "dtype", "layers"):
        table.add_column(
            name, justify="right" if name in ("parameters", "layers") else "left", overflow="fold"
        )
    total = 0
    for row in parts_table(model):
        total += row.num_parameters
        table.add_row(
            row.part,
            "\n".join(row.module_paths),
            format_count(row.num_parameters),
            ", ".join(row.dtypes),
            str(row.num_layers or "-"),
        )
    table.add_section()
    table.add_row("total", "", format_count(total))
    console.print(table)


def print_plan(config: Config, console: Console) -> None:
    """What each part of the config's model does."""
    plan = Job(config).plan
    if config.expanded_flags:
        console.print(config.expanded_flags)
    console.print(plan_table(plan))
    for line in held_lines(plan):
        console.print(line)


def print_checks(console: Console) -> None:
    """Every check: its id, and what it is about."""
    for check in (*CHECKS, *MODEL_CHECKS):
        about = (check.__doc__ or "").strip().splitlines()[0]
        console.print(f"{check_id(check):<12} {about}")


def print_preview(config: Config, row: int, console: Console) -> None:
    """One training row as the model sees it.

    Raises:
        DataError: there is no such row, or it cannot be used.
    """
    job = Job(config)
    require_rows(job, [row])
    conversation = job.rows[row]
    example = job.chat_format(conversation)
    if isinstance(example, Dropped):
        raise DataError(
            f"{row_name(conversation.source, conversation.row)}: training drops this row: {example.reason} "
            f"at data.max_seq_len {config.data.max_seq_len}. Raise the limit to see it."
        )
    console.print(
        preview_example(job.processor, conversation, example, job.chat_format.media_token_ids), soft_wrap=True
    )


def write_preview(config: Config, rows: Sequence[int], path: Path) -> None:
    """An HTML page of these training rows, or of the first ones.

    Raises:
        DataError: there is no such row.
        ConfigError: the file cannot be written.
    """
    job = Job(config)
    require_rows(job, rows)
    shown = rows or range(min(PAGE_ROWS, len(job.rows)))
    title = f"{', '.join(config.data.train_files)}: {len(shown)} of {len(job.rows):,} rows"
    page = preview_page(title, [read_page_row(job.rows, job.chat_format, row) for row in shown])
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--html {path} cannot be written: {error}. Choose another file.") from error


def require_rows(job: Job, rows: Sequence[int]) -> None:
    """Raises: DataError where the training data has no such row."""
    for row in rows:
        if row >= len(job.rows):
            raise DataError(
                f"--row {row}: the training data has {len(job.rows)} rows. Choose 0 to {len(job.rows) - 1}."
            )
