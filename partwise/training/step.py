"""One optimizer step, and the evaluation loss: the only code between the data and `backward`.

In: one step's micro-batches. Out: the mean loss over the step's target tokens and the gradient norms, left
on the device until somebody reads them, so that the host need not wait. The model never computes its own
loss: most classes average per micro-batch, and the accumulated result would be another one.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from partwise.data.pixels import restore_pixels
from partwise.engine.single import Engine
from partwise.errors import TrainingError
from partwise.model.attention import takes_packs
from partwise.model.flash import PackLayout
from partwise.model.transfer import to_device
from partwise.records import Batch, StepData
from partwise.training.optim import Optimizer
from partwise.training.watch import Observed, observe_gradients, observe_update

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from partwise.data.loader import StepLoader
    from partwise.training.preference import Preference
    from partwise.training.share import Shares


class NonFiniteError(TrainingError):
    """A step's loss or gradient is not finite. `step` counts from zero; `values` are its numbers by name."""

    def __init__(self, text: str, step: int, values: dict[str, float]) -> None:
        super().__init__(text)
        self.step = step
        self.values = values


@dataclass(frozen=True)
class StepOutcome:
    """What a step gave: `values`, fp64, are the loss, what `told` names, and each part's gradient norm."""

    step: int
    values: Tensor
    parts: tuple[str, ...]
    rows: tuple[str, ...]
    num_input_tokens: int
    num_target_tokens: int
    dropped: Counter[str]
    observed: Observed | None = None
    told: tuple[str, ...] = ()


@dataclass(frozen=True)
class StepValues:
    """A step's numbers on the host: the mean loss, the global gradient norm and the norm of each part."""

    loss: float
    grad_norm: float
    grad_norms: dict[str, float]
    preference: dict[str, float]


def train_step(
    model: PreTrainedModel,
    step_data: StepData,
    optimizer: Optimizer,
    device: torch.device,
    observe: bool = False,
    preference: Preference | None = None,
) -> StepOutcome:
    """Forward and backward over all micro-batches, then one update.

    The loss and its gradients are those of the mean over the step's target tokens, or with `preference` over
    its answers, however the rows are split into micro-batches.

    Raises:
        TrainingError: a tensor of a part that this step must reach has never had a gradient.
    """
    if preference is None:
        told = accumulate_loss(model, step_data, device, optimizer.engine)[None]
    else:
        told = preference.accumulate(model, step_data, device, optimizer.engine)
    optimizer.collect()
    gradients = observe_gradients(optimizer) if observe else None
    norms = optimizer.update(step_data.step, told[0])
    check_reached(optimizer, step_data)
    return StepOutcome(
        step=step_data.step,
        values=torch.cat([told, torch.stack(list(norms.values())).to(told)]),
        parts=tuple(norms),
        told=() if preference is None else preference.metrics,
        rows=step_data.rows,
        num_input_tokens=step_data.num_input_tokens,
        num_target_tokens=step_data.num_target_tokens,
        dropped=step_data.dropped,
        observed=observe_update(optimizer, gradients) if gradients else None,
    )


def accumulate_loss(
    model: PreTrainedModel, step_data: StepData, device: torch.device, engine: Engine | None = None
) -> Tensor:
    """Forward and, where there is a graph, backward over micro-batches: the mean over all target tokens.

    The loss of a rank is its share of the mean: over all ranks, shares and gradients are summed.
    """
    engine = engine or Engine()
    total = torch.zeros((), device=device, dtype=torch.float64)
    for batch in step_data.batches:
        loss = batch_loss_sum(model, batch, device, engine) / step_data.num_target_tokens
        engine.backward(loss)
        total += loss.detach()
    return engine.ranks.sum(total)


def batch_loss_sum(
    model: PreTrainedModel, batch: Batch, device: torch.device, engine: Engine | None = None
) -> Tensor:
    """Summed token loss of one micro-batch: scalar on the device, with its graph."""
    engine = engine or Engine()
    return engine.loss_sum(model, model_inputs(model, batch, device, engine.dtype), batch.labels)


