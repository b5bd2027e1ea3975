"""What one process computes and what ranks under ZeRO compute, by stage and plan, as JSON.

    torchrun --standalone --nproc_per_node 2 tests/parity/zero.py MODEL

On the CPU. Each rank computes the reference for itself: one process that has all rows of all ranks.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor

import partwise.engine.zero
from partwise.config import ModelConfig
from partwise.data.chat import ChatFormat
from partwise.data.collate import collate
from partwise.engine.ranks import Ranks
from partwise.engine.single import Engine
from partwise.engine.zero import Zero2, Zero3
from partwise.model.load import load_model, media_token_ids
from partwise.model.memory import enable_gradient_checkpointing
from partwise.model.parts import apply_plan, resolve_plan
from partwise.records import Batch, StepData, Totals
from partwise.training.optim import Optimizer
from partwise.training.step import accumulate_loss, model_inputs, read_outcomes, train_step

sys.path.insert(0, __file__.rpartition("/")[0])
from conftest import make_config, make_rows

CPU = torch.device("cpu")
ENGINES = {2: Zero2, 3: Zero3}
NUM_IMAGES = (1, 0, 2, 1, 1, 0, 1, 0)
# The rows of a step's micro-batches, for ranks of even and of odd number. All have an image or none has ...
MIXED = ([[0, 1], [2]], [[4], [5, 6, 3]])
TEXT = ([[1], [5]], [[7], [1, 7]])
TEXT_FIRST = ([[7], [0]], [[1, 5], [3, 6]])
IMAGE_FIRST = ([[2, 0], [5]], [[4], [7]])
STEPS = (MIXED, TEXT, TEXT_FIRST, IMAGE_FIRST, MIXED, TEXT_FIRST)
# ... or one has, where the vision side is frozen.
UNEVEN_STEPS = (([[0], [1]], [[1, 5], [7]]), *STEPS, ([[7], [5]], [[1], [2, 6]]))

LORA = {"mode": "lora", "lora_rank": 3}
FULL = {"vision_tower": "full", "projector": "full", "language_model": "full"}
PLANS: dict[str, dict[str, Any]] = {
    "full, recomputed": FULL,
    "vision frozen": {"language_model": "full"},
    "projector": {"projector": "full"},
    "lora, recomputed": {"projector": "full", "language_model": LORA},
    "lora everywhere": {"vision_tower": LORA, "projector": "full", "language_model": LORA},
    "full, bfloat16": FULL,
}
RESUMED = ("vision frozen", "full, bfloat16")


class Run:
    """One model in training, and the numbers of its steps."""

    def __init__(self, folder: str, plan_name: str, engine: Engine) -> None:
        dtype = "bfloat16" if "bfloat16" in plan_name else "float32"
        config = make_config(folder, PLANS[plan_name], warmup_steps=2, max_grad_norm=0.5)
        self.model, self.engine = load_model(ModelConfig(path=folder, dtype=dtype)).model, engine
        if engine.shards_weights and not engine.ranks.is_first:
            with torch.device("meta"):
                self.model = type(self.model)._from_config(self.model.config, dtype=self.model.dtype)
        torch.manual_seed(0)
        plan = resolve_plan(self.model, config)
        apply_plan(self.model, plan)
        if "recomputed" in plan_name:
            enable_gradient_checkpointing(self.model, plan)
        engine.spread(self.model, plan, getattr(torch, dtype), CPU)
        self.optimizer = Optimizer(self.model, plan, config.train, len(UNEVEN_STEPS), engine)
        self.losses: list[float] = []
        self.norms: list[float] = []

    def step(self, batches: list[Batch], totals: Totals) -> None:
        data = StepData(len(self.losses), tuple(batches), totals=totals)
        values = read_outcomes([train_step(self.model, data, self.optimizer, CPU)])[0]
        self.losses.append(values.loss)
        self.norms.append(values.grad_norm)

    def take_over(self, other: Run) -> None:
        """The state of a run with the same shards, as a checkpoint would give it."""
        with torch.no_grad():
            for name, master in self.optimizer.masters.items():
                master.copy_(other.optimizer.masters[name])
                self.optimizer.adamw.state[master] = {
                    k: v.clone() for k, v in other.optimizer.state(name).items()
                }
            self.engine.finish_load()
        self.losses, self.norms = list(other.losses), list(other.norms)

    def here(self) -> dict[str, Tensor]:
        """All that training changes, as far as it lies on this rank; frozen tensors as well."""
        tensors = {f"weight/{name}": self.engine.local(p) for name, p in self.model.named_parameters()}
        return {key: tensor.clone() for key, tensor in (tensors | self.optimizer.state_dict()).items()}

    def wholes(self) -> dict[str, Tensor]:
        """Masters and moments by name, each from the shards of all ranks."""
        shapes = {name: self.engine.stretch(name, p) for name, p in self.optimizer.parameters.items()}
        wholes = {}
        for key, shard in self.optimizer.state_dict().items():
            kind, _, name = key.partition("/")
            if kind == "step":
                continue
            whole = torch.full(shapes[name].shape, float("nan")).flatten()
            for start, values in self.engine.ranks.gather((shapes[name].start, shard.flatten())):
                whole[start : start + values.numel()] = values
            wholes[key] = whole
        return wholes

    def counts(self) -> dict[str, float]:
        """The number of updates of each tensor."""
        return {name: float(self.optimizer.state(name)["step"]) for name in self.optimizer.masters}


class Rows:
    """The rows of the model, as micro-batches."""

    def __init__(self, folder: str) -> None:
        loaded = load_model(ModelConfig(path=folder, dtype="float32"))
        chat_format = ChatFormat(
            loaded.processor, media_token_ids(loaded.model.config, loaded.processor), 512, "error"
        )
        rows, _ = make_rows(NUM_IMAGES, lambda size, color: Image.new("RGB", size, color))
        self.examples = [chat_format(row) for row in rows]

    def batches(self, rows: list[list[int]]) -> list[Batch]:
        return [collate([self.examples[row] for row in micro], pad_token_id=0) for micro in rows]

    def steps(self, plan_name: str, num_ranks: int) -> Iterator[tuple[list[list[Batch]], Totals]]:
        """Each step's micro-batches by rank, and what they have together."""
        for shares in UNEVEN_STEPS if PLANS[plan_name].keys() == {"language_model"} else STEPS:
            batches = [self.batches(shares[rank % 2]) for rank in range(num_ranks)]
            every = [batch for share in batches for batch in share]
            tokens = sum(b.num_target_tokens for b in every), sum(b.num_input_tokens for b in every)
            yield batches, Totals(*tokens)


