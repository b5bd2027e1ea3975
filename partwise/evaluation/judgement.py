"""Rows -> a judgement: every answer with its scores, and the means of these.

In: what answers prompts, rows, and judges. Out: a Judgement. Rows are asked in batches, in the order that the
seed shuffles; a budget of seconds ends it between two batches, and what was judged by then is a fair sample.
How answers are made is generate.py's business, how they are judged that of metrics.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from partwise.data.sources import Rows
from partwise.evaluation.generate import Answerer
from partwise.evaluation.judges import Judge
from partwise.evaluation.questions import CONTROLS, Question, asking_order, blank, read_question, swapped

Scores = dict[str, float]


@dataclass(frozen=True)
class Sample:
    """A question, its answer and the scores by judge; `controls` the same for each control that was asked."""

    place: int
    row: str
    question: str
    references: tuple[str, ...]
    answer: str
    scores: Scores
    group: str = ""
    controls: dict[str, tuple[str, Scores]] = field(default_factory=dict)

    def to_record(self) -> dict[str, Any]:
        """As a line of samples.jsonl."""
        group = {"group": self.group} if self.group else {}
        controls = {
            name: {"answer": answer, "scores": scores} for name, (answer, scores) in self.controls.items()
        }
        return {
            "row": self.row,
            "question": self.question,
            "references": list(self.references),
            "answer": self.answer,
            "scores": self.scores,
            **group,
            **({"controls": controls} if controls else {}),
        }


@dataclass(frozen=True)
class Judgement:
    """Samples in the order of the rows, out of `num_rows` that were to be asked; seconds include reading."""

    judges: tuple[str, ...]
    samples: tuple[Sample, ...]
    num_rows: int
    seconds: float

    @property
    def scores(self) -> Scores:
        """The mean of each judge over all samples."""
        return self.mean(sample.scores for sample in self.samples)

    @property
    def groups(self) -> dict[str, list[Sample]]:
        """Samples by group, in alphabetical order."""
        names = sorted({sample.group for sample in self.samples})
        return {name: [s for s in self.samples if s.group == name] for name in names}

    @property
    def controlled(self) -> list[Sample]:
        """The samples of which all controls were asked."""
        return [sample for sample in self.samples if len(sample.controls) == len(CONTROLS)]

    @property
    def control_scores(self) -> dict[str, Scores]:
        """Mean scores with the right images, others' images and blank ones, over the same rows."""
        asked = self.controlled
        if not asked:
            return {}
        right = {"right": self.mean(sample.scores for sample in asked)}
        return right | {name: self.mean(s.controls[name][1] for s in asked) for name in CONTROLS}

    def mean(self, scores: Iterable[Mapping[str, float]]) -> Scores:
        listed = list(scores)
        return {judge: sum(one[judge] for one in listed) / len(listed) for judge in self.judges}


@dataclass(frozen=True)
class Asking:
    """What is asked and how it is judged. `max_rows` None asks all, without end if there is no budget."""

    judges: Mapping[str, Judge]
    max_rows: int | None = None
    batch_size: int = 16
    group_by: str | None = None
    control: bool = False
    budget_seconds: float | None = None
    seed: int = 0


def judge_rows(
    answer: Answerer,
    rows: Rows,
    asking: Asking,
    rank: int = 0,
    num_ranks: int = 1,
    is_stopped: Callable[[], bool] = lambda: False,
    show: Callable[[int, int], None] = lambda judged, total: None,
) -> Judgement:
    """Ask and judge; of several ranks, each does its share and `join_shares` joins them. `is_stopped` is
    asked before each batch but the first, and `show` told after each how many rows are judged of how many.

    Raises:
        DataError: a row is broken, or a judge refuses an answer.
    """
    start = time.monotonic()
    order = asking_order(len(rows), asking.max_rows, asking.seed)
    samples: list[Sample] = []
    mine = range(rank, len(order), num_ranks)
    for first in range(0, len(mine), asking.batch_size):
        seconds = time.monotonic() - start
        is_late = asking.budget_seconds is not None and seconds >= asking.budget_seconds
        if samples and (is_late or is_stopped()):
            break
        samples += judge_batch(answer, rows, order, mine[first : first + asking.batch_size], asking)
        show(len(samples), len(mine))
    return make_judgement(asking, samples, len(order), time.monotonic() - start)


def join_shares(asking: Asking, shares: Sequence[Judgement]) -> Judgement:
    """What all ranks judged."""
    samples = [sample for share in shares for sample in share.samples]
    return make_judgement(asking, samples, shares[0].num_rows, max(share.seconds for share in shares))


def make_judgement(asking: Asking, samples: list[Sample], num_rows: int, seconds: float) -> Judgement:
    ordered = sorted(samples, key=lambda sample: sample.place)
    return Judgement(tuple(asking.judges), tuple(ordered), num_rows, seconds)


def judge_batch(
    answer: Answerer, rows: Rows, order: Sequence[int], positions: Sequence[int], asking: Asking
) -> list[Sample]:
    """The samples of these positions in `order`; controls are batches of their own."""
    questions = [read_question(rows, order[position], asking.group_by) for position in positions]
    answers = answer([question.prompt for question in questions])
    controls: list[dict[str, tuple[str, Scores]]] = [{} for _ in questions]
    if asking.control:
        pairs = {
            i: (other, blank(question))
            for i, (position, question) in enumerate(zip(positions, questions, strict=True))
            if question.prompt.images and (other := swapped(rows, order, position, question))
        }
        for kind, name in enumerate(CONTROLS) if pairs else ():
            texts = answer([pair[kind] for pair in pairs.values()])
            for i, text in zip(pairs, texts, strict=True):
                controls[i][name] = (text, score(asking, text, questions[i]))
    return [
        Sample(
            place=question.place,
            row=question.name,
            question=question.text,
            references=question.references,
            answer=text,
            scores=score(asking, text, question),
            group=question.group,
            controls=asked,
        )
        for question, text, asked in zip(questions, answers, controls, strict=True)
    ]


def score(asking: Asking, text: str, question: Question) -> Scores:
    return {name: judge(text, question) for name, judge in asking.judges.items()}
