"""Saves beside training: a copy on the host first, then the disk in the background.

In: the live model and optimizer at a step's end. Out: a checkpoint, later, written by one thread, and the
seconds that training stood still. One save is in flight at most. What is in a checkpoint is checkpoint.py's
business. A save that failed is told at the next step, and at the end, so it is never lost.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from partwise.config import TrainConfig
from partwise.engine.device import host_memory_bytes
from partwise.errors import UserError
from partwise.lineage.manifest import read_manifest
from partwise.lineage.publish import open_partial, partial_of, told
from partwise.lineage.verify import Probe
from partwise.model.shares import pinned_bytes
from partwise.records import PartsPlan
from partwise.tables import format_bytes
from partwise.training.checkpoint import (
    LOSS,
    TrainingState,
    checkpoint_folder,
    rotate_checkpoints,
    save_checkpoint,
    training_state,
)
from partwise.training.optim import Optimizer
from partwise.training.shards import Shards
from partwise.training.verifier import Verifier

if TYPE_CHECKING:
    from partwise.model.load import LoadedModel

# The share of the host's free memory that a copy may take; the rest is for data workers and file pages.
MEMORY_FRACTION = 0.8


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is on disk. `stall_seconds` is how long training waited, `write_seconds` the rest."""

    step: int
    folder: Path
    num_bytes: int
    stall_seconds: float
    write_seconds: float


