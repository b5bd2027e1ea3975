"""`partwise train --num-processes`: one message for a fault of any rank, and runs that go on."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from starting import start, wait_for

from partwise.lineage.checksums import verify_files
from partwise.lineage.manifest import read_manifest
from partwise.training.checkpoint import newest_checkpoint

PARTWISE = Path(sys.executable).with_name("partwise")
SECONDS = 60  # for all ranks to end; a collective would wait for half an hour


def train(
    config: Path, environment: dict[str, str], *arguments: str, ranks: int = 2
) -> subprocess.Popen[str]:
    return start([PARTWISE, "train", config, "--num-processes", ranks, *arguments], environment)


def finish(process: subprocess.Popen[str]) -> tuple[int, str, list[str]]:
    """Exit code, what was printed, and the lines on stderr that are not torch's own notes."""
    out, err = process.communicate(timeout=SECONDS * 3)
    return process.returncode, out, [line for line in err.splitlines() if line and "Loading" not in line]


def losses(run: Path) -> dict[int, float]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record["loss"] for record in records if "loss" in record}


def children(process: subprocess.Popen[str]) -> list[int]:
    """Process ids of the ranks, in their order."""
    listed = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return sorted(int(pid) for pid in listed)


def test_what_the_checks_find_is_said_once(toy, tmp_path, environment) -> None:
    rows = tmp_path / "rows.jsonl"
    messages = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "A square."}]
    rows.write_text(json.dumps({"messages": messages, "images": ["gone.png"]}) + "\n")
    config = toy.config(tmp_path, engine="zero3", data__train=str(rows))
    code, _, err = finish(train(config, environment))
    assert code == 1 and len(err) == 1, err
    assert err[0].startswith("error: ") and "gone.png" in err[0]
    assert not (tmp_path / "run").exists()


def test_a_model_that_is_wholly_frozen_starts_no_process(toy, tmp_path, environment) -> None:
    frozen = dict.fromkeys(("vision_tower", "projector", "language_model"), "frozen")
    start = time.monotonic()
    code, _, err = finish(train(toy.config(tmp_path, engine="zero3", parts=frozen), environment, ranks=8))
    assert code == 1 and len(err) == 1 and err[0].startswith("error: nothing would train: ")
    assert time.monotonic() - start < SECONDS


def test_a_fault_of_one_rank_ends_all_and_the_run_goes_on(toy, tmp_path, environment) -> None:
    """A row that no check read: its image breaks on the rank that has it, while the other one waits."""
    shutil.copytree(toy.train.parent, tmp_path / "data")
    rows = tmp_path / "data/rows.jsonl"
    settings = {"engine": "fsdp", "data__train": str(rows), "train__steps": 10, "train__save_every": 1}
    config, run = toy.config(tmp_path, **settings), tmp_path / "run"
    broken = sorted((tmp_path / "data/images").iterdir())[33:]
    saved = {path: path.read_bytes() for path in broken}
    process = train(config, environment)
    wait_for(lambda: newest_checkpoint(run) is not None, process)
    for path in broken:
        path.write_bytes(b"no image")
    start = time.monotonic()
    code, _, err = finish(process)
    assert code == 1 and time.monotonic() - start < SECONDS
    assert len(err) == 1 and err[0].startswith("error: ") and "not in an image format" in err[0], err
    for path, content in saved.items():
        path.write_bytes(content)
    code, out, err = finish(train(config, environment, "--resume"))
    assert code == 0, err
    assert "resuming from" in out and sorted(losses(run)) == list(range(1, 11))


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_rank_is_named_and_the_run_goes_on_elsewhere(toy, tmp_path, environment, killed) -> None:
    settings = {"train__steps": 40, "train__save_every": 4, "engine": "zero2"}
    config, run = toy.config(tmp_path, **settings), tmp_path / "run"
    process = train(config, environment)
    wait_for(lambda: newest_checkpoint(run) is not None, process)
    pid = children(process)[killed]
    os.kill(pid, signal.SIGKILL)
    start = time.monotonic()
    code, _, err = finish(process)
    assert code == 1 and time.monotonic() - start < SECONDS
    assert len(err) == 1 and err[0].startswith(f"error: rank {killed} (process {pid}) was killed by SIGKILL.")
    assert "--resume" in err[0]
    checkpoint = newest_checkpoint(run)
    assert checkpoint is not None and verify_files(checkpoint, read_manifest(checkpoint) or {}) == []
    if killed:
        code, out, err = finish(train(config, environment, "--resume", "engine=auto", ranks=1))
        assert code == 0 and f"resuming from {checkpoint}" in out, err
        assert sorted(losses(run)) == list(range(1, 41))


def test_a_stop_signal_saves_once_and_the_next_step_follows(toy, tmp_path, environment) -> None:
    config, run = toy.config(tmp_path, train__steps=60, engine="fsdp"), tmp_path / "run"
    process = train(config, environment)
    wait_for(lambda: (run / "metrics.jsonl").exists() and len(losses(run)) > 2, process)
    os.killpg(process.pid, signal.SIGTERM)
    code, _, err = finish(process)
    done = max(losses(run))
    assert code == 143 and len(err) == 1
    assert err[0].startswith(f"stopped by SIGTERM after step {done} of 60; saved {run}/checkpoints/step-")
    assert newest_checkpoint(run) == run / f"checkpoints/step-{done:06d}"


def test_a_full_disk_of_one_rank_keeps_the_older_checkpoint(toy, tmp_path, environment) -> None:
    config, run = toy.config(tmp_path, train__steps=400, train__save_every=2, engine="fsdp"), tmp_path / "run"
    process = train(config, environment)
    wait_for(lambda: newest_checkpoint(run) is not None, process)
    resource.prlimit(children(process)[1], resource.RLIMIT_FSIZE, (10_000, 10_000))
    code, _, err = finish(process)
    assert code == 1 and len(err) == 1, err
    assert "cannot write" in err[0] and "File too large" in err[0]
    kept = newest_checkpoint(run)
    assert kept is not None and verify_files(kept, read_manifest(kept) or {}) == []
