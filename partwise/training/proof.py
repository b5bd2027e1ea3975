"""The proof that exactly the plan trains: what should move has moved, what is frozen has not, bit for bit.

In: a model and its optimizer before the first step, again after that step and after the last. Out: a Finding
for the run's report.json, or a TrainingError with part, count and names. Tensors are compared by exact
reductions of their bit patterns on the device, read by the host once. Nothing is copied or changed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from partwise.errors import TrainingError
from partwise.model.find import shorten
from partwise.model.quantize import scale_tensors
from partwise.records import Finding, PartsPlan
from partwise.training.adamw import PIECE, moments
from partwise.training.optim import Optimizer

REPORT_FILE = "report.json"
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

# Why a tensor that trains may stand, as the printed line says it.
UNREACHED = "not reached by a row yet"
ZERO_GRADIENT = "with a gradient of exactly zero"
TOO_SMALL = "with an update too small for their values at this learning rate"


class Proof:
    """Fingerprints of all frozen tensors and all masters, as they were when this was made."""

    def __init__(self, model: nn.Module, plan: PartsPlan, optimizer: Optimizer) -> None:
        self.model, self.plan, self.optimizer = model, plan, optimizer
        self.frozen = frozen_tensors(model, optimizer)
        self.start = self._fingerprints()

    def _fingerprints(self) -> Tensor:
        """Of what lies on this rank, frozen tensors first."""
        local = [self.optimizer.engine.local(tensor) for tensor in self.frozen.values()]
        return fingerprints([*local, *self.optimizer.masters.values()])

    def check(self, step: int) -> Finding:
        """What holds after `step` steps, as a Finding; the host waits for the device.

        Raises:
            TrainingError: a frozen tensor changed, or one that trains stands without a reason.
        """
        ranks = self.optimizer.engine.ranks
        is_other = ranks.any_of((self._fingerprints() != self.start).any(dim=1).tolist())
        frozen_other, masters_other = is_other[: len(self.frozen)], is_other[len(self.frozen) :]
        changed = [name for name, has_changed in zip(self.frozen, frozen_other, strict=True) if has_changed]
        standing = [
            name for name, moved in zip(self.optimizer.masters, masters_other, strict=True) if not moved
        ]
        reasons = agreed_reasons(
            ranks.gather({name: reason_to_stand(self.optimizer, name) for name in standing})
        )
        unmoved = [name for name, reason in reasons.items() if not reason]
        self._refuse(step, "did not move", [*unmoved, *replaced_names(self.model, self.optimizer)])
        self._refuse(step, "changed although it is frozen", changed)
        return make_finding(step, len(self.optimizer.masters), len(self.frozen), reasons)

    def _refuse(self, step: int, what: str, names: list[str]) -> None:
        if not names:
            return
        by_part: dict[str, list[str]] = {}
        for name in names:
            by_part.setdefault(self.plan.part_of(name) or "outside all parts", []).append(name)
        told = "; ".join(f"{part}: {len(some)} ({shorten(some)})" for part, some in by_part.items())
        raise TrainingError(
            f"step {step}: {len(names)} tensors of which each {what}: {told}. The weights are not what the "
            "plan says and were not saved after this. Something else writes into the model or its tensors, "
            "or the learning rate of that part is zero."
        )


def frozen_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """All parameters that do not train, scales of 4-bit ones, and saved buffers of modules in eval mode.

    Tied ones once.
    """
    trained = {id(parameter) for parameter in optimizer.parameters.values()}
    frozen = {name: p for name, p in model.named_parameters() if id(p) not in trained}
    frozen |= dict(scale_tensors(list(frozen.items())))
    saved = model.state_dict(keep_vars=True).keys()
    for path, module in model.named_modules():
        for name, buffer in module.named_buffers(prefix=path, recurse=False):
            if name in saved and not module.training:
                frozen[name] = buffer
    return frozen


@torch.no_grad()
def fingerprints(tensors: Iterable[Tensor]) -> Tensor:
    """Sums, and sums of squares, of the tensors' bit patterns as integers: (tensors, 2) int64.

    On the device of the first; masters may lie on the host and frozen tensors on the GPU.
    """
    sums = [fingerprint(tensor) for tensor in tensors]
    return torch.stack([each.to(sums[0].device) for each in sums])


def fingerprint(tensor: Tensor) -> Tensor:
    """(2,) int64. Squares as well: of many elements, equal steps up and down cancel in a sum."""
    flat = tensor.detach().as_subclass(Tensor).reshape(-1)
    bits = flat.view(INTEGERS[flat.dtype.itemsize])
    sums = [torch.stack([piece.sum(), (piece * piece).sum()]) for piece in bits.split(PIECE)]
    return sums[0] if len(sums) == 1 else torch.stack(sums).sum(dim=0)


def agreed_reasons(said: list[dict[str, str | None]]) -> dict[str, str]:
    """What all ranks with a shard of a tensor say; "" where one of them has no reason."""
    reasons = {}
    for name in said[0]:
        given = [some[name] for some in said if some[name] is not None]
        reasons[name] = "" if "" in given or not given else str(given[0])
    return reasons


@torch.no_grad()
def reason_to_stand(optimizer: Optimizer, name: str) -> str | None:
    """Why a master may be as it was; "" where there is no reason, None where it is of no element."""
    master, state = optimizer.masters[name], optimizer.state(name)
    if master.numel() == 0:
        return None
    if name in optimizer.never_reached:
        return UNREACHED
    if not state:
        return ""
    if not any(mean.any() or square.any() for mean, square in moments(state)):
        return ZERO_GRADIENT
    rate = optimizer.groups[name]["lr"]
    pieces = zip(master.reshape(-1).split(PIECE), optimizer.directions(name), strict=True)
    rounded_away = rate > 0 and all(torch.equal(piece - rate * update, piece) for piece, update in pieces)
    return TOO_SMALL if rounded_away else ""


def replaced_names(model: nn.Module, optimizer: Optimizer) -> list[str]:
    """Names whose tensor in the model is no longer the one that the optimizer writes to."""
    parameters = dict(model.named_parameters())
    return [name for name, p in optimizer.parameters.items() if parameters.get(name) is not p]


def make_finding(step: int, num_trained: int, num_frozen: int, reasons: dict[str, str]) -> Finding:
    by_reason: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        by_reason.setdefault(reason, []).append(name)
    moved = f"{num_trained - len(reasons)} of {num_trained}" if reasons else f"all {num_trained}"
    stand = "".join(f", {len(names)} stand {reason}" for reason, names in by_reason.items())
    return Finding(
        "proof",
        "info",
        f"step {step}: {moved} trainable tensors moved{stand}, 0 of {num_frozen} frozen tensors changed",
        values={"step": step, "num_trainable": num_trained, "num_frozen": num_frozen, "standing": by_reason},
    )


def add_to_report(run_folder: Path, finding: Finding) -> None:
    """Put the finding at the end of RUN/report.json, in place of one of the same check and step.

    Raises:
        TrainingError: the file cannot be written.
    """
    path = run_folder / REPORT_FILE
    try:
        report = json.loads(path.read_text()) if path.is_file() else []
        key = (finding.check, finding.values.get("step"))
        kept = [f for f in report if (f["check"], f["values"].get("step")) != key]
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(json.dumps([*kept, asdict(finding)], indent=2) + "\n")
        partial.replace(path)
    except OSError as error:
        raise TrainingError(
            f"cannot write {path}: {error}. Free space or make the folder writable, then resume."
        ) from error