class Saver:
    """Checkpoints of one run. As a block: at its end, the save in flight is waited for.

    `note` is called in the training thread with each checkpoint that is whole, `tell` with a line to show.
    """

    def __init__(
        self,
        run_folder: Path,
        loaded: LoadedModel,
        plan: PartsPlan,
        optimizer: Optimizer,
        train: TrainConfig,
        note: Callable[[Saved], None],
        tell: Callable[[str], None],
        verifier: Verifier | None = None,
        best_by: str = LOSS,
    ) -> None:
        self.run_folder = run_folder
        self.plan = plan
        self.optimizer = optimizer
        self.train = train
        self.note = note
        self.tell = tell
        self.best_by = best_by
        self.verifier = verifier or Verifier(None, None, lambda finding: None)
        self.probe: Probe | None = None
        # Its own processor: a tokenizer that two threads use at once raises "Already borrowed".
        self.loaded = replace(loaded, processor=copy.deepcopy(loaded.processor))
        self.engine = optimizer.engine
        frozen = () if self.engine.shards_weights else frozen_views(loaded, plan)
        self.copies: HostCopies | None = HostCopies(frozen)
        is_shared = self.engine.shards_masters and self.engine.ranks.size > 1
        self.shards = Shards(self.engine.ranks) if is_shared else None
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="save")
        self.in_flight: Future[Saved | None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and self.shards:
            self.shards.give_up_soon()
        try:
            self.wait()
            if kind is None and self.verifier.running:
                self.verifier.wait()
                self._rotate()  # what was spared for it
        except UserError as fault:
            if kind is None:
                raise
            self.tell(f"error: {fault}")  # beside what already ends the run
        finally:
            self.verifier.cancel()
            self.thread.shutdown()

    def save(self, manifest: dict[str, Any]) -> None:
        """Start to save the state as it is now; returns when training may go on. All ranks must call it.

        Raises:
            TrainingError: the save before could not be written.
        """
        start = time.monotonic()
        self.wait()
        self.probe = self.verifier.take()
        state = training_state(self.loaded, self.plan, self.optimizer)
        ranks = self.engine.ranks
        if self.shards:
            if ranks.is_first:
                open_partial(checkpoint_folder(self.run_folder, manifest["step"]))
            ranks.barrier()
        elif not ranks.is_first:
            return
        if self.copies and self.engine.shards_weights:
            self.copies.spare(state.model.values())
        if self.copies and not self.copies.fit(state):
            self.tell(
                f"checkpoints stall training: a copy of {format_bytes(self.copies.missing_bytes(state))} "
                f"does not fit into the host's {format_bytes(host_memory_bytes())} of free memory"
            )
            self.copies = None
        if self.copies:
            state = self.copies.take(state)
            stall_seconds = time.monotonic() - start
            spared = self.verifier.folder
            self.in_flight = self.thread.submit(self._write, state, manifest, stall_seconds, spared)
        else:
            saved = self._write(state, manifest, 0.0, self.verifier.folder)
            self._noted(saved and replace(saved, stall_seconds=time.monotonic() - start))

    def poll(self) -> None:
        """Note the save in flight when it is on disk, and what came of comparing one.

        Raises:
            TrainingError: it could not be written.
            CheckpointError: it is not the trained model.
        """
        if self.in_flight and self.in_flight.done():
            self.wait()
        self.verifier.poll()

    def wait(self) -> None:
        """Note the save in flight once it has ended. Raises: TrainingError when it could not be written."""
        in_flight, self.in_flight = self.in_flight, None
        if in_flight:
            self._noted(in_flight.result())

    def _noted(self, saved: Saved | None) -> None:
        if saved is None:
            return  # the first rank notes it
        self.note(saved)
        if self.probe:
            self.verifier.start(saved.folder, self.probe)

    def _write(
        self, state: TrainingState, manifest: dict[str, Any], stall_seconds: float, spared: Path | None
    ) -> Saved | None:
        start = time.monotonic()
        if self.shards and not self.engine.ranks.is_first:
            folder = checkpoint_folder(self.run_folder, manifest["step"])
            with told(folder):
                self.shards.write(partial_of(folder), state.optimizer, state.stretches)
            return None
        folder = save_checkpoint(self.run_folder, self.loaded, self.plan, state, manifest, self.shards)
        files = (read_manifest(folder) or {})["files"].values()
        self._rotate(spared)
        return Saved(
            step=manifest["step"],
            folder=folder,
            num_bytes=sum(file["bytes"] for file in files),
            stall_seconds=stall_seconds,
            write_seconds=time.monotonic() - start,
        )

    def _rotate(self, spared: Path | None = None) -> None:
        keep_last, keep_best = self.train.keep_last, self.train.keep_best
        rotate_checkpoints(self.run_folder, keep_last, keep_best, spared, self.best_by)


class HostCopies:
    """Memory on the host for one copy of a training state, by name, kept from save to save.

    `frozen` are views of tensors that do not change: they are written later from where they are. A GPU copies
    into pinned memory several times as fast, but pinning takes longer than the copy: hence kept.
    """

    def __init__(self, frozen: Collection[tuple] = ()) -> None:
        self.frozen = frozen
        self.buffers: dict[str, Tensor] = {}

    def spare(self, tensors: Iterable[Tensor]) -> None:
        """Take these as they are from now on: they are copies already."""
        self.frozen = frozenset(view_of(tensor) for tensor in tensors)

    def take(self, state: TrainingState) -> TrainingState:
        """The state as it is now, on the host; what shares its memory in `state` does so in the copy."""
        copies = {
            view: tensor
            if view in self.frozen
            else self._buffer(name, tensor).copy_(tensor, non_blocking=True)
            for view, (name, tensor) in distinct_tensors(state).items()
        }
        if any(tensor.is_cuda for _, tensor in distinct_tensors(state).values()):
            torch.cuda.synchronize()
        model, optimizer = (
            {n: copies[view_of(t)] for n, t in tensors.items()} for tensors in (state.model, state.optimizer)
        )
        return TrainingState(model, optimizer, state.stretches)

    def _buffer(self, name: str, tensor: Tensor) -> Tensor:
        if name not in self.buffers:
            self.buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        return self.buffers[name]

    def fit(self, state: TrainingState) -> bool:
        missing = self.missing_bytes(state)
        return missing == 0 or missing < MEMORY_FRACTION * host_memory_bytes()

    def missing_bytes(self, state: TrainingState) -> int:
        """Bytes to allocate before `state` can be copied."""
        return sum(
            allocated_bytes(tensor)
            for view, (name, tensor) in distinct_tensors(state).items()
            if view not in self.frozen and name not in self.buffers
        )


def frozen_views(loaded: LoadedModel, plan: PartsPlan) -> frozenset[tuple]:
    """Of the parameters that the plan does not train."""
    trained = set(plan.trainable)
    return frozenset(view_of(p.detach()) for n, p in loaded.model.named_parameters() if n not in trained)


def distinct_tensors(state: TrainingState) -> dict[tuple, tuple[str, Tensor]]:
    """The tensors of which none is the same memory as another, each with the first of its names."""
    distinct: dict[tuple, tuple[str, Tensor]] = {}
    for tensors in (state.model, state.optimizer):
        for name, tensor in tensors.items():
            distinct.setdefault(view_of(tensor), (name, tensor))
    return distinct


def view_of(tensor: Tensor) -> tuple:
    """Equal for tensors that are the same numbers in the same memory."""
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.device


def allocated_bytes(tensor: Tensor) -> int:
    """What a copy takes on the host, where those of a GPU's tensors are pinned."""
    return pinned_bytes(tensor.nbytes) if tensor.is_cuda else tensor.nbytes