def train_alone(folder: str, plan_name: str, num_ranks: int, rows: Rows) -> Run:
    """One process that has the rows of so many ranks."""
    run = Run(folder, plan_name, Engine())
    for batches, totals in rows.steps(plan_name, num_ranks):
        run.step([batch for share in batches for batch in share], totals)
    return run


def compare(folder: str, plan_name: str, one: Run, engine: Engine, rows: Rows) -> dict[str, Any]:
    ranks = engine.ranks
    many = Run(folder, plan_name, engine)
    for batches, totals in rows.steps(plan_name, ranks.size):
        many.step(batches[ranks.rank], totals)
    expected, found = one.wholes(), many.wholes()
    weights = {name: p.detach() for name, p in one.model.named_parameters()}
    gathered = {name: engine.whole(p).cpu() for name, p in many.model.named_parameters()}
    results = {
        "losses": [list(one.losses), list(many.losses)],
        "norms": [list(one.norms), list(many.norms)],
        "counts": [one.counts(), many.counts()],
        "distances": {key: distance(found[key], value) for key, value in expected.items()},
        "logits": logits_distance(one, many, rows),
        "shards": [master.numel() for master in many.optimizer.masters.values()],
        "size": sum(master.numel() for master in one.optimizer.masters.values()),
    }
    if ranks.is_first:
        results["weights"] = {name: distance(gathered[name], value) for name, value in weights.items()}
    if plan_name in RESUMED:
        results["resumed"] = resumed(folder, plan_name, many, rows)
        results["changed by nan"] = changed_by_nan(many, rows)
    return results


def resumed(folder: str, plan_name: str, run: Run, rows: Rows) -> list[str]:
    """What differs one step after another run took over this one's state."""
    again = Run(folder, plan_name, type(run.engine)(run.engine.ranks))
    again.take_over(run)
    for each in (again, run):
        each.step(*share(rows, run.engine.ranks))
    return different(again.here(), run.here(), run.engine.ranks)


def changed_by_nan(run: Run, rows: Rows) -> list[str]:
    """What a step changes in which the gradients of the last rank are NaN, and a usual one after it."""
    batches, totals = share(rows, run.engine.ranks)
    before = run.here()
    is_last = run.engine.ranks.rank == run.engine.ranks.size - 1
    backward = run.engine.backward
    run.engine.backward = lambda loss: backward(loss * (float("nan") if is_last else 1.0))
    accumulate_loss(run.model, StepData(len(run.losses), tuple(batches), totals=totals), CPU, run.engine)
    del run.engine.backward
    run.optimizer.step(len(run.losses))
    run.step(batches, totals)
    return different(before, run.here(), run.engine.ranks)


def share(rows: Rows, ranks: Ranks) -> tuple[list[Batch], Totals]:
    """This rank's share of one more step."""
    batches, totals = next(rows.steps("projector", ranks.size))
    return batches[ranks.rank], totals


def distance(found: Tensor, expected: Tensor) -> float:
    """Of two tensors, relative; NaN where one has one."""
    scale = torch.linalg.vector_norm(expected.double())
    return float(
        torch.linalg.vector_norm(found.view_as(expected).double() - expected) / scale.clamp(min=1e-12)
    )


def different(a: dict[str, Tensor], b: dict[str, Tensor], ranks: Ranks) -> list[str]:
    """Names of tensors that are not the same bit for bit, on any rank."""
    assert a.keys() == b.keys()
    mine = [key for key in a if not torch.equal(a[key], b[key])]
    return sorted({key for names in ranks.gather(mine) for key in names})


@torch.no_grad()
def logits_distance(one: Run, many: Run, rows: Rows) -> float:
    inputs = model_inputs(one.model, rows.batches([[0, 1]])[0], CPU)
    logits = [run.engine.logits(run.model, inputs) for run in (many, one)]
    return distance(*logits)


def main(folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), host=dist.group.WORLD)
    # At its usual limits, all of a tiny model would be kept and travel together.
    partwise.engine.zero.KEPT_ELEMENTS = 100
    partwise.engine.zero.BUCKET_ELEMENTS = 6000
    rows = Rows(folder)
    results: dict[int, dict[str, Any]] = {stage: {} for stage in ENGINES}
    for name in PLANS:
        one = train_alone(folder, name, ranks.size, rows)
        for stage, engine in ENGINES.items():
            results[stage][name] = compare(folder, name, one, engine(ranks), rows)
    if ranks.is_first:
        print(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
    sys.stdout.flush()
    os._exit(0)  # as the command does: communication libraries may abort while Python ends
