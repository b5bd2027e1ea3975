"""Training with a learning rate that grows from step to step: the run's own job, step and optimizer.

In: a Job, the rates and the parts that get them. Out: the loss after each of them. The model is opened anew
for each sweep and let go of; no file is written.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn

from partwise.config import TrainConfig
from partwise.engine.device import free_memory, seed_everything
from partwise.model.parts import set_train_mode
from partwise.rates.suggest import Sweep, diverges
from partwise.records import PartsPlan
from partwise.training.job import Job
from partwise.training.optim import Optimizer
from partwise.training.step import NonFiniteError, read_outcomes, train_step


class SweepOptimizer(Optimizer):
    """The run's optimizer, but for the rate: one for all parts that are swept, zero for the others."""

    def __init__(
        self,
        model: nn.Module,
        plan: PartsPlan,
        train: TrainConfig,
        rates: Sequence[float],
        parts: Sequence[str],
    ) -> None:
        super().__init__(model, plan, train, len(rates))
        self.rates = rates
        groups = self.adamw.param_groups
        for part in self.names:
            mine = [group for group in groups if group["part"] == part]
            highest = max(group["peak"] for group in mine)
            for group in mine:  # layers of a part keep their rates beside each other
                group["peak"] = group["peak"] / highest if part in parts else 0.0

    def _factor(self, step: int) -> float:
        return self.rates[min(step, len(self.rates) - 1)]


def sweep_rates(job: Job, rates: Sequence[float], parts: Sequence[str]) -> Sweep:
    """One step with each rate on the run's first rows, until the loss diverges.

    Raises:
        PlanError: nothing trains.
        DataError: a row cannot be used.
    """
    free_memory()  # of the sweep before: a model holds itself
    loaded = job.open_model()
    optimizer = SweepOptimizer(loaded.model, job.plan, job.config.train, rates, parts)
    set_train_mode(loaded.model, job.plan)
    losses: list[float] = []
    # A step's loss is that of the weights before its update: one step more shows what the last rate did.
    for step_data in job.loader.iterate(0, len(rates) + 1):
        seed_everything(job.config.train.seed, step_data.step + 1, 0)
        try:
            outcome = train_step(loaded.model, step_data, optimizer, job.device)
            losses.append(read_outcomes([outcome])[0].loss)
        except NonFiniteError:
            losses.append(math.inf)
        if len(losses) > 1 and diverges(losses, len(rates)):
            break
    has_diverged = diverges(losses, len(rates))
    return Sweep(tuple(parts), tuple(rates[: len(losses) - 1]), tuple(losses[1:]), losses[0], has_diverged)
