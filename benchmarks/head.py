"""The token loss of Gemma-3-4B's head, forward and backward: time, peak memory and error of several ways.

Usage: python benchmarks/head.py OUT.jsonl [small]; meant for a GPU, on which it takes less than a minute.
`small` is a shape for the CPU. Beside ours, by rows of a chunk: cross-entropy on all logits, the same in
chunks whose logits are computed again in the backward pass, and liger_kernel's where it is installed. The
error is of gradients, relative to those of cross-entropy on all logits in fp32. One JSON line per way.
"""

from __future__ import annotations

import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from step import append_row, describe_machine
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from partwise.model import head as head_module
from partwise.model.head import token_loss_sum

NUM_RUNS = 9
NUM_WARMUP_RUNS = 2
CHUNKS = (1024, 2048, 4096)


class Shape(NamedTuple):
    num_rows: int
    width: int
    vocab_size: int


SHAPES = {"": Shape(8192, 2560, 262208), "small": Shape(256, 64, 1024)}


def main() -> None:
    out, shape = Path(sys.argv[1]), SHAPES["".join(sys.argv[2:])]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    head = nn.Linear(shape.width, shape.vocab_size, bias=False, device=device, dtype=torch.bfloat16)
    nn.init.normal_(head.weight, std=shape.width**-0.5)
    hidden = torch.randn(shape.num_rows, shape.width, device=device).bfloat16().requires_grad_()
    targets = torch.randint(shape.vocab_size, (shape.num_rows,), device=device)
    for is_trained in (True, False):
        head.requires_grad_(is_trained)
        exact = exact_gradients(hidden, targets, head)
        mode = "trained" if is_trained else "frozen"
        for name, loss in ways(hidden, targets, head):
            row = {
                "cell": f"head of {shape.vocab_size} x {shape.width}, {mode}, {name}",
                "command": " ".join(["python benchmarks/head.py OUT.jsonl", *sys.argv[2:]]),
                **describe_machine(),
                "num_target_tokens": shape.num_rows,
                **measure(loss, [hidden, *([head.weight] if is_trained else [])], exact),
            }
            append_row(out, row)


def ways(hidden: Tensor, targets: Tensor, head: nn.Linear) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Each way by its name, as a function that gives the summed loss."""
    labels = torch.cat([targets[:1], targets])[None].cpu()
    padded = torch.cat([hidden, hidden[:1]])[None]  # the last position predicts nothing
    for num_rows in CHUNKS:
        head_module.CHUNK_ROWS = num_rows
        yield f"ours, chunks of {num_rows}", lambda: token_loss_sum(padded, labels, head)
    yield "checkpointed chunks of 1024", lambda: checkpointed_loss(hidden, targets, head)
    yield "all logits", lambda: chunk_loss(hidden, targets, head)
    if hidden.is_cuda and importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss(reduction="sum")
        yield "liger_kernel", lambda: liger(head.weight, hidden, targets)


def checkpointed_loss(hidden: Tensor, targets: Tensor, head: nn.Linear) -> Tensor:
    chunks = zip(hidden.split(1024), targets.split(1024), strict=True)
    return torch.stack([checkpoint(chunk_loss, *chunk, head, use_reentrant=False) for chunk in chunks]).sum()


def chunk_loss(hidden: Tensor, targets: Tensor, head: nn.Module) -> Tensor:
    return nn.functional.cross_entropy(head(hidden).float(), targets, reduction="sum")


def exact_gradients(hidden: Tensor, targets: Tensor, head: nn.Linear) -> list[Tensor]:
    """Of the mean loss, for the hidden states and a weight that trains."""
    wide = hidden.detach().float().requires_grad_()
    weight = head.weight.detach().float().requires_grad_(head.weight.requires_grad)
    tensors = [wide, *([weight] if weight.requires_grad else [])]
    loss = nn.functional.cross_entropy(nn.functional.linear(wide, weight), targets)
    return list(torch.autograd.grad(loss, tensors))


def measure(loss: Callable[[], Tensor], tensors: list[Tensor], exact: list[Tensor]) -> dict:
    """Seconds, peak bytes above what lay there before, and errors of the gradients of the mean."""
    num_rows = len(tensors[0])
    is_cuda = tensors[0].is_cuda
    held = torch.cuda.memory_allocated() if is_cuda else 0
    if is_cuda:
        torch.cuda.reset_peak_memory_stats()
    try:
        gradients = torch.autograd.grad(loss() / num_rows, tensors)
    except torch.OutOfMemoryError as error:
        return {"error": str(error)[:200]}
    peak = torch.cuda.max_memory_allocated() - held if is_cuda else None
    errors = [((a.float() - b).norm() / b.norm()).item() for a, b in zip(gradients, exact, strict=True)]
    del gradients
    seconds = []
    for _ in range(NUM_WARMUP_RUNS + NUM_RUNS):
        synchronize(is_cuda)
        start = time.perf_counter()
        torch.autograd.grad(loss() / num_rows, tensors)
        synchronize(is_cuda)
        seconds.append(time.perf_counter() - start)
    seconds = seconds[NUM_WARMUP_RUNS:]
    return {
        "runs": NUM_RUNS,
        "seconds_median": round(statistics.median(seconds), 5),
        "seconds_min": round(min(seconds), 5),
        "seconds_max": round(max(seconds), 5),
        "peak_memory_bytes": peak,
        "gradient_errors": [float(f"{error:.3g}") for error in errors],
    }


def synchronize(is_cuda: bool) -> None:
    if is_cuda:
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
