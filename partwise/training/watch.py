"""Is each part learning? Numbers of the logged steps, and warnings from how they develop.

In: the optimizer around its update, then each logged step's metrics. Out: the share of exactly-zero gradients
and the update-to-weight ratio per part, left on the device, and an Alarm the first time that a part stops
learning, the loss jumps, a projector hardly moves, or steps wait for rows. Nothing here changes the training.
"""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import accumulate, groupby
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from partwise.records import StepMetrics
from partwise.training.adamw import PIECE
from partwise.training.optim import Optimizer

HISTORY = 100  # logged steps that a value is compared with
LEAST_HISTORY = 10
PATIENCE = 5  # logged steps in a row
PROJECTOR_PATIENCE = 20
COLLAPSED_GRADIENT = 1e-6  # of the part's own median
COLLAPSED_UPDATE = 1e-3  # of the part's own median, per unit of learning rate
STILL_PROJECTOR = 1e-3  # of the least update ratio of the other parts
MOST_WAIT_FRACTION, LEAST_WAIT_SECONDS = 0.02, 0.01  # of a step and in it; less is not worth a process more
SOLVED_LOSS = 1e-3  # below it, gradients vanish because nothing is left to learn


@dataclass(frozen=True)
class Observed:
    """Of the parts that a step reached: zero-gradient shares, then update ratios, (2, parts)."""

    parts: tuple[str, ...]
    values: Tensor


@dataclass(frozen=True)
class Gradients:
    """The names that have a gradient, per part, and the share of their elements that are zero, (parts,)."""

    names: dict[str, list[str]]
    zero_fractions: Tensor


@dataclass(frozen=True)
class Alarm:
    kind: str
    part: str
    message: str


def observe_gradients(optimizer: Optimizer) -> Gradients | None:
    """What to know of the gradients before the update takes them; None where the step has none."""
    reached = {
        part: [name for name in names if optimizer.masters[name].grad is not None]
        for part, names in optimizer.names.items()
    }
    reached = {part: names for part, names in reached.items() if names}
    if not reached:
        return None
    return Gradients(reached, torch.stack([zero_fraction(optimizer, names) for names in reached.values()]))


def zero_fraction(optimizer: Optimizer, names: list[str]) -> Tensor:
    gradients = [optimizer.masters[name].grad for name in names]
    nonzero = torch.stack(list(counts_nonzero(gradients))).sum()
    size = torch.full_like(nonzero, sum(gradient.numel() for gradient in gradients))
    nonzero, size = optimizer.engine.total(torch.stack([nonzero, size]))
    return 1 - nonzero.double() / size


