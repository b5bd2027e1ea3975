"""Two models on the same rows: by how much the means differ, and how sure that is.

In: two judgements. Out: a Difference for each judge, over the rows that both have. Rows are resampled in
pairs: what makes a row hard is the same for both models, and cancels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

import numpy as np

from partwise.evaluation.judgement import Judgement

NUM_RESAMPLES = 10_000
CHUNK = 100  # resamples at a time: memory stays small for many rows


@dataclass(frozen=True)
class Difference:
    """Means of both, their difference with its 95 % interval, and where scores are all 0 or 1 how many rows
    only one of them has right, with McNemar's exact p; None elsewhere."""

    base: float
    tuned: float
    low: float
    high: float
    num_rows: int
    only_base: int | None = None
    only_tuned: int | None = None
    p_value: float | None = None

    @property
    def difference(self) -> float:
        return self.tuned - self.base


def compare(base: Judgement, tuned: Judgement) -> dict[str, Difference]:
    """By judge; empty where no row was judged for both."""
    known = {sample.place: sample.scores for sample in base.samples}
    pairs = [(known[s.place], s.scores) for s in tuned.samples if s.place in known]
    if not pairs:
        return {}
    return {
        judge: difference_of([one[judge] for one, _ in pairs], [other[judge] for _, other in pairs])
        for judge in tuned.judges
    }


def difference_of(base: Sequence[float], tuned: Sequence[float], seed: int = 0) -> Difference:
    """Of paired scores.

    Source: the percentile bootstrap of Efron and Tibshirani 1993, chapter 13; McNemar 1947, exact by the
    binomial distribution.
    """
    before, after = np.array(base, dtype=float), np.array(tuned, dtype=float)
    low, high = bootstrap_interval(after - before, seed)
    difference = Difference(float(before.mean()), float(after.mean()), low, high, len(before))
    if not set(np.unique([before, after])) <= {0.0, 1.0}:
        return difference
    only_base, only_tuned = (
        int(((before == 1) & (after == 0)).sum()),
        int(((before == 0) & (after == 1)).sum()),
    )
    return Difference(
        *(difference.base, difference.tuned, low, high, len(before)),
        only_base=only_base,
        only_tuned=only_tuned,
        p_value=mcnemar(only_base, only_tuned),
    )


def bootstrap_interval(differences: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """Between which 95 % of the means of resampled rows lie."""
    rng = np.random.default_rng(seed)
    size = len(differences)
    means = [
        differences[rng.integers(0, size, (CHUNK, size))].mean(axis=1) for _ in range(NUM_RESAMPLES // CHUNK)
    ]
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return float(low), float(high)


def mcnemar(only_base: int, only_tuned: int) -> float:
    """How likely a split at least so uneven is if both are equally good: two-sided, 1 where none differs.

    Of 1 against 5 it is 2 * (1 + 6) / 64 = 0.21875.
    """
    total, fewer = only_base + only_tuned, min(only_base, only_tuned)
    return min(1.0, 2 * sum(comb(total, k) for k in range(fewer + 1)) / 2**total)
