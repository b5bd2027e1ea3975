"""Two processes by each way of starting them: they meet, fail as one with one message, and stop as one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from starting import start

HERE = Path(__file__).parent
LAUNCH = """
import sys
from partwise.engine.spawn import launch
size, module, *arguments = sys.argv[1:]
sys.exit(launch(int(size), arguments, module))
"""


def by_launch(environment: dict[str, str], arguments: list[str], size: int) -> list[subprocess.Popen[str]]:
    return [start([sys.executable, "-c", LAUNCH, str(size), *arguments], environment)]


def by_torchrun(environment: dict[str, str], arguments: list[str], size: int) -> list[subprocess.Popen[str]]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}", "-m"]
    return [start([sys.executable, *torchrun, *arguments], environment)]


def by_srun(environment: dict[str, str], arguments: list[str], size: int) -> list[subprocess.Popen[str]]:
    """Each process by itself, with nothing but what Slurm sets."""
    job = str(os.getpid() * 7 + time.monotonic_ns() % 1000)
    slurm = {"SLURM_STEP_NUM_TASKS": str(size), "SLURM_STEP_NODELIST": "localhost", "SLURM_JOB_ID": job}
    return [
        start([sys.executable, "-m", *arguments], {**environment, **slurm, "SLURM_PROCID": str(rank)})
        for rank in range(size)
    ]


WAYS = {"launch": by_launch, "torchrun": by_torchrun, "srun": by_srun}


class Run:
    """What was started in one way, and what it said."""

    def __init__(self, way: str, work: str, folder: Path, environment: dict[str, str], size: int) -> None:
        self.folder, self.began = folder, time.monotonic()
        path = os.pathsep.join([str(HERE), environment.get("PYTHONPATH", "")])
        self.processes = WAYS[way]({**environment, "PYTHONPATH": path}, ["ranks", work, str(folder)], size)

    def wait_until_ready(self) -> None:
        while len(list(self.folder.glob("ready-*"))) < 2:
            assert time.monotonic() - self.began < 60
            time.sleep(0.05)
        self.began = time.monotonic()

    def finish(self) -> Run:
        said = [process.communicate(timeout=60) for process in self.processes]
        self.seconds = time.monotonic() - self.began
        self.out, self.err = ("".join(texts) for texts in zip(*said, strict=True))
        self.codes = {process.returncode for process in self.processes}
        return self

    def pids(self) -> list[int]:
        return [int(path.name.removeprefix("process-")) for path in self.folder.glob("process-*")]


@pytest.fixture
def run(tmp_path: Path, environment: dict[str, str]) -> Iterator[Callable[..., Run]]:
    runs = []

    def make(way: str, work: str, size: int = 2) -> Run:
        runs.append(Run(way, work, tmp_path, environment, size))
        return runs[-1]

    yield make
    for pid in [
        pid for run in runs for pid in [*run.pids(), *(p.pid for p in run.processes if p.poll() is None)]
    ]:
        if is_alive(pid):
            os.kill(pid, signal.SIGKILL)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("way", WAYS)
def test_ranks_meet(run: Callable[..., Run], way: str) -> None:
    done = run(way, "meet").finish()
    assert done.codes == {0}, done.err
    assert sorted(done.out.splitlines()) == [f"rank {i} of 2, local {i} of 2, sum 3" for i in range(2)]


@pytest.mark.parametrize(
    ("way", "work"), [*((way, "fail_beside") for way in WAYS), ("launch", "fail"), ("srun", "fail")]
)
def test_a_fault_of_the_user_is_said_once_and_ends_all(run: Callable[..., Run], way: str, work: str) -> None:
    done = run(way, work).finish()
    message = "error: rank 1: data/train.jsonl:7: 3 images given, 2 placeholders in the messages.\n"
    assert done.err.startswith(message)
    assert way == "torchrun" or done.err == message  # torchrun adds a report of its own
    assert done.err.count("placeholders") == 1 and "closed by peer" not in done.err
    assert done.codes == {1} and done.seconds < 15


def test_a_fault_of_ours_is_one_traceback(run: Callable[..., Run]) -> None:
    done = run("launch", "crash").finish()
    assert done.err.startswith("rank 1 failed:\nTraceback") and done.err.count("Traceback") == 1
    assert done.err.endswith("ZeroDivisionError: a fault of ours\n")
    assert done.codes == {1} and done.seconds < 15


def test_no_rank_leaves_before_the_first_has_saved(run: Callable[..., Run]) -> None:
    """torchrun would take the exit code of a stopped rank for a failure, and end the one that saves."""
    done = run("launch", "save", size=3).finish()
    assert done.codes == {0}, done.err
    assert done.out.splitlines() == ["left when it was saved"] * 3


def test_a_fault_of_all_is_said_once(run: Callable[..., Run]) -> None:
    done = run("launch", "fail_together").finish()
    assert done.err.count("no such file") == 1 and len(done.err.splitlines()) == 1
    assert done.codes == {1}


@pytest.mark.parametrize("work", ["die", "die_beside"])
@pytest.mark.parametrize(
    ("way", "message"), [("launch", "was killed by SIGKILL"), ("srun", "gone without a word")]
)
def test_a_killed_rank_ends_all(run: Callable[..., Run], way: str, message: str, work: str) -> None:
    done = run(way, work).finish()
    (line,) = done.err.splitlines()
    assert line.startswith("error: rank 1 (process ") and message in line and "--resume" in line
    assert 0 not in done.codes and done.seconds < 15


def test_the_first_rank_fails_and_takes_the_store_with_it(run: Callable[..., Run]) -> None:
    done = run("srun", "fail_first").finish()
    lines = [line for line in done.err.splitlines() if "error:" in line]
    assert lines == ["error: data/train.jsonl:8: no messages."] and "Traceback" not in done.err
    assert done.codes == {1} and done.seconds < 15


def test_the_first_rank_killed_takes_the_store_with_it(run: Callable[..., Run]) -> None:
    done = run("srun", "die_first").finish()
    lines = [line for line in done.err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and lines[0].startswith("error: rank 0 (process ")
    assert 0 not in done.codes and done.seconds < 15


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_each_rank_once(run: Callable[..., Run], number: signal.Signals) -> None:
    """Sent to the whole process group, as a terminal does it."""
    stopping = run("launch", "stop")
    stopping.wait_until_ready()
    os.killpg(stopping.processes[0].pid, number)
    done = stopping.finish()
    assert sorted(done.out.splitlines()) == [f"rank {i} received [{number:d}]" for i in range(2)]
    assert done.err == "stopped after step 3\n"
    assert done.codes == {128 + number}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_what_does_not_note_it(run: Callable[..., Run], number: signal.Signals) -> None:
    waiting = run("launch", "wait")
    waiting.wait_until_ready()
    waiting.processes[0].send_signal(number)
    done = waiting.finish()
    assert done.codes == {128 + number} and done.err == "" and done.seconds < 5


def test_a_second_signal_ends_a_rank_that_does_not_stop(run: Callable[..., Run]) -> None:
    deaf = run("launch", "deaf")
    deaf.wait_until_ready()
    for _ in range(2):
        deaf.processes[0].send_signal(signal.SIGINT)
        time.sleep(0.5)
    done = deaf.finish()
    assert done.codes == {130} and done.err == "" and done.seconds < 10


@pytest.mark.parametrize("way", WAYS)
def test_a_config_that_cannot_be_is_said_once(tmp_path: Path, environment: dict[str, str], way: str) -> None:
    """By the command itself: before it starts any process, or by one of those that were started."""
    config = tmp_path / "config.yaml"
    config.write_text("model: {path: nowhere}\nparts: {language_model: full}\ndata: {train: rows.jsonl}\n")
    command = ["partwise.cli", "train", str(config)]
    if way == "launch":
        processes = [start([sys.executable, "-m", *command, "--num-processes", "2"], environment)]
    else:
        processes = WAYS[way](environment, command, 2)
    errors = "".join(process.communicate(timeout=60)[1] for process in processes)
    assert errors.count("output: missing") == 1 and errors.startswith("error: ")
    assert {process.returncode for process in processes} == {1}


def test_ranks_do_not_outlive_their_launcher(run: Callable[..., Run]) -> None:
    stopping = run("launch", "stop")
    stopping.wait_until_ready()
    stopping.processes[0].kill()
    deadline = time.monotonic() + 10
    while any(map(is_alive, stopping.pids())):
        assert time.monotonic() < deadline
        time.sleep(0.1)
