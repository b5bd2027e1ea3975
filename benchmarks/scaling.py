"""What 8, 64 and 512 GPUs would move and hold per step: predictions by arithmetic, for docs/scaling.md.

The same arithmetic for the GPUs of the rows in results/engines.jsonl stands beside what they measured.

Usage: python benchmarks/scaling.py; writes the tables. It needs neither a GPU nor a model: shapes stand on
the meta device. A test holds that page and arithmetic agree. Bytes are of one GPU and one step.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from step import GEMMA_3_4B, GEMMA_3_12B

from partwise.config import Config
from partwise.model.estimate import Footprint, RowShape, estimate_footprint
from partwise.model.parts import apply_plan
from partwise.model.plan import resolve_plan
from partwise.tiny.recipes import gemma3

PAGE = Path(__file__).parents[1] / "docs/scaling.md"
RESULTS = Path(__file__).parent / "results/engines.jsonl"

MODELS = {"Gemma-3-4B": GEMMA_3_4B, "Gemma-3-12B": GEMMA_3_12B}
PLANS = {"full": {"language_model": "full"}, "LoRA": {"language_model": {"mode": "lora", "lora_rank": 16}}}
MEASURED_PLANS = {
    "gemma-3-4b image questions, lora": ("Gemma-3-4B", "LoRA"),
    "gemma-3-4b image questions, full": ("Gemma-3-4B", "full"),
    "gemma-3-12b image questions, full12b": ("Gemma-3-12B", "full"),
}
ENGINES = ("ddp", "fsdp", "zero2", "zero3")
SIZES = (8, 64, 512)

NODE = 8  # GPUs of a node
NODE_BANDWIDTH = 260e9  # bytes a second and GPU, over NVLink: results/collectives.jsonl
NETWORK_BANDWIDTH = 50e9  # bytes a second and GPU, one network card of 400 Gbit/s each
COMPUTE_RATE = 400e12  # floating-point operations a second and GPU
GPU_BYTES = 141e9

# A step is one micro-batch of so many rows, text alone, with gradient checkpointing.
NUM_ROWS = 4
ROW = RowShape(num_tokens=2048, num_target_tokens=2048)


class Moved(NamedTuple):
    """Bytes that a GPU receives: from its own node, and over its network card."""

    node: float
    network: float

    @property
    def seconds(self) -> float:
        """One after the other."""
        return self.node / NODE_BANDWIDTH + self.network / NETWORK_BANDWIDTH


@dataclass(frozen=True)
class Case:
    """What a model and plan give: elements gathered for a step, those that train, and operations of a GPU."""

    num_gathered: int
    num_trained: int
    num_operations: float
    footprint: Footprint


@cache
def case(model_name: str, plan_name: str) -> Case:
    made = gemma3(**MODELS[model_name])
    with torch.device("meta"):
        model = made.model_class(made.config).to(torch.bfloat16)
    keys = {
        "model": {"path": "."},
        "parts": PLANS[plan_name],
        "data": {"train": "rows.jsonl"},
        "output": "run",
    }
    plan = resolve_plan(model, Config.model_validate(keys))
    num_language = plan["language_model"].num_parameters
    apply_plan(model, plan)
    footprint = estimate_footprint(model, plan, ROW, "sdpa", "float32")
    tensors = footprint.weights.shardable
    in_layers = sum(tensor.num_elements for tensor in tensors if tensor.unit)
    root = sum(tensor.num_elements for tensor in tensors if not tensor.unit)
    # Forward, once more for checkpointing, gradients of activations, and those of weights that train.
    num_passes = 4 if plan_name == "full" else 3
    return Case(
        num_gathered=2 * in_layers + root,
        num_trained=sum(tensor.num_elements for tensor in footprint.weights.trained),
        num_operations=num_passes * 2 * num_language * NUM_ROWS * ROW.num_tokens,
        footprint=footprint,
    )


def collected(num_bytes: float, num_gpus: int) -> Moved:
    """An all-gather or reduce-scatter of `num_bytes` over all GPUs.

    A GPU is sent 7/8 of them from its node. What the node lacks comes over its 8 cards, a share over each.
    """
    in_node, num_nodes = min(NODE, num_gpus), max(1, num_gpus // NODE)
    return Moved(num_bytes * (in_node - 1) / in_node, num_bytes / NODE * (num_nodes - 1) / num_nodes)


def added(*moves: Moved) -> Moved:
    return Moved(sum(move.node for move in moves), sum(move.network for move in moves))


def moved(case: Case, engine: str, num_gpus: int) -> Moved:
    """A step of one micro-batch. 16-bit weights, gradients in fp32."""
    gathered, trained = 2 * case.num_gathered, 2 * case.num_trained
    gradients = 4 * case.num_trained
    if engine == "ddp":  # an all-reduce is a reduce-scatter and an all-gather
        return added(collected(gradients, num_gpus), collected(gradients, num_gpus))
    if engine == "zero2":
        return added(collected(gradients, num_gpus), collected(trained, num_gpus))
    if engine == "zero3":
        return added(collected(gathered, num_gpus), collected(gradients, num_gpus))
    # fsdp: within the node, and an all-reduce of each shard among its copies in the other nodes
    in_node, num_nodes = min(NODE, num_gpus), max(1, num_gpus // NODE)
    across = 2 * gradients / NODE * (num_nodes - 1) / num_nodes
    return added(collected(gathered, in_node), collected(gradients, in_node), Moved(0, across))


def peak_bytes(case: Case, engine: str, num_gpus: int) -> int:
    num_ranks = NODE if engine == "fsdp" else num_gpus
    return case.footprint.on_ranks(engine, num_ranks).peak_bytes(NUM_ROWS, recomputed=1)


def row(case: Case, engine: str, num_gpus: int) -> str:
    moves, compute = moved(case, engine, num_gpus), case.num_operations / COMPUTE_RATE
    peak = peak_bytes(case, engine, num_gpus)
    cells = (
        str(num_gpus),
        f"`{engine}`",
        f"{moves.node / 1e9:.2f}",
        f"{moves.network / 1e9:.2f}",
        f"{1000 * moves.seconds:.0f}",
        f"{compute / (compute + moves.seconds):.0%}",
        f"{NUM_ROWS * ROW.num_tokens * moves.seconds / compute:,.0f}",
        f"{peak / 1e9:.0f}" + (", does not fit" if peak > GPU_BYTES else ""),
    )
    return f"| {' | '.join(cells)} |"


def table(model_name: str, plan_name: str) -> str:
    this = case(model_name, plan_name)
    compute = 1000 * this.num_operations / COMPUTE_RATE
    lines = [
        f"### {model_name}, {plan_name}",
        "",
        f"{this.num_trained / 1e9:.3f} billion weights train; the computation takes {compute:.0f} ms.",
        "",
        "| GPUs | engine | GB in the node | GB over the network | ms | efficiency, nothing hidden "
        "| tokens that hide all | GB of memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [row(this, engine, num_gpus) for num_gpus in SIZES for engine in ENGINES]
    return "\n".join(lines)


def measured_table() -> str:
    """What runs on several GPUs measured beside what the arithmetic says of them, newest row of each."""
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    newest = {(r["cell"], r["engine"], r.get("contender", "partwise")): r for r in rows if r["num_gpus"] > 1}
    lines = [
        "| run | GPUs | tokens/s | of each GPU | scaling | predicted, nothing hidden | GiB | predicted |",
        "|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *map(measured_row, newest.values())])


def measured_row(row: dict[str, Any]) -> str:
    count, (model, plan) = row["num_gpus"], MEASURED_PLANS[row["cell"]]
    alone, is_ours = row.get("scaling"), row.get("contender", "partwise") == "partwise"
    scaling = f"{alone:.2f}" if alone else ""
    predicted = ""
    if alone and is_ours:
        # The time of one GPU with as many rows, which is that of the computation.
        compute = row["step_seconds_median"] * alone / count
        share = compute / (compute + moved(case(model, plan), row["engine"], count).seconds)
        predicted = f"{count * share:.2f}"
    told = row.get("predicted_peak_bytes")
    name = f"{model}, {plan}, `{row['engine']}`" + ("" if is_ours else f" of {row['contender']}")
    cells = (
        name,
        str(count),
        f"{row['tokens_per_second']:,}",
        f"{row['tokens_per_second_per_gpu']:,}",
        scaling,
        predicted,
        f"{row['peak_memory_bytes'] / 2**30:.1f}",
        f"{told / 2**30:.1f}" if told else "",
    )
    return f"| {' | '.join(cells)} |"


def page() -> str:
    """docs/scaling.md with the tables as the arithmetic has them."""
    tables = "\n\n".join(table(model, plan) for model in MODELS for plan in PLANS)
    page = PAGE.read_text()
    for name, text in (("scaling", tables), ("measured", measured_table())):
        marked = re.compile(rf"(<!-- {name}:start -->\n).*?(<!-- {name}:end -->)", re.S)
        page = marked.sub(lambda match, text=text: f"{match[1]}{text}\n{match[2]}", page)
    return page


if __name__ == "__main__":
    PAGE.write_text(page())
