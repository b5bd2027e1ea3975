"""The engine of a run by its name; what an engine needs is imported when it is chosen."""

from __future__ import annotations

from partwise.engine.ranks import Ranks
from partwise.engine.single import Engine


def needs_group(name: str) -> bool:
    """Whether the engine needs a process group, also for one process."""
    return name not in ("single", "ddp")


def runs_compiled(name: str) -> bool:
    """Whether layers may be compiled: nothing gathers their weights when they are called."""
    return name in ("single", "ddp")


def make_engine(name: str, ranks: Ranks, offload_optimizer: bool = False) -> Engine:
    """`name` is one of single, ddp, fsdp, zero2, zero3; fsdp alone can offload."""
    assert name == "fsdp" or not offload_optimizer, name
    if name == "ddp":
        from partwise.engine.ddp import Replicated

        return Replicated(ranks)
    if name == "fsdp":
        from partwise.engine.fsdp import Fsdp

        return Fsdp(ranks, offload_optimizer)
    if name in ("zero2", "zero3"):
        from partwise.engine.zero import Zero2, Zero3

        return {"zero2": Zero2, "zero3": Zero3}[name](ranks)
    assert name == "single", name
    return Engine(ranks)
