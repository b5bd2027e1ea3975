"""How a run gets its processes: from a launcher, which says so in the environment, or from `partwise train`.

The only file that reads the environment. torchrun, `accelerate launch`, Kubernetes jobs and Slurm's srun
start processes; `started_ranks` says which of them this one is, and join.py brings them together. Where
nobody has started several, `choose_num_processes` says how many spawn.py should.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from partwise.errors import ConfigError, UserError

LAUNCHER = "PARTWISE_LAUNCHER"
# Below the ports that Linux gives away by itself, so that no outgoing connection sits on it.
SLURM_PORTS = range(15000, 30000)


@dataclass(frozen=True)
class Started:
    """One of the processes that a launcher started; what the launcher did not say is None."""

    rank: int
    size: int
    local_rank: int | None = None
    local_size: int | None = None
    address: str = ""  # of the process that all others meet
    port: int = 0
    launcher: int | None = None  # the process id of `launch`, which itself reports a killed rank

    def variables(self) -> dict[str, str]:
        """What torch and DeepSpeed read from the environment."""
        values = {
            "RANK": self.rank,
            "WORLD_SIZE": self.size,
            "LOCAL_RANK": self.local_rank,
            "LOCAL_WORLD_SIZE": self.local_size,
            "MASTER_ADDR": self.address or None,
            "MASTER_PORT": self.port or None,
        }
        return {name: str(value) for name, value in values.items() if value is not None}


def started_ranks(environment: Mapping[str, str] | None = None) -> Started | None:
    """Which process of which run this is; None where no launcher started several.

    Raises:
        UserError: the launcher's variables are incomplete or contradict each other.
    """
    environment = os.environ if environment is None else environment
    if environment.get("RANK") or environment.get("WORLD_SIZE"):
        return _read_torch(environment)
    # Set for the tasks of srun alone: a batch script and a shell of salloc are one process, however many
    # tasks SLURM_NTASKS allows. A terminal of `srun --pty` is one, too.
    if environment.get("SLURM_STEP_NUM_TASKS", "1") != "1" and "SLURM_PTY_PORT" not in environment:
        return _read_slurm(environment)
    return None


def _read_torch(environment: Mapping[str, str]) -> Started | None:
    rank, size = _number(environment, "RANK"), _number(environment, "WORLD_SIZE")
    if rank is None or size is None:
        given, missing = ("RANK", "WORLD_SIZE") if size is None else ("WORLD_SIZE", "RANK")
        raise UserError(
            f"the environment has {given}={environment[given]}, but no {missing}, so that it does not "
            f"say which process this is. Start all processes with torchrun, or take it away: unset {given}."
        )
    local_rank, local_size = _number(environment, "LOCAL_RANK"), _number(environment, "LOCAL_WORLD_SIZE")
    if size == 1 and local_rank is None:
        return None  # a job of one machine: nobody has started processes for its GPUs
    _require(rank < size, environment, "RANK", "WORLD_SIZE")
    if local_size is not None:
        _require((local_rank or 0) < local_size, environment, "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        _require(local_size <= size, environment, "LOCAL_WORLD_SIZE", "WORLD_SIZE")
    if size == 1:
        return Started(rank, size, local_rank, local_size)
    unknown = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not environment.get(name)]
    if unknown:
        raise UserError(
            f"the environment has RANK={rank} and WORLD_SIZE={size}, but no {' and no '.join(unknown)}, "
            "where the processes meet. Start them with torchrun, which sets all four, or for a run of one "
            "process: unset RANK WORLD_SIZE."
        )
    port = _number(environment, "MASTER_PORT") or 0
    launcher = _number(environment, LAUNCHER)
    return Started(rank, size, local_rank, local_size, environment["MASTER_ADDR"], port, launcher)


def _read_slurm(environment: Mapping[str, str]) -> Started:
    rank, size = _number(environment, "SLURM_PROCID"), _number(environment, "SLURM_STEP_NUM_TASKS")
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    address = environment.get("MASTER_ADDR") or first_host(nodes)
    if rank is None or size is None or not address:
        raise UserError(
            f"srun started {environment['SLURM_STEP_NUM_TASKS']} tasks, but SLURM_PROCID or "
            "SLURM_STEP_NODELIST is not in the environment, so that this process cannot find the others. "
            "Start it by srun itself, or set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT."
        )
    _require(rank < size, environment, "SLURM_PROCID", "SLURM_STEP_NUM_TASKS")
    job, step = _number(environment, "SLURM_JOB_ID") or 0, _number(environment, "SLURM_STEP_ID") or 0
    port = _number(environment, "MASTER_PORT") or SLURM_PORTS[(job + 101 * step) % len(SLURM_PORTS)]
    return Started(rank, size, _number(environment, "SLURM_LOCALID"), None, address, port)


def first_host(nodes: str) -> str:
    """The first host of Slurm's list: "rack[1-2]node[003-007,9],other1" -> "rack1node003"."""
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", nodes).split(",")[0]


def _number(environment: Mapping[str, str], name: str) -> int | None:
    value = environment.get(name, "")
    if not value:
        return None
    if not value.isascii() or not value.isdigit():
        raise UserError(f'the environment variable {name} is "{value}", which is no whole number. Unset it.')
    return int(value)


def _require(holds: bool, environment: Mapping[str, str], *names: str) -> None:
    if not holds:
        shown = " and ".join(f"{name}={environment.get(name, '')}" for name in names)
        raise UserError(
            f"the environment has {shown}, which contradict each other. Start all processes with one "
            "launcher, or unset what is left of another one."
        )


def let_segments_grow() -> None:
    """Blocks of GPU memory that grow, unless the user has set torch's allocator: steps have many lengths, and
    blocks of fixed size for each of them would pile up. It counts until the GPU is first used."""
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def resolve_engine(engine: str, num_processes: int) -> str:
    """The engine that trains: "auto" is "single" for one process and "ddp" for several.

    Raises:
        ConfigError: the engine is for one process, and there are more.
    """
    if engine == "auto":
        return "single" if num_processes == 1 else "ddp"
    if engine == "single" and num_processes > 1:
        raise ConfigError(
            f"engine: single trains with one process, and there are {num_processes} (--num-processes "
            f"{num_processes}, or what a launcher started). Write engine: auto, or use one process."
        )
    return engine


def choose_num_processes(engine: str, asked: int | None) -> int:
    """How many processes a run gets that no launcher started: those asked for, else one for each visible GPU.

    Raises:
        ConfigError: the engine is for one process, or there are fewer GPUs.
    """
    num_gpus = torch.cuda.device_count()
    if asked is None:
        return 1 if engine == "single" else max(1, num_gpus)
    resolve_engine(engine, asked)
    if 0 < num_gpus < asked:
        raise ConfigError(
            f"--num-processes {asked}, but {num_gpus} GPUs are visible, and each process needs one for "
            f"itself. Write --num-processes {num_gpus}, or look at CUDA_VISIBLE_DEVICES."
        )
    return asked


def check_num_processes(started: Started, asked: int | None) -> None:
    """
    Raises:
        ConfigError: the launcher started another number than the command asks for.
    """
    if asked is not None and asked != started.size:
        raise ConfigError(
            f"--num-processes {asked}, but a launcher started {started.size} (WORLD_SIZE or "
            "SLURM_STEP_NUM_TASKS). Leave --num-processes out: the launcher's number counts."
        )
