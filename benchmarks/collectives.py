"""What a GPU receives a second in each collective within a node: what `scaling.py` takes for granted.

Usage: torchrun --nproc-per-node N benchmarks/collectives.py OUT.jsonl; needs N GPUs. Each row is the median
of 20 runs over 1 GiB of bfloat16; `gigabytes_per_second` counts what a GPU receives from the others.
"""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from step import append_row, describe_machine

NUM_RUNS = 20
NUM_BYTES = 1 << 30


def main() -> None:
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl")
    count = dist.get_world_size()
    whole = torch.zeros(NUM_BYTES // 2, dtype=torch.bfloat16, device="cuda")
    shard = torch.zeros(whole.numel() // count, dtype=torch.bfloat16, device="cuda")
    share = (count - 1) / count
    collectives: dict[str, tuple[float, Callable[[], object]]] = {
        "all-gather": (share, lambda: dist.all_gather_into_tensor(whole, shard)),
        "reduce-scatter": (share, lambda: dist.reduce_scatter_tensor(shard, whole)),
        "all-reduce": (2 * share, lambda: dist.all_reduce(whole)),
    }
    for name, (received, run) in collectives.items():
        seconds = statistics.median(timed(run) for _ in range(NUM_RUNS))
        if dist.get_rank() == 0:
            row = {
                "cell": f"{name} of 1 GiB",
                "num_gpus": count,
                "command": f"torchrun --nproc-per-node {count} benchmarks/collectives.py OUT.jsonl",
                **describe_machine(),
                "runs": NUM_RUNS,
                "seconds_median": round(seconds, 6),
                "gigabytes_per_second": round(received * NUM_BYTES / seconds / 1e9, 1),
            }
            append_row(Path(sys.argv[1]), row)
    dist.destroy_process_group()


def timed(run: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    run()  # so that no GPU waits for another one within what is timed
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000


if __name__ == "__main__":
    main()
