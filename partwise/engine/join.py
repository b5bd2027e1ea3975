"""The processes that a launcher started -> Ranks that can talk to each other.

Tensors on GPUs go over NCCL, values on the host over gloo. Never are two processes on one GPU.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from functools import cache
from itertools import count

import torch
import torch.distributed as dist

from partwise.engine.guard import Guard, guarded
from partwise.engine.launch import Started
from partwise.engine.ranks import Ranks
from partwise.errors import UserError

MEETING_TIMEOUT = timedelta(minutes=10)
# Rank 0 checks data and writes checkpoints for minutes while the others wait for its word.
HOST_TIMEOUT = timedelta(hours=2)
DEVICE_TIMEOUT = timedelta(minutes=30)

_joins = count()
has_connected = False  # whether this process has been one of several


@contextmanager
def joined(started: Started | None) -> Iterator[Ranks]:
    """The Ranks of a run, connected; one process alone needs no connection.

    An error in the block is printed by the rank where it came first, and ends the processes of all ranks.

    Raises:
        UserError: the processes do not find each other.
        StoppedError: on rank 0, as in the block; the others end with its exit code.
    """
    if started is None or started.size == 1:
        yield Ranks()
        return
    if dist.is_initialized():
        raise UserError(
            "this process has a torch.distributed process group already, and Partwise makes its own. Call "
            "partwise.train before init_process_group, or after destroy_process_group."
        )
    global has_connected
    has_connected = True
    with exported(started.variables()):
        store = dist.PrefixStore(f"partwise/{next(_joins)}", meet(started))
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(
            backend, store=store, rank=started.rank, world_size=started.size, timeout=DEVICE_TIMEOUT
        )
        try:
            yield from connected(started, store)
        finally:
            dist.destroy_process_group()


def connected(started: Started, store: dist.Store) -> Iterator[Ranks]:
    """The Ranks of the process group, guarded while the caller has them."""
    host = dist.new_group(backend="gloo", timeout=HOST_TIMEOUT)
    ring = dist.new_group(backend="gloo", timeout=MEETING_TIMEOUT)
    ranks = Ranks(started.rank, started.size, host=host)
    places = ranks.gather((socket.gethostname(), os.getpid()))
    names = [f"rank {rank} (process {pid} on {name})" for rank, (name, pid) in enumerate(places)]
    ranks = place_ranks(ranks, started, [name for name, _ in places])
    local = {"LOCAL_RANK": str(ranks.local_rank), "LOCAL_WORLD_SIZE": str(ranks.local_size)}
    with exported(local), guarded(Guard(ranks, ring, store, names, started.launcher)):
        take_gpu(ranks, names)
        yield ranks


@contextmanager
def connected_alone() -> Iterator[None]:
    """A block with a process group of this process alone, which uses no network: some engines need one."""
    variables = Started(rank=0, size=1, local_rank=0, local_size=1).variables()
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    with exported(variables):
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()


@contextmanager
def exported(variables: Mapping[str, str]) -> Iterator[None]:
    """A block in which the environment says this, for torch and DeepSpeed to read."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in variables:
            if name in before:
                os.environ.update({name: before[name]})
            else:
                os.environ.pop(name, None)


@cache
def meet(started: Started) -> dist.Store:
    """The store that all processes share. It stays, since its port is not free at once for a second run."""
    try:
        store, _, _ = next(dist.rendezvous("env://", started.rank, started.size, timeout=MEETING_TIMEOUT))
        store.set_timeout(MEETING_TIMEOUT)
        return store
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"process {started.rank} of {started.size} did not find the others at "
            f"{started.address}:{started.port} (MASTER_ADDR, MASTER_PORT): {str(error).splitlines()[0]} Look "
            "whether all processes were started, and whether this address is reached from every machine."
        ) from error


def place_ranks(ranks: Ranks, started: Started, hosts: list[str]) -> Ranks:
    """Ranks that know their place on their machine, counted where the launcher did not say it."""
    here = [rank for rank, host in enumerate(hosts) if host == hosts[ranks.rank]]
    local_rank = here.index(ranks.rank) if started.local_rank is None else started.local_rank
    return replace(ranks, local_rank=local_rank, local_size=started.local_size or len(here))


def take_gpu(ranks: Ranks, names: list[str]) -> None:
    """Make this rank's GPU the one that torch uses.

    Raises:
        UserError: there is none for it, or another rank has it.
    """
    num_gpus = torch.cuda.device_count()
    # One only: a scheduler that binds a GPU to each process shows it no other.
    index = 0 if num_gpus == 1 else ranks.local_rank
    if num_gpus and index < num_gpus:
        torch.cuda.set_device(index)
        gpu = str(torch.cuda.get_device_properties(index).uuid)
    else:
        gpu = ""
    check_gpus(ranks.gather((socket.gethostname(), num_gpus, gpu)), names, ranks.local_size)


def check_gpus(taken: list[tuple[str, int, str]], names: list[str], local_size: int) -> None:
    """For each rank its host, the GPUs that it sees, and the one it took; on a CPU none.

    Raises:
        UserError: as take_gpu.
    """
    owners: dict[tuple[str, str], int] = {}
    for rank, (host, num_gpus, gpu) in enumerate(taken):
        if bool(num_gpus) != bool(taken[0][1]):
            raise UserError(
                f"{names[rank]} sees {num_gpus} GPUs, and {names[0]} sees {taken[0][1]}. Either all "
                "processes of a run have a GPU, or none has."
            )
        if not num_gpus:
            continue
        other = owners.setdefault((host, gpu), rank)
        if not gpu or other != rank:
            fault = f"is on the same GPU as {names[other]}" if gpu else "has no GPU"
            raise UserError(
                f"{names[rank]} {fault}: {local_size} processes run on {host}, and {num_gpus} of its GPUs "
                "are visible. Start one process for each GPU, or look at CUDA_VISIBLE_DEVICES."
            )
