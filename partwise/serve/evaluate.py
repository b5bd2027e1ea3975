"""Models judged by what they answer to rows of a file: one, or two on the same rows.

In: model, adapter or run folders, and data files. Out: a Judgement of each with its loss, tables on the
console, and samples.jsonl and samples.html in a folder. One model is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from peft import PeftModel
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from partwise.data.chat import ChatFormat
from partwise.data.loader import StepLoader
from partwise.data.sources import Rows, open_rows
from partwise.data.template import tokenizer_of
from partwise.engine.device import free_memory
from partwise.errors import ConfigError
from partwise.evaluation.comparison import compare
from partwise.evaluation.generate import make_answerer
from partwise.evaluation.judgement import Asking, Judgement, judge_rows
from partwise.evaluation.judges import load_judges
from partwise.evaluation.questions import asking_order
from partwise.evaluation.report import PAGE_FILE, SAMPLES_FILE, write_report
from partwise.evaluation.tables import comparison_table, judged_line, judgement_tables
from partwise.model.load import LoadedModel, media_token_ids
from partwise.serve.chat import open_chat
from partwise.training.step import evaluate_loss


@dataclass(frozen=True)
class EvalOptions:
    """What is measured. `max_rows` None is all rows; `with_loss` reads them once more, without generating."""

    metrics: tuple[str, ...] = ("exact_match",)
    max_rows: int | None = None
    max_new_tokens: int = 64
    batch_size: int = 16
    budget_seconds: float | None = None
    group_by: str | None = None
    control: bool = False
    with_loss: bool = True
    max_seq_len: int = 4096
    seed: int = 0
    dtype: str = "float32"
    trust_remote_code: bool = False
    accept_base: bool = False


@dataclass(frozen=True)
class Evaluation:
    """A model's judgement, its loss where it was asked for, and the other model's where there is one."""

    judgement: Judgement
    loss: float | None = None
    base: Evaluation | None = None


def evaluate(
    folder: str | Path,
    data: Sequence[str | Path],
    options: EvalOptions = EvalOptions(),
    baseline: str | Path | None = None,
    out: Path | None = None,
    console: Console | None = None,
) -> Evaluation:
    """Judge the model of `folder` on the rows of the files, and `baseline` on the same rows.

    Raises:
        CheckpointError: a folder cannot be loaded.
        ConfigError: a metric is unknown or cannot be loaded.
        DataError: a row is broken, or a metric refuses an answer.
        TrainingError: `out` cannot be written.
    """
    console = console or Console(quiet=True)
    rows = open_rows(data)
    check_group(rows, options)
    asking = Asking(
        judges=load_judges(options.metrics),
        max_rows=options.max_rows,
        batch_size=options.batch_size,
        group_by=options.group_by,
        control=options.control,
        budget_seconds=options.budget_seconds,
        seed=options.seed,
    )
    # The controls are about one model, not about what tuning changed.
    uncontrolled = replace(asking, control=False)
    base = None if baseline is None else judge_folder(baseline, rows, uncontrolled, options, console)
    free_memory()  # a model holds itself, and the next one needs the memory
    result = replace(judge_folder(folder, rows, asking, options, console), base=base)
    tables = judgement_tables(result.judgement, options.group_by, result.loss)
    if base is not None:
        tables[f"against {baseline}"] = against_table(result, base)
    if options.control and not result.judgement.controlled:
        console.print("no control: no row that was judged asks about an image that another row has not")
    for title, table in tables.items():
        console.print(title, style="bold")
        console.print(table)
    console.print(judged_line(result.judgement))
    if out is not None:
        title = f"{folder}: answers to {', '.join(map(str, data))}"
        write_report(out, title, result.judgement, rows, tables, base.judgement if base else None)
        console.print(f"wrote {out / SAMPLES_FILE} and {out / PAGE_FILE}")
    return result


def check_group(rows: Rows, options: EvalOptions) -> None:
    """Raises: ConfigError where no row that is asked has the key that tables are made by."""
    asked = asking_order(len(rows), options.max_rows, options.seed)
    if options.group_by and not any(options.group_by in rows.read(place)[2] for place in asked):
        keys = ", ".join(rows.read(0)[2])
        raise ConfigError(f'--group-by: no row has the key "{options.group_by}". The first one has {keys}.')


def against_table(result: Evaluation, base: Evaluation) -> Table:
    table = comparison_table(compare(base.judgement, result.judgement))
    if result.loss is not None and base.loss is not None:
        difference = f"{result.loss - base.loss:+.4f}"
        table.add_row("loss", f"{base.loss:.4f}", f"{result.loss:.4f}", difference, "", "")
    return table


def judge_folder(
    folder: str | Path, rows: Rows, asking: Asking, options: EvalOptions, console: Console
) -> Evaluation:
    loaded = open_chat(folder, options.dtype, options.trust_remote_code, options.accept_base)
    answer = make_answerer(loaded.model, loaded.processor, options.max_new_tokens)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(str(folder), total=None)
        judgement = judge_rows(
            answer, rows, asking, show=lambda done, of: progress.update(task, completed=done, total=of)
        )
    loss = loss_on(loaded, rows, options) if options.with_loss else None
    return Evaluation(judgement, loss)


def loss_on(loaded: LoadedModel, rows: Rows, options: EvalOptions) -> float | None:
    """The mean over all target tokens of the rows that are asked, as training computes it."""
    model = loaded.model
    if isinstance(model, PeftModel):
        model = model.get_base_model()  # with the adapters in its layers
    media_ids = media_token_ids(model.config, loaded.processor)
    chat_format = ChatFormat(loaded.processor, media_ids, options.max_seq_len, "truncate")
    asked = asking_order(len(rows), options.max_rows, options.seed)
    loader = StepLoader(
        [rows[place] for place in sorted(asked)],
        chat_format,
        tokenizer_of(loaded.processor).pad_token_id or 0,
        global_batch_size=options.batch_size,
        micro_batch_size=options.batch_size,
        seed=options.seed,
        num_workers=0,
        shuffle=False,
    )
    return evaluate_loss(model, loader, model.device)