def model_inputs(
    model: PreTrainedModel, batch: Batch, device: torch.device, dtype: torch.dtype | None = None
) -> dict[str, Any]:
    """The keyword arguments of the model's forward, on the device; pixels in `dtype`, or the model's."""
    dtype = dtype or model.dtype
    is_real = batch.document_ids >= 0
    tensors = {
        "input_ids": batch.input_ids,
        # A mask of four axes is handed on as it is: of a pack, transformers makes no mask.
        "attention_mask": is_real.long() if batch.pack is None else is_real[:, None, None],
        **batch.token_fields,
        **batch.media,
    }
    if batch.position_ids is not None:
        tensors["position_ids"] = batch.position_ids
    inputs: dict[str, Any] = {
        name: to_device(tensor, device, dtype if tensor.is_floating_point() else None)
        for name, tensor in tensors.items()
    }
    if batch.pixels is not None:
        inputs |= restore_pixels({name: inputs.pop(name) for name in batch.media}, batch.pixels, dtype)
    if batch.pack is not None:
        assert takes_packs(model), "the documents of a pack would see each other"
        inputs["pack"] = PackLayout.of(batch.pack, device)
    return {**inputs, "use_cache": False}


def check_reached(optimizer: Optimizer, step_data: StepData) -> None:
    """A text-only step cannot reach the vision side; every other step must reach all that trains."""
    has_media = any(batch.media for batch in step_data.batches)
    for part, names in optimizer.names.items():
        missing = [name for name in names if name in optimizer.never_reached]
        if missing and (has_media or part == "language_model"):
            some = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
            raise TrainingError(
                f"step {step_data.step + 1}: no gradient has reached {len(missing)} of the {len(names)} "
                f"tensors of {part} that the plan trains: {some}. They would stay as they are without a "
                "word; freeze them with a layer range."
            )


def read_outcomes(outcomes: Sequence[StepOutcome]) -> list[StepValues]:
    """The outcomes' numbers; the host waits for the device once.

    Raises:
        NonFiniteError: a loss or gradient norm is not finite; names the first such step, its parts and rows.
    """
    values = torch.stack([outcome.values for outcome in outcomes]).tolist()
    return [read_values(outcome, row) for outcome, row in zip(outcomes, values, strict=True)]


def read_values(outcome: StepOutcome, row: list[float]) -> StepValues:
    loss, told = row[0], dict(zip(outcome.told, row[1:], strict=False))
    norms = dict(zip(outcome.parts, row[1 + len(told) :], strict=True))
    if not all(math.isfinite(value) for value in row):
        more = len(outcome.rows) - 4
        rows = ", ".join(outcome.rows[:4]) + (f" and {more} more" if more > 0 else "")
        raise NonFiniteError(
            f"step {outcome.step + 1}: the loss is {loss:.6g} and the gradient norms are "
            f"{', '.join(f'{norm:.6g} in {part}' for part, norm in norms.items())}; the rows are {rows}. "
            "Nothing was saved after it. Look at these rows, lower the learning rate or lengthen the "
            "warm-up, and resume from the newest checkpoint.",
            outcome.step,
            {"loss": loss, **{f"gradient norm of {part}": norm for part, norm in norms.items()}},
        )
    return StepValues(loss, math.hypot(*norms.values()), norms, told)


@torch.no_grad()
def evaluate_loss(
    model: PreTrainedModel,
    loader: StepLoader | Shares,
    device: torch.device,
    is_stopped: Callable[[], bool] = lambda: False,
    engine: Engine | None = None,
) -> float | None:
    """Mean loss over all target tokens of the loader's rows, once each; modules' modes are kept.

    None where `is_stopped` said so before the last row, on any rank. `loader` are shares where there are
    several.

    Raises:
        DataError: a step of the loader has no target token.
    """
    engine = engine or Engine()
    total, num_target_tokens = torch.zeros((), device=device, dtype=torch.float64), 0
    with eval_mode(model):
        for step_data in loader.iterate(0, loader.steps_per_epoch):
            if engine.ranks.any(is_stopped()):
                return None
            for batch in step_data.batches:
                total += batch_loss_sum(model, batch, device, engine)
            num_target_tokens += step_data.num_target_tokens
    return engine.ranks.sum(total).item() / num_target_tokens


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """A block in which no module is in training mode; each module has its own mode back afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
