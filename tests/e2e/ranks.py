"""A rank that does what its arguments say: see test_launch.py. Each prints one line per event."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from partwise.engine.join import joined
from partwise.engine.launch import started_ranks
from partwise.engine.ranks import Ranks
from partwise.errors import DataError, StoppedError, UserError


def say(text: str) -> None:
    os.write(1, f"{text}\n".encode())  # whole lines, from several processes


def meet(ranks: Ranks, folder: Path) -> None:
    total = ranks.sum(torch.tensor(ranks.rank + 1.0)).item()
    say(f"rank {ranks.rank} of {ranks.size}, local {ranks.local_rank} of {ranks.local_size}, sum {total:g}")


def fail(ranks: Ranks, folder: Path) -> None:
    if ranks.rank == 1:
        raise DataError("data/train.jsonl:7: 3 images given, 2 placeholders in the messages.")
    ranks.barrier()


def crash(ranks: Ranks, folder: Path) -> None:
    ranks.barrier()
    if ranks.rank == 1:
        raise ZeroDivisionError("a fault of ours")
    dist.barrier()


def fail_first(ranks: Ranks, folder: Path) -> None:
    """The rank that holds the store which decides who was first."""
    ranks.barrier()
    if ranks.is_first:
        raise DataError("data/train.jsonl:8: no messages.")
    time.sleep(600)


def fail_beside(ranks: Ranks, folder: Path) -> None:
    """The other rank waits where nothing that fails can wake it, as in a collective of NCCL."""
    if ranks.is_first:
        time.sleep(600)
    fail(ranks, folder)


def fail_together(ranks: Ranks, folder: Path) -> None:
    raise DataError("data/train.jsonl: no such file.")


def die(ranks: Ranks, folder: Path) -> None:
    ranks.barrier()
    if ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    ranks.barrier()


def die_beside(ranks: Ranks, folder: Path) -> None:
    if ranks.is_first:
        time.sleep(600)
    os.kill(os.getpid(), signal.SIGKILL)


def die_first(ranks: Ranks, folder: Path) -> None:
    ranks.barrier()
    if ranks.is_first:
        os.kill(os.getpid(), signal.SIGKILL)
    ranks.barrier()


def stop(ranks: Ranks, folder: Path) -> None:
    """Counts signals, and ends as a run does: all after the same step, rank 0 when it has saved."""
    received: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: received.append(number))
    ranks.barrier()
    (folder / f"ready-{ranks.rank}").touch()
    while not ranks.any(bool(received)):
        time.sleep(0.05)
    if ranks.is_first:
        time.sleep(1.0)
    say(f"rank {ranks.rank} received {received}")
    raise StoppedError("stopped after step 3", signal.Signals(received[0]))


def wait(ranks: Ranks, folder: Path) -> None:
    """In the middle of something that notes no signals."""
    ranks.barrier()
    (folder / f"ready-{ranks.rank}").touch()
    if ranks.is_first:
        time.sleep(600)
    ranks.barrier()


def save(ranks: Ranks, folder: Path) -> None:
    ranks.barrier()
    if ranks.is_first:
        time.sleep(1.0)
        (folder / "saved").touch()


def deaf(ranks: Ranks, folder: Path) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    wait(ranks, folder)


WORKS = (
    meet,
    fail,
    fail_first,
    fail_beside,
    fail_together,
    crash,
    die,
    die_beside,
    die_first,
    stop,
    wait,
    deaf,
    save,
)


def main() -> None:
    work = {function.__name__: function for function in WORKS}
    folder = Path(sys.argv[2])
    (folder / f"process-{os.getpid()}").touch()
    try:
        with joined(started_ranks()) as ranks:
            work[sys.argv[1]](ranks, folder)
        if sys.argv[1] == "save":
            say("left when it was saved" if (folder / "saved").exists() else "left early")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except StoppedError as error:
        print(error, file=sys.stderr)
        sys.exit(128 + error.signal)


if __name__ == "__main__":
    main()
