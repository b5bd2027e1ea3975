"""Losses under a growing learning rate -> the rate to train with.

In: a rate and a loss for each step. Out: where the smoothed loss came to its bottom, where it diverged, and a
tenth of the first as the suggestion.

Source: the range test, Smith, "Cyclical Learning Rates for Training Neural Networks", arXiv 1506.01186; a
tenth of the rate at the lowest loss, Gugger, "How Do You Find A Good Learning Rate", which fastai's lr_find
calls "minimum". Its other rule, the steepest point, is one of a derivative, which noise moves far more. Where
the bottom is flat its lowest point is chance: here the bottom begins at 95 % of the fall.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from partwise.plots.curves import smooth

SMOOTHED_FRACTION = 0.12  # of the steps, that the smoothed loss averages over
START_FRACTION = 0.15  # of the steps, at rates too low to train: what the loss is and how it varies
LEAST_START = 4
LAST_LOSSES = 4  # whose mean says whether the loss diverges
DIVERGED_FRACTION, DIVERGED_LOSS = 0.1, 0.1  # above the loss at the start: a share of it, and nats
FALL = 3.0  # deviations of a smoothed loss that a fall must exceed to be one
BOTTOM_FRACTION = 0.95  # of the fall from the start to the lowest smoothed loss
SAFETY = 10.0


@dataclass(frozen=True)
class Sweep:
    """One range test: `losses[i]` is the loss after the step with `rates[i]`, until it diverged.

    `first_loss` is the loss before the first step. The last loss of a sweep that diverged may be infinite.
    """

    parts: tuple[str, ...]
    rates: tuple[float, ...]
    losses: tuple[float, ...]
    first_loss: float
    has_diverged: bool


@dataclass(frozen=True)
class Suggestion:
    """`rate` is a tenth of `bottom_rate`, None where the loss did not fall at any rate.

    `is_open`: it fell up to the highest one.
    """

    rate: float | None
    start_loss: float
    bottom_loss: float
    bottom_rate: float
    diverged_rate: float | None
    is_open: bool


def growing_rates(low: float, high: float, num_steps: int) -> tuple[float, ...]:
    """From `low` to `high` by equal factors."""
    return tuple(low * (high / low) ** (i / (num_steps - 1)) for i in range(num_steps))


def start_level(losses: Sequence[float], num_steps: int) -> tuple[float, float]:
    """Mean and deviation of the first losses of a sweep of so many steps."""
    first = losses[: max(LEAST_START, round(START_FRACTION * num_steps))]
    return statistics.fmean(first), statistics.pstdev(first)


def diverges(losses: Sequence[float], num_steps: int) -> bool:
    """Whether the loss is not finite, or its last ones lie clearly above where it began."""
    if not math.isfinite(losses[-1]):
        return True
    if len(losses) < max(LEAST_START, round(START_FRACTION * num_steps)) + LAST_LOSSES:
        return False
    level, deviation = start_level(losses, num_steps)
    margin = max(DIVERGED_FRACTION * abs(level), DIVERGED_LOSS, FALL * deviation / math.sqrt(LAST_LOSSES))
    return statistics.fmean(losses[-LAST_LOSSES:]) > level + margin


def suggest_rate(sweep: Sweep, num_steps: int) -> Suggestion:
    """What a sweep says that was planned for `num_steps`."""
    losses = [loss for loss in sweep.losses if math.isfinite(loss)]
    level, deviation = start_level([sweep.first_loss, *losses], num_steps)
    smoothed = smooth_losses(losses, num_steps)
    diverged = sweep.rates[len(sweep.losses) - 1] if sweep.has_diverged else None
    window = max(1.0, SMOOTHED_FRACTION * num_steps)
    lowest = min(range(len(smoothed)), key=smoothed.__getitem__)
    fall = level - smoothed[lowest]
    falls = fall > FALL * deviation / math.sqrt(window)
    bottom = next((i for i, loss in enumerate(smoothed) if loss <= level - BOTTOM_FRACTION * fall), lowest)
    return Suggestion(
        rate=round_rate(sweep.rates[bottom] / SAFETY) if falls else None,
        start_loss=level,
        bottom_loss=smoothed[bottom],
        bottom_rate=sweep.rates[bottom],
        diverged_rate=diverged,
        is_open=falls and not sweep.has_diverged and lowest >= len(smoothed) - window / 2,
    )


def smooth_losses(losses: Sequence[float], num_steps: int) -> list[float]:
    """Centred means, which lag behind no rate, over SMOOTHED_FRACTION of the steps that were planned."""
    fraction = SMOOTHED_FRACTION * num_steps / max(1, len(losses))
    return [loss for loss in smooth(losses, fraction) if loss is not None]


def round_rate(rate: float) -> float:
    """To two digits: a range test knows no more."""
    return float(f"{rate:.1e}")
