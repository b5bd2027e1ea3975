"""What one process computes and what ranks under ZeRO compute, plan for plan, as JSON.

    torchrun --standalone --nproc_per_node 2 tests/parity/zero.py MODEL STAGE

On the CPU. The reference is made in the same script, without any rank's share: all rows of all ranks.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from PIL import Image

from partwise.config import ModelConfig
from partwise.data.chat import ChatFormat
from partwise.data.collate import collate
from partwise.engine.ranks import Ranks
from partwise.engine.single import Engine
from partwise.engine.zero import Zero2, Zero3
from partwise.model.load import load_model, media_token_ids
from partwise.model.parts import apply_plan, resolve_plan
from partwise.records import Batch, StepData, Totals
from partwise.training.optim import Optimizer
from partwise.training.step import model_inputs, read_outcomes, train_step

sys.path.insert(0, __file__.rpartition("/")[0])
from conftest import make_config, make_rows

CPU = torch.device("cpu")
NUM_IMAGES = (1, 0, 2, 1, 1, 0, 1, 0)
# Micro-batches of each rank, by row. In each of them, both ranks have an image or none has.
MIXED = ([[0, 1], [2]], [[4], [5, 6, 3]])
TEXT = ([[1], [5]], [[7], [1, 7]])
TEXT_FIRST = ([[7], [0]], [[1, 5], [3, 6]])
IMAGE_FIRST = ([[2, 0], [5]], [[4], [7]])
STEPS = (MIXED, TEXT, TEXT_FIRST, IMAGE_FIRST, MIXED, TEXT_FIRST)

LORA = {"mode": "lora", "lora_rank": 4}
FULL = {"vision_tower": "full", "projector": "full", "language_model": "full"}
PLANS: dict[str, dict[str, Any]] = {
    "full": FULL,
    "vision frozen": {"projector": "frozen", "language_model": "full"},
    "projector": {"projector": "full"},
    "lora": {"projector": "full", "language_model": LORA},
    "lora everywhere": {"vision_tower": LORA, "projector": "full", "language_model": LORA},
    "last layer": {"language_model": {"mode": "full", "layers": "-1:"}},
}


class Run:
    """One model in training, with the steps that it is given."""

    def __init__(self, folder: str, plan_name: str, engine: Engine, dtype: str = "float32") -> None:
        config = make_config(folder, PLANS[plan_name], warmup_steps=2, max_grad_norm=0.5)
        self.loaded = load_model(ModelConfig(path=folder, dtype=dtype))
        self.model, self.engine = self.loaded.model, engine
        torch.manual_seed(0)
        plan = resolve_plan(self.model, config)
        apply_plan(self.model, plan)
        engine.spread(self.model, plan, self.model.dtype, CPU)
        self.optimizer = Optimizer(self.model, plan, config.train, len(STEPS), engine)
        self.losses: list[float] = []
        self.norms: list[float] = []

    def step(self, batches: list[Batch], totals: Totals | None = None) -> None:
        data = StepData(len(self.losses), tuple(batches), totals=totals)
        values = read_outcomes([train_step(self.model, data, self.optimizer, CPU)])[0]
        self.losses.append(values.loss)
        self.norms.append(values.grad_norm)

    def whole(self, name: str, kind: str) -> torch.Tensor:
        """The whole of a master or moment, from the shards of all ranks."""
        state, master = self.optimizer.state(name), self.optimizer.masters[name]
        shard = master if kind == "master" else state.get(kind, torch.zeros_like(master))
        stretch = self.engine.stretch(name, self.optimizer.parameters[name])
        whole = torch.full(stretch.shape, float("nan")).flatten()
        for start, values in self.engine.ranks.gather((stretch.start, shard.detach().flatten())):
            whole[start : start + values.numel()] = values
        return whole.view(stretch.shape)

    def wholes(self) -> dict[str, torch.Tensor]:
        kinds = ("master", "exp_avg", "exp_avg_sq")
        return {f"{kind}/{name}": self.whole(name, kind) for kind in kinds for name in self.optimizer.masters}

    def counts(self) -> dict[str, float]:
        """The number of updates of each tensor."""
        return {
            name: float(self.optimizer.state(name).get("step", torch.zeros(())))
            for name in self.optimizer.masters
        }


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

    def steps(self) -> Iterator[tuple[list[list[Batch]], Totals]]:
        """Each step's micro-batches by rank, and what they have together."""
        for shares in STEPS:
            batches = [self.batches(share) for share in shares]
            every = [batch for share in batches for batch in share]
            yield (
                batches,
                Totals(sum(b.num_target_tokens for b in every), sum(b.num_input_tokens for b in every)),
            )


def compare(folder: str, plan_name: str, stage: int, ranks: Ranks, rows: Rows, dtype: str) -> dict[str, Any]:
    one = Run(folder, plan_name, Engine(), dtype)
    many = Run(folder, plan_name, (Zero2, Zero3)[stage - 2](ranks), dtype)
    for batches, totals in rows.steps():
        one.step([batch for share in batches for batch in share])
        many.step(batches[ranks.rank], totals)
    expected, found = one.wholes(), many.wholes()
    return {
        "losses": [one.losses, many.losses],
        "norms": [one.norms, many.norms],
        "counts": [one.counts(), many.counts()],
        "distances": {key: distance(found[key], value) for key, value in expected.items()},
        "logits": logits_distance(one, many, rows),
    }


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Of two tensors, relative; NaN where one has one."""
    scale = torch.linalg.vector_norm(expected)
    return float(torch.linalg.vector_norm(found - expected) / scale.clamp(min=1e-12))


@torch.no_grad()
def logits_distance(one: Run, many: Run, rows: Rows) -> float:
    inputs = model_inputs(one.model, rows.batches([[0, 1]])[0], CPU)
    one.model.eval(), many.model.eval()
    return distance(many.engine.logits(many.model, inputs), one.engine.logits(one.model, inputs))


def main(folder: str, stage: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), host=dist.group.WORLD)
    rows = Rows(folder)
    results = {name: compare(folder, name, stage, ranks, rows, "float32") for name in PLANS}
    results["bfloat16"] = compare(folder, "full", stage, ranks, rows, "bfloat16")
    if ranks.is_first:
        print(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
