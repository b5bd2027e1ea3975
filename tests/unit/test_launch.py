"""What a launcher says in the environment -> which process this is; how many processes a run gets."""

from __future__ import annotations

import pytest
import torch

from partwise.engine.join import check_gpus, connected_alone, exported, joined, place_ranks
from partwise.engine.launch import (
    Started,
    check_num_processes,
    choose_num_processes,
    first_host,
    resolve_engine,
    started_ranks,
)
from partwise.engine.ranks import Ranks
from partwise.errors import ConfigError, UserError

MEETING = {"MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", **MEETING}
# What sbatch -n 16 sets in its script, and srun in each of its tasks, according to their manual pages.
SBATCH = {
    "SLURM_JOB_ID": "4711",
    "SLURM_NTASKS": "16",
    "SLURM_NTASKS_PER_NODE": "8",
    "SLURM_JOB_NODELIST": "gpu[07-08]",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}
SRUN = {
    **SBATCH,
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
}


def without(environment: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name not in names}


@pytest.mark.parametrize(
    ("environment", "started"),
    [
        ({}, None),
        ({"MASTER_ADDR": "node1", "LOCAL_RANK": "0"}, None),
        ({"RANK": "", "WORLD_SIZE": ""}, None),
        (TORCHRUN, Started(5, 8, 1, 4, "node1", 29500)),
        ({**TORCHRUN, "PARTWISE_LAUNCHER": "77"}, Started(5, 8, 1, 4, "node1", 29500, 77)),
        ({"RANK": "1", "WORLD_SIZE": "2", **MEETING}, Started(1, 2, None, None, "node1", 29500)),
        # A job of one machine with several GPUs, whose operator sets these: nothing is started yet.
        ({"RANK": "0", "WORLD_SIZE": "1", **MEETING}, None),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, Started(0, 1, 0)),
        (SBATCH, None),
        # The shell of salloc, and terminals: one process.
        ({**SBATCH, "SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"}, None),
        ({**SRUN, "SLURM_PTY_PORT": "40001"}, None),
        (SRUN, Started(9, 16, 1, None, "gpu07", 15000 + 4711)),
        ({**SRUN, "SLURM_STEP_ID": "2"}, Started(9, 16, 1, None, "gpu07", 15000 + 4711 + 202)),
        ({**SRUN, **MEETING}, Started(9, 16, 1, None, "node1", 29500)),
        # torchrun in a task of srun.
        ({**SRUN, **TORCHRUN}, Started(5, 8, 1, 4, "node1", 29500)),
    ],
)
def test_what_a_launcher_says(environment, started):
    assert started_ranks(environment) == started


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (without(TORCHRUN, "WORLD_SIZE"), "has RANK=5, but no WORLD_SIZE.*unset RANK"),
        (without(TORCHRUN, "RANK"), "has WORLD_SIZE=8, but no RANK.*unset WORLD_SIZE"),
        (without(TORCHRUN, "MASTER_PORT"), "RANK=5 and WORLD_SIZE=8, but no MASTER_PORT, where"),
        (without(TORCHRUN, *MEETING), "no MASTER_ADDR and no MASTER_PORT"),
        ({**TORCHRUN, "RANK": "8"}, "RANK=8 and WORLD_SIZE=8, which contradict"),
        ({**TORCHRUN, "LOCAL_RANK": "4"}, "LOCAL_RANK=4 and LOCAL_WORLD_SIZE=4, which contradict"),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "9"}, "LOCAL_WORLD_SIZE=9 and WORLD_SIZE=8, which contradict"),
        ({**TORCHRUN, "RANK": "-1"}, 'variable RANK is "-1", which is no whole number'),
        ({**TORCHRUN, "MASTER_PORT": "http"}, 'MASTER_PORT is "http"'),
        (without(SRUN, "SLURM_PROCID"), "srun started 16 tasks, but SLURM_PROCID or"),
        (without(SRUN, "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"), "cannot find the others"),
        ({**SRUN, "SLURM_PROCID": "16"}, "SLURM_PROCID=16 and SLURM_STEP_NUM_TASKS=16, which contradict"),
    ],
)
def test_what_a_launcher_must_not_say(environment, message):
    with pytest.raises(UserError, match=message):
        started_ranks(environment)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node[003-007,9],other1", "node003"),
        ("node9", "node9"),
        ("a1,b[2-3]", "a1"),
        ("rack[1-2]node[01,04-08]", "rack1node01"),
        ("gpu-[7,9]-ib.cluster", "gpu-7-ib.cluster"),
        ("", ""),
    ],
)
def test_first_host(nodes, first):
    assert first_host(nodes) == first


