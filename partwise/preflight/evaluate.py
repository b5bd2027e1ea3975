"""Can the model be judged as the section `evaluate` says?

In: a Context. Out: findings about the metrics, and about the rows that are asked: a sample of them, or all.
Each metric is tried on the reference answers; nothing is generated.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from partwise.data.sources import Rows
from partwise.errors import DataError
from partwise.evaluation.judgement import Asking
from partwise.evaluation.questions import Question, asking_order, read_question
from partwise.preflight.context import Context
from partwise.preflight.rows import SHOWN_ERRORS
from partwise.records import Finding
from partwise.training.evaluations import Schedule, make_asking


def check_evaluate(context: Context) -> list[Finding]:
    """The metrics of `evaluate` exist, and the rows that are asked have answers.

    Raises:
        ConfigError: a metric is unknown, or a function cannot be loaded.
        DataError: a data file is missing or broken.
    """
    config, rows = context.config, context.job.eval_rows
    asking, where = make_asking(config), config.where("evaluate")
    if asking is None or rows is None:
        return []
    questions, faults = read_questions(rows, asking, context.max_rows)
    if not faults:
        faults = judge_faults(asking, questions[0])
    if faults:
        return [Finding("evaluate", "error", text, where) for text in faults[:SHOWN_ERRORS]]
    asked = min(len(rows), asking.max_rows or len(rows))
    if findings := [*idle_findings(context, questions, len(questions) == asked)]:
        return findings
    schedule, num_steps = Schedule(config, context.job.num_steps), context.job.num_steps
    number = sum(schedule.judges_at(done) for done in range(1, num_steps + 1))
    times = "once, at the end" if number == 1 else f"{number:,} times"
    text = f"{asked:,} of {len(rows):,} rows are asked {times}, judged by {', '.join(asking.judges)}"
    if asking.budget_seconds is not None:
        text += f", in about {asking.budget_seconds:g} s each time at the most"
    return [Finding("evaluate", "info", text, where, values={"num_evaluations": number})]


def read_questions(rows: Rows, asking: Asking, max_rows: int | None) -> tuple[list[Question], list[str]]:
    """The rows that would be asked first, `max_rows` at the most, and what is wrong with others of them."""
    questions, faults = [], []
    for place in asking_order(len(rows), asking.max_rows, asking.seed)[:max_rows]:
        try:
            questions.append(read_question(rows, place, asking.group_by))
        except DataError as error:
            faults.append(str(error))
    return questions, faults


def judge_faults(asking: Asking, question: Question) -> list[str]:
    """Of the functions that do not even judge a reference answer."""
    faults = []
    for judge in asking.judges.values():
        try:
            judge(question.references[0], question)
        except DataError as error:
            faults.append(str(error))
    return faults


def idle_findings(context: Context, questions: list[Question], are_all: bool) -> Iterator[Finding]:
    """Settings that these rows leave without effect: surely, if they are all that are asked."""
    level: Literal["error", "warning"] = "error" if are_all else "warning"
    settings, where = context.config.evaluate, context.config.where
    assert settings is not None
    key = settings.group_by
    if key is not None and not any(key in question.fields for question in questions):
        keys = ", ".join(questions[0].fields)
        text = f'evaluate.group_by: no row that was read has the key "{key}". The first one has {keys}'
        yield Finding("evaluate", level, text, where("evaluate.group_by"), "Choose one of its keys.")
    if settings.control and not any(question.prompt.images for question in questions):
        text = "evaluate.control: true has no effect: no row that was read asks about an image"
        yield Finding("evaluate", level, text, where("evaluate.control"), "Remove it.")
