"""Several processes on this machine, started, watched and stopped as one.

Not by torch's elastic launcher: its signals go to data workers and verifiers, too; a second Ctrl-C leaves its
children behind; and it waits as long for the peers of a failed process as for a run that saves a checkpoint.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from types import FrameType

import torch.distributed as dist

from partwise.engine.launch import LAUNCHER, Started

POLL_SECONDS = 0.1
# For the others to see by themselves that one has failed; then they are killed.
GRACE_SECONDS = 5.0
RELAYED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
STOPPED = (128 + signal.SIGTERM, 128 + signal.SIGINT)


def launch(num_processes: int, argv: Sequence[str], module: str = "partwise.cli") -> int:
    """Run `python -m MODULE ARGV` as so many processes, and return their exit code.

    130 or 143 where a signal stopped them, 1 where one of them failed. Each signal that comes here reaches
    every process once; the second one ends what is left within seconds.
    """
    # The processes meet at a store that is here, on a port that the kernel chose: nobody can take it before.
    store = dist.TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(minutes=10)
    )
    processes: list[subprocess.Popen[bytes]] = []
    with relayed_signals() as signals:
        try:
            for rank in range(num_processes):
                started = Started(rank, num_processes, rank, num_processes, "127.0.0.1", store.port)
                processes.append(start_process(started, argv, module))
            codes = watch(processes, signals)
        finally:
            kill(processes)
    return report_end(processes, codes, signals)


def start_process(started: Started, argv: Sequence[str], module: str) -> subprocess.Popen[bytes]:
    threads = max(1, len(os.sched_getaffinity(0)) // started.size) if hasattr(os, "sched_getaffinity") else 1
    own = {**started.variables(), "TORCHELASTIC_USE_AGENT_STORE": "True", LAUNCHER: str(os.getpid())}
    # `python -m` would import from the working directory first, which the command itself does not.
    safe = [] if {"", str(Path.cwd())} & set(sys.path) else ["-P"]
    return subprocess.Popen(
        [sys.executable, *safe, "-m", module, *argv],
        env={"OMP_NUM_THREADS": str(threads), **os.environ, **own},
        stdin=subprocess.DEVNULL,
        # A group of its own, so that a terminal's Ctrl-C comes once, and from here.
        process_group=0,
    )


@contextmanager
def relayed_signals() -> Iterator[list[signal.Signals]]:
    """A block in which stop signals are noted in the list instead of ending this process."""
    noted: list[signal.Signals] = []

    def note(number: int, frame: FrameType | None) -> None:
        noted.append(signal.Signals(number))

    # Ignored from the start (nohup): the processes inherit that.
    before = {number: old for number in RELAYED if (old := signal.getsignal(number)) != signal.SIG_IGN}
    for number in before:
        signal.signal(number, note)
    try:
        yield noted
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def watch(
    processes: Sequence[subprocess.Popen[bytes]], signals: Sequence[signal.Signals]
) -> Mapping[int, int]:
    """The exit code of each rank that ended by itself; the others were killed, since one had failed."""
    num_sent = 0
    deadline = None
    codes: dict[int, int] = {}
    while len(codes) < len(processes) and (deadline is None or time.monotonic() < deadline):
        for number in signals[num_sent:]:
            num_sent += 1
            for process in processes:
                process.send_signal(number)
        for rank, process in enumerate(processes):
            if (code := process.poll()) is not None:
                codes[rank] = code
        stopped = {0, *STOPPED, *(-number for number in signals)}
        if deadline is None and (num_sent > 1 or set(codes.values()) - stopped):
            deadline = time.monotonic() + GRACE_SECONDS
        time.sleep(POLL_SECONDS)
    return codes


def kill(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """End what is left, with the data workers of each."""
    for process in processes:
        if process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def report_end(
    processes: Sequence[subprocess.Popen[bytes]], codes: Mapping[int, int], signals: Sequence[signal.Signals]
) -> int:
    """The exit code of all; a rank that was killed is named, since it could not say so itself."""
    if len(codes) == len(processes) and not any(codes.values()):
        return 0
    if signals and (len(codes) < len(processes) or is_stopped(codes, signals)):
        return 128 + signals[0]
    if len(codes) == len(processes) and len(ends := set(codes.values())) == 1 and ends <= set(STOPPED):
        return ends.pop()  # a signal that came to one of them stopped all
    for rank, code in sorted(codes.items()):
        if code < 0:
            name = signal.Signals(-code).name
            text = f"error: rank {rank} (process {processes[rank].pid}) was killed by {name}. {why(-code)}"
            print(text, file=sys.stderr, flush=True)
            break
    return 1


def is_stopped(codes: Mapping[int, int], signals: Sequence[signal.Signals]) -> bool:
    """Whether a process ended as a relayed signal asked it to."""
    return bool(set(codes.values()) & {code for number in signals for code in (128 + number, -number)})


def why(number: int) -> str:
    if number == signal.SIGKILL:
        cause = "The usual cause is that the machine ran out of memory (dmesg says so)."
    else:
        cause = "A library failed in it; its last lines stand above."
    return f"{cause} The run goes on from its newest checkpoint with --resume."