def counts_nonzero(tensors: Sequence[Tensor]) -> Iterator[Tensor]:
    """Scalars whose sum is how many elements are not zero, fp64. Small tensors are counted many at a time.

    Their signs are another tensor, whose sum of absolute values is exact in fp32 up to PIECE.
    """
    small = [tensor for tensor in tensors if tensor.numel() < PIECE]
    yield from (t.count_nonzero().double() for t in tensors if t.numel() >= PIECE)
    places = [total // PIECE for total in accumulate(tensor.numel() for tensor in small)]
    for _, group in groupby(zip(places, small, strict=True), key=itemgetter(0)):
        signs = torch._foreach_sign([tensor for _, tensor in group])
        yield torch.stack(torch._foreach_norm(signs, 1)).double().sum()


@torch.no_grad()
def observe_update(optimizer: Optimizer, gradients: Gradients) -> Observed:
    """The observation of a step after its update."""
    ratios = [update_ratio(optimizer, names) for names in gradients.names.values()]
    return Observed(tuple(gradients.names), torch.stack([gradients.zero_fractions, torch.stack(ratios)]))


def update_ratio(optimizer: Optimizer, names: list[str]) -> Tensor:
    """Norm of a part's last update, without weight decay, over the norm of its weights."""
    weights = torch.nn.utils.get_total_norm([optimizer.masters[name] for name in names])
    norms = torch.stack([optimizer.update_norm(names).double(), weights.double()])
    update, weight = optimizer.engine.total_norms(norms)
    return update / weight.clamp(min=1e-30)


# What a record of a step may have of it: answers are told of by preference losses alone, and where there are
# stages, a record has the name of its stage besides.
METRICS = tuple(field.name for field in fields(StepMetrics))


class Watch:
    """Alarms from the logged steps, once for each kind and part.

    `records` are those of metrics.jsonl so far: a resumed run knows what the run before it saw and said.
    """

    def __init__(self, records: Iterable[dict[str, Any]] = ()) -> None:
        self.losses: deque[float] = deque(maxlen=HISTORY)
        self.grad_norms: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=HISTORY))
        self.updates: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=HISTORY))
        self.seconds: deque[tuple[float, float]] = deque(maxlen=2 * LEAST_HISTORY)  # waiting, and of the step
        self.in_a_row: Counter[tuple[str, str]] = Counter()
        self.told: set[tuple[str, str]] = set()
        for record in records:
            if "warning" in record:
                self.told.add((record["warning"], record["part"]))
            elif "update_ratios" in record:
                self._see(StepMetrics(**{key: record[key] for key in METRICS if key in record}))

    def see(self, metrics: StepMetrics) -> list[Alarm]:
        """The alarms that this step gives rise to."""
        new = [w for w in self._see(metrics) if (w.kind, w.part) not in self.told]
        self.told |= {(warning.kind, warning.part) for warning in new}
        return new

    def _see(self, metrics: StepMetrics) -> list[Alarm]:
        self.seconds.append((metrics.data_wait_seconds, metrics.step_seconds))
        found = [
            *self._loss_spike(metrics),
            *self._stopped_parts(metrics),
            *self._still_projector(metrics),
            *self._waiting(),
        ]
        self.losses.append(metrics.loss)
        for part, ratio in metrics.update_ratios.items():
            self.grad_norms[part].append(metrics.grad_norms[part])
            self.updates[part].append(per_rate(metrics, part, ratio))
        return found

    def _loss_spike(self, metrics: StepMetrics) -> Iterator[Alarm]:
        recent = list(self.losses)[-2 * LEAST_HISTORY :]
        if len(recent) < LEAST_HISTORY:
            return
        usual = statistics.median(recent)
        spread = statistics.median(abs(loss - usual) for loss in recent)
        if metrics.loss > max(2 * usual, usual + 1, usual + 10 * spread):
            yield Alarm(
                "loss spike",
                "",
                f"the loss is {metrics.loss:.4g}, and the median of the {len(recent)} logged steps before is "
                f"{usual:.4g}. Look at the rows of this step; if it does not come back, lower the learning "
                "rate.",
            )

    def _stopped_parts(self, metrics: StepMetrics) -> Iterator[Alarm]:
        for part, ratio in metrics.update_ratios.items():
            if len(self.updates[part]) < LEAST_HISTORY:
                continue
            norm, usual_norm = metrics.grad_norms[part], statistics.median(self.grad_norms[part])
            update, usual_update = per_rate(metrics, part, ratio), statistics.median(self.updates[part])
            collapsed = norm <= COLLAPSED_GRADIENT * usual_norm or update <= COLLAPSED_UPDATE * usual_update
            if self._lasts("part stopped", part, collapsed and metrics.loss > SOLVED_LOSS, PATIENCE):
                yield Alarm(
                    "part stopped",
                    part,
                    f"{part} has stopped learning {PATIENCE} logged steps ago: its gradient norm is "
                    f"{norm:.3g} (median so far {usual_norm:.3g}), its update-to-weight ratio {ratio:.3g}. "
                    f"Lower its learning rate (parts.{part}.learning_rate) and start from an earlier "
                    "checkpoint.",
                )

    def _still_projector(self, metrics: StepMetrics) -> Iterator[Alarm]:
        ratios = dict(metrics.update_ratios)
        mine, others = ratios.pop("projector", None), ratios.values()
        if mine is None or not others:
            return
        is_still = mine < STILL_PROJECTOR * min(others)
        if self._lasts("projector still", "projector", is_still, PROJECTOR_PATIENCE):
            yield Alarm(
                "projector still",
                "projector",
                f"projector trains, but hardly moves: its update-to-weight ratio is {mine:.3g}, the least of "
                f"the other parts {min(others):.3g}, for {PROJECTOR_PATIENCE} logged steps now. Raise "
                "parts.projector.learning_rate, or freeze it.",
            )

    def _waiting(self) -> Iterator[Alarm]:
        if len(self.seconds) < 2 * LEAST_HISTORY:
            return
        # Without the longest wait: workers that start are waited for once. Else, some steps wait for all.
        usual = sorted(self.seconds)[:-1]
        waiting, whole = (statistics.mean(seconds) for seconds in zip(*usual, strict=True))
        if waiting > max(MOST_WAIT_FRACTION * whole, LEAST_WAIT_SECONDS):
            yield Alarm(
                "waiting for rows",
                "",
                f"the last {len(self.seconds)} logged steps waited {waiting / whole:.0%} of their time for "
                f"rows, {waiting:.2g} s each. Raise data.num_workers, as far as this machine has cores, or "
                "scale large images down once.",
            )

    def _lasts(self, kind: str, part: str, holds: bool, patience: int) -> bool:
        """Whether it has held for so many logged steps in a row."""
        self.in_a_row[kind, part] = self.in_a_row[kind, part] + 1 if holds else 0
        return self.in_a_row[kind, part] >= patience


def per_rate(metrics: StepMetrics, part: str, ratio: float) -> float:
    """An update ratio freed from the schedule."""
    return ratio / metrics.learning_rates[part]