def test_engines():
    assert resolve_engine("auto", 1) == "single" and resolve_engine("auto", 2) == "ddp"
    assert resolve_engine("zero3", 1) == "zero3" and resolve_engine("single", 1) == "single"
    with pytest.raises(ConfigError, match=r"engine: single .*--num-processes 2,"):
        resolve_engine("single", 2)


@pytest.mark.parametrize(
    ("num_gpus", "engine", "asked", "number"),
    [
        (0, "auto", None, 1),
        (0, "ddp", None, 1),
        (0, "auto", 3, 3),
        (4, "auto", None, 4),
        (4, "fsdp", None, 4),
        (4, "single", None, 1),
        (4, "auto", 1, 1),
        (4, "zero2", 2, 2),
    ],
)
def test_number_of_processes(monkeypatch, num_gpus, engine, asked, number):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    assert choose_num_processes(engine, asked) == number


def test_numbers_that_cannot_be(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(ConfigError, match="--num-processes 8, but 4 GPUs are visible"):
        choose_num_processes("auto", 8)
    with pytest.raises(ConfigError, match=r"engine: single"):
        choose_num_processes("single", 2)
    check_num_processes(Started(0, 2), 2)
    check_num_processes(Started(0, 2), None)
    with pytest.raises(ConfigError, match="--num-processes 4, but a launcher started 2"):
        check_num_processes(Started(0, 2), 4)


def test_places_that_the_launcher_did_not_say():
    hosts = ["a", "a", "b", "a"]
    placed = place_ranks(Ranks(3, 4), Started(3, 4), hosts)
    assert (placed.local_rank, placed.local_size) == (2, 3)
    placed = place_ranks(Ranks(3, 4), Started(3, 4, local_rank=1, local_size=2), hosts)
    assert (placed.local_rank, placed.local_size) == (1, 2)


NAMES = ["rank 0", "rank 1", "rank 2"]


@pytest.mark.parametrize(
    "taken",
    [
        [("a", 0, ""), ("a", 0, ""), ("b", 0, "")],
        [("a", 2, "x"), ("a", 2, "y"), ("b", 1, "x")],
        [("a", 1, "x"), ("a", 1, "y"), ("a", 1, "z")],  # each is shown its own one only
    ],
)
def test_a_gpu_for_each(taken):
    check_gpus(taken, NAMES, 2)


@pytest.mark.parametrize(
    ("taken", "message"),
    [
        (
            [("a", 1, "x"), ("b", 1, "x"), ("b", 1, "x")],
            "rank 2 is on the same GPU as rank 1: 2 processes run on b, and 1 of its GPUs are visible",
        ),
        ([("a", 2, "x"), ("a", 2, "y"), ("a", 2, "")], "rank 2 has no GPU: 2 processes run on a, and 2"),
        ([("a", 2, "x"), ("b", 0, ""), ("b", 0, "")], "rank 1 sees 0 GPUs, and rank 0 sees 2"),
    ],
)
def test_gpus_that_are_not_enough(taken, message):
    with pytest.raises(UserError, match=message):
        check_gpus(taken, NAMES, 2)


def test_one_process_needs_no_group():
    for started in (None, Started(0, 1, 0, 1)):
        with joined(started) as ranks:
            assert ranks == Ranks() and not torch.distributed.is_initialized()


def test_a_group_of_one(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for _ in range(2):
        with connected_alone():
            total = torch.ones(1)
            torch.distributed.all_reduce(total)
            assert total == 1 and started_ranks() == Started(0, 1, 0, 1)
        assert not torch.distributed.is_initialized() and started_ranks() is None


def test_a_group_of_another_is_left_alone():
    with (
        connected_alone(),
        pytest.raises(UserError, match=r"has a .* process group already"),
        joined(Started(0, 2, 0, 2, "localhost", 1)),
    ):
        pass


def test_exported_variables_are_put_back(monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with exported({"RANK": "0", "WORLD_SIZE": "1"}), pytest.raises(UserError):
        started_ranks({"RANK": "0"})
    with pytest.raises(UserError, match="RANK=3, but no WORLD_SIZE"):
        started_ranks()
