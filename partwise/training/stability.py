"""Has a stage's loss come to rest? Decided from the numbers in metrics.jsonl, and written there.

In: the logged steps of a stage. Out: the decision to end it, with the numbers that it rests on. Only steps
that train.log_every asks for count, not those that are logged for a checkpoint or an evaluation: so the same
steps decide whatever else a run does, and a resumed run, which reads them again, decides alike.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from partwise.config import StableConfig
from partwise.engine.ranks import Ranks
from partwise.records import StepMetrics
from partwise.training.span import StageSpan

STEPS, STABLE, MAX_STEPS = "its steps are done", "stable", "max_steps"
PATIENCE = "no better evaluation"


@dataclass(frozen=True)
class Decision:
    """A stage, or a run without stages, ends after `step`. `slope` and `spread` are None where they were not
    asked for, or there are not as many logged steps as the window has."""

    step: int
    name: str
    steps: int
    reason: str
    window: int | None = None
    slope: float | None = None
    spread: float | None = None

    @property
    def record(self) -> dict[str, Any]:
        """Of metrics.jsonl."""
        numbers = {"window": self.window, "slope": self.slope, "spread": self.spread}
        known = {key: value for key, value in numbers.items() if value is not None}
        return {"step": self.step, "stage_end": self.reason, "stage_steps": self.steps, **known}

    @property
    def text(self) -> str:
        what = f'stage "{self.name}"' if self.name else "training"
        text = f"{what} ends after {self.steps} steps: {self.reason}"
        if self.slope is None or self.spread is None:
            return text
        return (
            f"{text}; over the last {self.window} logged steps the loss changes by {self.slope:+.2%} of "
            f"itself, and the gradient norm spreads over {self.spread:.2f} of its median"
        )


class Ending:
    """When a stage ends. `records` are the run's, of which those of the stage so far are read."""

    def __init__(
        self, span: StageSpan, records: Iterable[Mapping[str, Any]], log_every: int, ranks: Ranks
    ) -> None:
        self.span = span
        self.log_every = log_every
        self.ranks = ranks
        size = span.until.window if span.until else 0
        self.losses: deque[float] = deque(maxlen=size)
        self.norms: deque[float] = deque(maxlen=size)
        for record in records:
            if "loss" in record and record["step"] > span.first_step:
                self._keep(record["step"], record["loss"], record["grad_norm"])

    def see(self, metrics: StepMetrics) -> Decision | None:
        """The decision after a logged step; None where the stage goes on. All ranks must call it."""
        if not self.span.name:
            return None
        self._keep(metrics.step, metrics.loss, metrics.grad_norm)
        # Numbers of other ranks may differ in their last digits, and a stage must end on all of them.
        return self.ranks.from_first(self._decide(metrics.step))

    def _keep(self, step: int, loss: float, grad_norm: float) -> None:
        if step % self.log_every == 0:
            self.losses.append(loss)
            self.norms.append(grad_norm)

    def _decide(self, step: int) -> Decision | None:
        until, steps = self.span.until, step - self.span.first_step
        ends = step == self.span.last_step
        if until is None:
            return Decision(step, self.span.name, steps, STEPS) if ends else None
        is_full = len(self.losses) == until.window
        slope = relative_slope(self.losses) if is_full else None
        spread = relative_spread(self.norms) if is_full else None
        counts = step % self.log_every == 0 and steps >= until.min_steps
        if counts and slope is not None and spread is not None and is_stable(slope, spread, until):
            return Decision(step, self.span.name, steps, STABLE, until.window, slope, spread)
        return Decision(step, self.span.name, steps, MAX_STEPS, until.window, slope, spread) if ends else None


def is_stable(slope: float, spread: float, until: StableConfig) -> bool:
    return abs(slope) <= until.slope and spread <= until.spread


def relative_slope(losses: Sequence[float]) -> float:
    """How far the line through the losses goes up or down from first to last, over their mean.

    It is the least-squares line, which smooths all of them at once. Worked example: 4, 3, 2, 1 falls by 3 and
    has the mean 2.5: -1.2.
    """
    size, mean = len(losses), statistics.fmean(losses)
    slope = statistics.linear_regression(range(size), losses).slope
    return slope * (size - 1) / mean if mean else 0.0


def relative_spread(norms: Sequence[float]) -> float:
    """How wide the middle half of the gradient norms is, over their median."""
    low, middle, high = statistics.quantiles(norms, n=4, method="inclusive")
    return (high - low) / middle if middle else 0.0
