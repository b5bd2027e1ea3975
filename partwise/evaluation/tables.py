"""Judgements as tables for the terminal. In: judgements. Out: rich tables. Nothing is printed here."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table

from partwise.evaluation.comparison import Difference
from partwise.evaluation.judgement import Judgement

CONTROL_TITLES = {"right": "right image", "swapped": "swapped image", "blank": "blank image"}


def judgement_tables(
    judgement: Judgement, group_by: str | None = None, loss: float | None = None
) -> dict[str, Table]:
    """All tables of a judgement by their titles."""
    tables = {"scores": scores_table(judgement, loss)}
    if group_by is not None:
        tables[f"by {group_by}"] = groups_table(judgement, group_by)
    if judgement.control_scores:
        tables["does the model look at the image?"] = control_table(judgement)
    return tables


def scores_table(judgement: Judgement, loss: float | None = None) -> Table:
    table = make_table("metric", "mean")
    for name, value in judgement.scores.items():
        table.add_row(name, f"{value:.3f}")
    if loss is not None:
        table.add_row("loss", f"{loss:.4f}")
    return table


def groups_table(judgement: Judgement, group_by: str) -> Table:
    table = make_table(group_by, *judgement.judges, "rows")
    for group, samples in judgement.groups.items():
        means = judgement.mean(sample.scores for sample in samples)
        table.add_row(group, *(f"{value:.3f}" for value in means.values()), str(len(samples)))
    return table


def control_table(judgement: Judgement) -> Table:
    """The same questions about the right image, another row's, and a blank one."""
    table = make_table("metric", *CONTROL_TITLES.values(), "rows")
    scores, number = judgement.control_scores, str(len(judgement.controlled))
    for judge in judgement.judges:
        table.add_row(judge, *(f"{scores[kind][judge]:.3f}" for kind in CONTROL_TITLES), number)
    return table


def comparison_table(differences: Mapping[str, Difference]) -> Table:
    """`base : this` counts the rows that only one of them has right, and p is McNemar's."""
    table = make_table("metric", "base", "this", "difference,\n95 % interval", "only base\n: this", "p")
    for judge, d in differences.items():
        counts = ("", "") if d.p_value is None else (f"{d.only_base} : {d.only_tuned}", f"{d.p_value:.2g}")
        difference = f"{d.difference:+.3f}\n{d.low:+.3f} to {d.high:+.3f}"
        table.add_row(judge, f"{d.base:.3f}", f"{d.tuned:.3f}", difference, *counts)
    return table


def make_table(first: str, *others: str) -> Table:
    table = Table()
    table.add_column(first, overflow="fold")
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def judged_line(judgement: Judgement) -> str:
    """ "360 of 1,080 rows judged in 12.3 s"; all of them where no budget ended it."""
    number = len(judgement.samples)
    rows = (
        f"{number:,} rows" if number == judgement.num_rows else f"{number:,} of {judgement.num_rows:,} rows"
    )
    ended = "" if number == judgement.num_rows else ", when the budget of seconds was spent"
    return f"{rows} judged in {judgement.seconds:.1f} s{ended}"
