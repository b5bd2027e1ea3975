"""A judgement as files: samples.jsonl with every sample, and samples.html with images, to look at.

In: a judgement, its rows, and the tables that stand above them. Out: two files in a folder. The page needs
nothing else: images are data URLs, and there is no script.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rich.table import Table

from partwise.data.chat import read_pictures
from partwise.data.page import images_block, whole_page
from partwise.data.sources import Rows
from partwise.errors import TrainingError
from partwise.evaluation.judgement import Judgement, Sample, Scores
from partwise.evaluation.questions import read_question
from partwise.evaluation.tables import CONTROL_TITLES

SAMPLES_FILE, PAGE_FILE = "samples.jsonl", "samples.html"
# A page of more becomes too large to be sent to someone.
SHOWN_SAMPLES = 64

STYLE = """
table { border-collapse: collapse; margin: 1rem 0; background: var(--card); font-size: .95rem; }
caption { text-align: left; font-weight: 600; padding: .25rem 0; }
th, td { border: 1px solid var(--line); padding: .25rem .6rem; text-align: right; }
td { white-space: pre-line; }
th:first-child, td:first-child { text-align: left; }
section { border-left: 4px solid var(--line); }
section.right { border-left-color: #2e9e4f; }
section.wrong { border-left-color: #c8402f; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; margin: .75rem 0 0; }
dt { color: var(--dim); }
dd { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; }
dd.answer { font-weight: 600; }
dd small { color: var(--dim); font-weight: 400; }
"""


def write_report(
    folder: Path,
    title: str,
    judgement: Judgement,
    rows: Rows,
    tables: Mapping[str, Table],
    base: Judgement | None = None,
    step: int | None = None,
) -> None:
    """Both files, in the place of older ones. `tables` by their titles; `base` is another model's judgement
    of the same rows; `step` is of the training that asked.

    Raises:
        TrainingError: they cannot be written.
    """
    others = {sample.place: sample for sample in base.samples} if base else {}
    stamp = {} if step is None else {"step": step}
    records = [
        {**stamp, **sample.to_record(), **base_record(others.get(sample.place))}
        for sample in judgement.samples
    ]
    shown = judgement.samples[:: max(1, len(judgement.samples) // SHOWN_SAMPLES)][:SHOWN_SAMPLES]
    number = f"{len(shown)} of {len(judgement.samples):,} judged rows"
    blocks = [
        *(html_table(name, table) for name, table in tables.items()),
        f"<p>{number}. Green: every metric is 1; red: every metric is 0.</p>",
        *(section(sample, rows, others.get(sample.place)) for sample in shown),
    ]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lines = "".join(f"{json.dumps(record, ensure_ascii=False)}\n" for record in records)
        (folder / SAMPLES_FILE).write_text(lines, encoding="utf-8")
        (folder / PAGE_FILE).write_text(whole_page(title, blocks, STYLE), encoding="utf-8")
    except OSError as error:
        raise TrainingError(f"{folder} cannot be written: {error}. Choose another folder.") from error


def base_record(sample: Sample | None) -> dict[str, object]:
    return {} if sample is None else {"base": {"answer": sample.answer, "scores": sample.scores}}


def html_table(title: str, table: Table) -> str:
    """The table of the terminal as HTML."""
    columns = [list(map(str, column.cells)) for column in table.columns]
    head = "".join(f"<th>{html.escape(str(column.header))}</th>" for column in table.columns)
    body = "\n".join(
        f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>"
        for row in zip(*columns, strict=True)
    )
    return f"<table>\n<caption>{html.escape(title)}</caption>\n<tr>{head}</tr>\n{body}\n</table>"


def section(sample: Sample, rows: Rows, base: Sample | None) -> str:
    values = set(sample.scores.values())
    kind = "right" if values == {1.0} else "wrong" if values == {0.0} else ""
    entries = "\n".join(
        f'<dt>{html.escape(name)}</dt><dd class="{style}">{text}</dd>'
        for name, style, text in entries_of(sample, base)
    )
    pictures = images_of(sample, rows)
    return (
        f'<section class="{kind}">\n<h2>{html.escape(sample.row)}</h2>\n'
        + (f"{pictures}\n" if pictures else "")
        + f"<dl>\n{entries}\n</dl>\n</section>"
    )


def images_of(sample: Sample, rows: Rows) -> str:
    prompt = read_question(rows, sample.place).prompt
    pictures = [picture.pixels for picture in read_pictures(prompt)]
    named = [(image.where, picture) for image, picture in zip(prompt.images, pictures, strict=True)]
    return images_block(named) if named else ""


def entries_of(sample: Sample, base: Sample | None) -> Iterator[tuple[str, str, str]]:
    """(name, style, HTML) of each line below the images."""
    yield "question", "", html.escape(sample.question)
    yield ("reference" if len(sample.references) == 1 else "references"), "", joined(sample.references)
    yield "answer", "answer", scored(sample.answer, sample.scores)
    if base is not None:
        yield "base's answer", "", scored(base.answer, base.scores)
    for name, (answer, scores) in sample.controls.items():
        yield CONTROL_TITLES[name], "", scored(answer, scores)
    if sample.group:
        yield "group", "", html.escape(sample.group)


def joined(references: Sequence[str]) -> str:
    return html.escape(" | ".join(references))


def scored(answer: str, scores: Scores) -> str:
    shown = ", ".join(f"{name} {value:.3g}" for name, value in scores.items())
    return f"{html.escape(answer) or '(empty)'}  <small>{html.escape(shown)}</small>"
