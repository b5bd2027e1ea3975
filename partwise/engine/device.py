"""Devices, memory and random numbers of the one process that trains.

Random numbers are a pure function of (seed, step): what a data worker or an evaluation draws in between
changes nothing, and a resumed run draws what the uninterrupted one did.
"""

from __future__ import annotations

import gc
import os
import random
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch


def pick_device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )


def limit_memory(gib: float | None) -> None:
    """Take no more than that of the GPU, where there is one: more is an out-of-memory error."""
    if gib is not None and torch.cuda.is_available():
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, gib * 2**30 / total))


def seed_everything(seed: int, step: int = 0, rank: int = 0) -> None:
    """Seed Python, numpy and torch, all devices, for one step; step 0 is also everything before it.

    Ranks draw numbers of their own, the first one those of a run on one device.
    """
    entropy = [seed, step, rank] if rank else [seed, step]
    state = int(np.random.SeedSequence(entropy).generate_state(1)[0])
    random.seed(state)
    np.random.seed(state)
    torch.manual_seed(state)


@contextmanager
def restored_rng() -> Iterator[None]:
    """A block after which all random number generators are as before it."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory taken so far: on a GPU by tensors there, on the CPU by the whole process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def free_memory() -> None:
    """Give back what nothing holds any more, and count the peak anew: before a model is opened again."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def host_memory_bytes() -> int:
    """Memory of the host that is free now, at most what a control group leaves; all where nothing says so."""
    facts = Path("/proc/meminfo")
    if facts.is_file():
        lines = dict(line.split(":", 1) for line in facts.read_text().splitlines() if ":" in line)
        if "MemAvailable" in lines:
            return min(int(lines["MemAvailable"].split()[0]) * 1024, group_memory_bytes())
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def group_memory_bytes(folder: Path = Path("/sys/fs/cgroup")) -> int:
    """What a container may still take; file pages count as free, since the kernel drops them first."""
    try:
        limit, used = ((folder / f"memory.{name}").read_text().strip() for name in ("max", "current"))
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return sys.maxsize if limit == "max" else int(limit) - int(used) + int(stat.get("file", 0))
    except (OSError, ValueError):
        return sys.maxsize  # no control group, or one of the first version
