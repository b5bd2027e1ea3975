"""What `partwise parts` and `partwise preview` show. Nothing is trained here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from partwise.config import Config, load_config
from partwise.data.page import preview_page, read_page_row
from partwise.data.preview import preview_example
from partwise.data.rows import row_name
from partwise.errors import ConfigError, DataError
from partwise.export.folder import final_folder
from partwise.lineage.chain import Link, shown_path, trace_lineage
from partwise.lineage.picture import draw_lineage
from partwise.model.load import empty_model
from partwise.model.parts import parts_table
from partwise.preflight import CHECKS, MODEL_CHECKS, check_id
from partwise.records import Dropped
from partwise.tables import format_count, held_lines, plan_table
from partwise.training.job import Job
from partwise.training.stages import open_job

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
    """What each part of the config's model does, in each stage."""
    if config.expanded_flags:
        console.print(config.expanded_flags)
    for stage in open_job(config).stages:
        if stage.name:
            console.print(f'stage "{stage.name}", {stage.num_steps} steps', highlight=False, markup=False)
        console.print(plan_table(stage.plan))
        for line in held_lines(stage.plan):
            console.print(line)


def print_lineage(folder: Path, verify: bool, picture: Path | None, console: Console) -> None:
    """What a folder was made from, as a tree: the folder first, its oldest ancestors last.

    Raises:
        CheckpointError: it is no model, adapter or run folder.
        ConfigError: the picture cannot be written.
    """
    link = trace_lineage(final_folder(folder), verify)
    for line in lineage_lines(link):
        console.print(line, soft_wrap=True)
    if picture:
        draw_lineage(link, picture)
        console.print(f"wrote {picture}")


def lineage_lines(link: Link, first: str = "", rest: str = "") -> Iterator[Text]:
    """Two lines for each folder, ancestors indented below; long ones are not cut, so paths stay whole."""
    record = link.record
    line = Text.assemble(first, (record["kind"], "bold"), f" {shown_path(record['path'])}")
    if fingerprint := record.get("fingerprint"):
        line.append(f" {fingerprint[:12]}", style="dim")
    if link.state != "here":
        line.append(f" {link.state}", style="green" if link.state == "unchanged" else "yellow")
    yield line
    bar = "│   " if link.parents else ""
    if told := lineage_facts(record):
        yield Text.assemble(rest, bar, (told, "dim"))
    for parent in link.parents:
        is_last = parent is link.parents[-1]
        yield from lineage_lines(
            parent, rest + ("└── " if is_last else "├── "), rest + ("    " if is_last else "│   ")
        )


def lineage_facts(record: dict[str, Any]) -> str:
    """Steps, modes, data, date and what was accepted, as far as the record says."""
    facts = [
        f"share {record['weight']:g}" if record.get("weight", 1) != 1 else "",
        f"{record['step']} steps" if "step" in record else "",
        ", ".join(f"{part} {mode}" for part, mode in record.get("modes", {}).items() if mode != "frozen"),
        ", ".join(Path(file).name for file in record.get("data", {}).get("files", ())),
        record.get("created", "")[:10],
        "on another base than its own, accepted" if record.get("accepted_base") else "",
    ]
    return "; ".join(filter(None, facts))


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
    example = job.pixel_format(conversation)
    if isinstance(example, Dropped):
        raise DataError(
            f"{row_name(conversation.source, conversation.row)}: training drops this row: {example.reason} "
            f"at data.max_seq_len {config.data.max_seq_len}. Raise the limit to see it."
        )
    console.print(
        preview_example(job.processor, conversation, example, job.pixel_format.media_token_ids),
        soft_wrap=True,
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
    page = preview_page(title, [read_page_row(job.rows, job.pixel_format, row) for row in shown])
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
