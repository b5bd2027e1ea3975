"""A step whose loss or gradient is not finite: where it began, and its rows as a small data file.

In: the model as it was before the step, and the step's data. Out: the first module whose output is not
finite, in words, and RUN/bad_batch/: rows.jsonl with its images (a data file like any other) and fault.json.
Nothing is mended, and the run ends afterwards.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from partwise.data.write import write_conversations
from partwise.engine.device import seed_everything
from partwise.errors import TrainingError
from partwise.model.compile import uncompiled
from partwise.records import Batch, Conversation, PartsPlan, StepData
from partwise.training.optim import Optimizer
from partwise.training.step import NonFiniteError, batch_loss_sum

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from partwise.data.loader import StepLoader

FOLDER = "bad_batch"
NO_ORIGIN = (
    "The same step, run again on the same weights, is finite, or only the sum of its gradients is not."
)


class FoundError(Exception):
    """Ends a forward pass at the first output that is not finite; the text says where."""


def explain_fault(
    fault: NonFiniteError,
    model: PreTrainedModel,
    plan: PartsPlan,
    optimizer: Optimizer,
    loader: StepLoader,
    seed: int,
    run_folder: Path,
) -> TrainingError:
    """The error to raise in place of `fault`: it says where the fault began, and where its rows lie."""
    ranks, step_data = optimizer.engine.ranks, loader.load_step(fault.step)
    seed_everything(seed, fault.step + 1, ranks.rank)
    if optimizer.engine.runs_together:
        origins = [f"Where it began is not searched for with engine {optimizer.engine.name}."]
    else:
        origins = ranks.gather(find_origin(model, plan, optimizer, step_data))
    origin = next((o for o in origins if o != NO_ORIGIN), origins[0])
    folder = run_folder / FOLDER
    if not ranks.is_first:
        return TrainingError(f"{fault} {origin}")
    record = {
        "step": fault.step + 1,
        "origin": origin,
        "values": {name: str(value) for name, value in fault.values.items()},
        "batches": [summarize_batch(batch) for batch in step_data.batches],
    }
    try:
        write_fault(folder, record, (loader.rows[row] for row in loader.step_rows(fault.step)))
        told = f"The rows lie in {folder}, ready to be used as data."
    except OSError as error:
        told = f"The rows could not be written to {folder}: {error}."
    return TrainingError(f"{fault} {origin} {told}")


def find_origin(model: PreTrainedModel, plan: PartsPlan, optimizer: Optimizer, step_data: StepData) -> str:
    """Where the step first went wrong, as sentences; the step is run again, on the weights before it."""
    broken = [name for name, p in model.named_parameters() if not p.isfinite().all()]
    weights = f" The weight {broken[0]} itself holds values that are not finite." if broken else ""
    num_target_tokens = sum(batch.num_target_tokens for batch in step_data.batches)
    for number, batch in enumerate(step_data.batches, start=1):
        where = f"in micro-batch {number} of {len(step_data.batches)} ({', '.join(batch.rows[:4])})"
        try:
            with uncompiled(), stopping_hooks(model, plan):
                loss = batch_loss_sum(model, batch, model.device) / num_target_tokens
        except FoundError as found:
            return f"It began {found}, {where}.{weights}"
        if not loss.isfinite():
            return f"It began in the loss itself, {where}: all modules gave finite values.{weights}"
        if loss.grad_fn is not None:
            loss.backward()
        if origin := gradient_origin(plan, optimizer):
            return f"It began in the backward pass, {origin}, {where}; all values forward are finite."
    optimizer.adamw.zero_grad(set_to_none=True)
    return NO_ORIGIN


def gradient_origin(plan: PartsPlan, optimizer: Optimizer) -> str:
    """The last trained tensor whose gradient is not finite: backward goes through the model from its end."""
    for name in reversed(list(optimizer.masters)):
        gradient = optimizer.masters[name].grad
        if gradient is not None and not gradient.isfinite().all():
            return f"in {plan.part_of(name)}: the gradient of {name} is not finite"
    return ""


@contextmanager
def stopping_hooks(model: nn.Module, plan: PartsPlan) -> Iterator[None]:
    """A block in which the first module with an output that is not finite raises FoundError."""

    def judge(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if all(tensor.isfinite().all() for tensor in tensors_in(output)):
            return
        given = "" if all(t.isfinite().all() for t in tensors_in(inputs)) else ", whose input is already not"
        part = plan.part_of(name) or "the model"
        raise FoundError(
            f"in {part}: {name} ({type(module).__name__}) gave values that are not finite{given}"
        )

    hooks = [
        module.register_forward_hook(partial(judge, name)) for name, module in model.named_modules() if name
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The floating-point tensors in a module's inputs or outputs, without graph.

    With it, judging them would save tensors for backward, which a checkpointed layer counts.
    """
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value.detach()
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)


def summarize_batch(batch: Batch) -> dict[str, Any]:
    tensors = {"input_ids": batch.input_ids, "labels": batch.labels, **batch.token_fields, **batch.media}
    return {
        "rows": list(batch.rows),
        "num_target_tokens": batch.num_target_tokens,
        "tensors": {name: summarize_tensor(tensor) for name, tensor in tensors.items()},
    }


def summarize_tensor(tensor: Tensor) -> dict[str, Any]:
    finite = tensor[tensor.isfinite()].double()
    return {
        "shape": list(tensor.shape),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "min": finite.min().item() if finite.numel() else None,
        "max": finite.max().item() if finite.numel() else None,
        "num_not_finite": tensor.numel() - finite.numel(),
    }


def write_fault(folder: Path, record: dict[str, Any], conversations: Iterable[Conversation]) -> None:
    """rows.jsonl, images/ and fault.json in `folder`, in place of what an earlier fault left there."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_conversations(folder, conversations)
    (folder / "fault.json").write_text(json.dumps(record, indent=2) + "\n")
