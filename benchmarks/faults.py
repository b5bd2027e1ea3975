"""What a run loses when it is killed, stopped, or robbed of its disk: at random moments, many times.

Usage: python benchmarks/faults.py OUT.jsonl [TIMES [FAULT ...]], on Linux; 50 times without TIMES. A tiny
Gemma-3 trains with a checkpoint every second step. After each fault the newest whole checkpoint must be the
one that was last reported, and intact; resumed to its end, the run must have the bits of one that was left
alone. Children are forked from a warm parent, so that a fault costs seconds. One JSON line per fault.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

import matplotlib.figure
import numpy as np
import torch
import yaml
from PIL import Image
from step import append_row, git_commit

from partwise import cli, run
from partwise.config import load_config
from partwise.lineage.checksums import verify_files
from partwise.lineage.manifest import read_manifest
from partwise.tiny import write_tiny
from partwise.training.checkpoint import newest_checkpoint, step_of, whole_checkpoints
from partwise.training.metrics import read_metrics
from partwise.training.state import state_file

NUM_STEPS = 24
SAVE_EVERY = 2
PARTS = {
    "full": {"vision_tower": "full", "projector": "full", "language_model": "full"},
    "lora": {"projector": "full", "language_model": {"mode": "lora", "learning_rate": 1e-2}},
}
CAPABILITIES = 0x20080522  # version 3 of Linux's struct of them
DAC_OVERRIDE = 1 << 1
TIMEOUT_SECONDS = 120


def main() -> None:
    out, times = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 50
    names = sys.argv[3:] or list(FAULTS)
    torch.set_num_threads(1)
    assert matplotlib.figure  # imported here for the plots of the children
    random.seed(0)
    with tempfile.TemporaryDirectory() as folder_name:
        folder = Path(folder_name)
        write_tiny("gemma3", folder / "base")
        write_rows(folder)
        for mode in PARTS:  # in this process, so that all imports are made before the first fork
            run.check(load_config(new_trial(folder, mode).folder / "config.yaml"))
        references = {mode: left_alone(folder, mode) for mode in PARTS}
        for name in names:
            row = run_fault(name, times, folder, references)
            append_row(out, row)


def write_rows(folder: Path) -> None:
    """Questions about small pictures of one colour, with noise."""
    rng = np.random.default_rng(0)
    rows = []
    for number, (word, color) in enumerate([("red", (220, 40, 40)), ("blue", (40, 60, 220))] * 32):
        pixels = np.clip(np.array(color) + rng.normal(0, 25, size=(28, 28, 3)), 0, 255)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
        messages = [
            {"role": "user", "content": "<image>What color is it?"},
            {"role": "assistant", "content": word},
        ]
        rows.append(json.dumps({"messages": messages, "images": [f"{number}.png"]}) + "\n")
    (folder / "rows.jsonl").write_text("".join(rows))


@dataclass(frozen=True)
class Reference:
    """A run that was left alone: its weights, and the seconds to its first step and from there to final/."""

    weights: bytes
    start_seconds: float
    train_seconds: float


@dataclass
class Trial:
    """One run folder and the process that works on it now."""

    folder: Path
    mode: str
    losses: Counter = field(default_factory=Counter)
    pid: int = 0
    first_step: int = 0
    obeys_modes: bool = False
    removed: set[int] = field(default_factory=set)  # steps of damaged checkpoints that were deleted as told

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def start(self) -> None:
        """`partwise train`, with --resume where the run has begun, in a forked child."""
        config = self.folder / "config.yaml"
        resume = ["--resume"] if (self.run / "config.yaml").exists() else []
        newest = newest_checkpoint(self.run)
        self.first_step = step_of(newest) if newest else 0
        self.pid = os.fork()
        if self.pid == 0:
            code = 99
            try:
                code = train_here(["partwise", "train", str(config), *resume], self.folder, self.obeys_modes)
            finally:
                os._exit(code)

    def wait(self) -> int:
        """The exit code; minus the signal where one ended it."""
        pid, self.pid = self.pid, 0
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def has_ended(self) -> bool:
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def wait_for_step(self) -> None:
        """Until this process has logged a step, or ended."""
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while not self.has_ended() and self.last_step("loss") <= self.first_step:
            assert time.monotonic() < deadline, f"no step within {TIMEOUT_SECONDS} s"
            time.sleep(0.005)

    def last_step(self, key: str) -> int:
        """The newest step with such a record: "loss" of a step, "checkpoint" of a reported save."""
        steps = {record["step"] for record in read_metrics(self.run) if key in record}
        return max(steps - self.removed if key == "checkpoint" else steps, default=0)

    def is_finished(self) -> bool:
        return (self.run / "final" / "partwise.json").is_file()

    @property
    def told(self) -> str:
        return (self.folder / "stderr").read_text()

    def count_lost(self, done: int | None = None) -> None:
        """The reported checkpoint must be there, intact; `done`: steps that must not be made again."""
        newest, reported = newest_checkpoint(self.run), self.last_step("checkpoint")
        kept = step_of(newest) if newest else 0
        intact = newest is None or not verify_files(newest, read_manifest(newest) or {})
        self.losses["lost_checkpoints"] += kept < reported or not intact
        self.losses["lost_steps"] += max(0, (reported if done is None else done) - kept)

    def note_error(self, is_clear: bool) -> None:
        self.losses["unclear_errors"] += not is_clear
        if not is_clear:
            print(f"not clear: {self.told}", file=sys.stderr)

    def finish(self, reference: Reference) -> None:
        """Resume to the end, and compare with the run that was left alone."""
        if not self.is_finished():
            self.start()
            assert self.wait() == 0, self.told
        self.losses["other_results"] += trained_weights(self.run) != reference.weights
        steps = [record["step"] for record in read_metrics(self.run) if "loss" in record]
        self.losses["lost_steps"] += NUM_STEPS - len(set(steps))
        self.losses["other_results"] += len(steps) != len(set(steps))
        shutil.rmtree(self.folder)


def train_here(argv: list[str], folder: Path, obeys_modes: bool) -> int:
    """The command in this process; what it prints goes to files in the folder."""
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if obeys_modes:
        obey_modes()
    sys.argv = argv
    try:
        cli.main()
    except SystemExit as stop:
        sys.stderr.flush()
        return int(stop.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
        return 70
    return 0


def obey_modes() -> None:
    """Read-only folders are read-only from now on, also for root."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, sets = (ctypes.c_uint32 * 2)(CAPABILITIES, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, sets) == 0
    sets[0] &= ~DAC_OVERRIDE
    assert libc.capset(header, sets) == 0


def trained_weights(run_folder: Path) -> bytes:
    return next((run_folder / "final").glob("*model.safetensors")).read_bytes()


def new_trial(folder: Path, mode: str) -> Trial:
    path = Path(tempfile.mkdtemp(dir=folder))
    config = {
        "model": {"path": str(folder / "base"), "dtype": "float32"},
        "parts": PARTS[mode],
        "data": {"train": str(folder / "rows.jsonl"), "max_seq_len": 128, "num_workers": 0},
        "train": {
            "steps": NUM_STEPS,
            "global_batch_size": 8,
            "micro_batch_size": 8,
            "learning_rate": 3e-3,
            "warmup_steps": 3,
            "save_every": SAVE_EVERY,
            "verify": "off",
        },
        "output": str(path / "run"),
    }
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    return Trial(path, mode)


def left_alone(folder: Path, mode: str) -> Reference:
    trial = new_trial(folder, mode)
    start = time.monotonic()
    trial.start()
    trial.wait_for_step()
    begun = time.monotonic()
    while not (trial.has_ended() or trial.is_finished()):
        time.sleep(0.005)
    ended = time.monotonic()
    assert trial.wait() == 0, trial.told
    return Reference(trained_weights(trial.run), begun - start, ended - begun)


# Each does one fault to the trial and leaves it ended; True where the fault met a run that was going on.


def kill(trial: Trial, reference: Reference) -> bool:
    """One kill in five falls into the start, all others anywhere from the first step to the end."""
    trial.start()
    if random.random() < 0.2:
        time.sleep(random.uniform(0, reference.start_seconds))
    else:
        wait_within(trial, reference)
    os.kill(trial.pid, signal.SIGKILL)
    met = trial.wait() == -signal.SIGKILL
    trial.count_lost()
    return met


def wait_within(trial: Trial, reference: Reference) -> None:
    """Until a random moment between the first step and the end of this process."""
    trial.wait_for_step()
    time.sleep(random.uniform(0, reference.train_seconds * (1 - trial.first_step / NUM_STEPS)))


def stop(number: signal.Signals) -> Callable[[Trial, Reference], bool]:
    def fault(trial: Trial, reference: Reference) -> bool:
        trial.start()
        wait_within(trial, reference)
        os.kill(trial.pid, number)
        code = trial.wait()
        if code == 128 + number and "; saved " in trial.told:
            trial.count_lost(done=trial.last_step("loss"))
            return True
        # The signal came when all steps were done: it ends the command, and nothing can be lost.
        assert code in (0, -number, 128 + number), trial.told
        trial.count_lost()
        return False

    return fault


def fill_disk(trial: Trial, reference: Reference) -> bool:
    """From a random moment on no file can grow past a few KiB, as on a full disk."""
    trial.start()
    wait_within(trial, reference)
    if trial.has_ended():
        return trial.wait() != 0
    resource.prlimit(trial.pid, resource.RLIMIT_FSIZE, (8192, 8192))
    code = trial.wait()
    assert code in (0, 1), trial.told
    trial.note_error(code == 0 or "File too large" in trial.told)
    trial.count_lost()
    return code == 1


def forbid_writing(trial: Trial, reference: Reference) -> bool:
    """From a random moment on the folder of checkpoints is read-only."""
    trial.obeys_modes = True
    trial.start()
    wait_within(trial, reference)
    checkpoints = trial.run / "checkpoints"
    if trial.has_ended() or not checkpoints.is_dir():
        return trial.wait() != 0
    checkpoints.chmod(0o555)
    code = trial.wait()
    assert code in (0, 1), trial.told
    trial.note_error(code == 0 or "Permission denied" in trial.told)
    checkpoints.chmod(0o755)
    trial.count_lost()
    return code == 1


def damage(change: Callable[[bytearray], bytearray]) -> Callable[[Trial, Reference], bool]:
    """A kill, and then the newest checkpoint's state is not what was written any more.

    The resumption must refuse, and the command that it names must go on from the checkpoint before.
    """

    def fault(trial: Trial, reference: Reference) -> bool:
        met = kill(trial, reference)
        if not met or trial.is_finished() or len(whole_checkpoints(trial.run)) < 2:
            return False
        older, newest = whole_checkpoints(trial.run)[-2:]
        path = newest / state_file()
        path.write_bytes(change(bytearray(path.read_bytes())))
        trial.start()
        code = trial.wait()
        advice = f"{older} is intact. To go on from there: rm -r {newest} && partwise train"
        trial.note_error(code == 1 and advice in trial.told)
        shutil.rmtree(newest)
        trial.removed.add(step_of(newest))
        return True

    return fault


def truncate(data: bytearray) -> bytearray:
    return data[: random.randrange(len(data))]


def flip_bit(data: bytearray) -> bytearray:
    position = random.randrange(8 * len(data))
    data[position // 8] ^= 1 << position % 8
    return data


# name -> the fault, and the share of TIMES that it is tried.
FAULTS: dict[str, tuple[Callable[[Trial, Reference], bool], float]] = {
    "kill -9": (kill, 1),
    "SIGTERM": (stop(signal.SIGTERM), 0.2),
    "SIGINT": (stop(signal.SIGINT), 0.2),
    "full disk": (fill_disk, 0.2),
    "read-only folder": (forbid_writing, 0.2),
    "truncated file": (damage(truncate), 0.2),
    "flipped bit": (damage(flip_bit), 0.2),
}
COUNTS = ("lost_steps", "lost_checkpoints", "other_results", "unclear_errors")


def run_fault(name: str, times: int, folder: Path, references: dict[str, Reference]) -> dict:
    """The fault as often as it shall be met, half with full training and half with LoRA."""
    fault, share = FAULTS[name]
    tried, losses, num_runs = 0, Counter(), 0
    for number, mode in enumerate(PARTS):
        wanted = max(1, round(times * share)) * (number + 1) // len(PARTS)
        while tried < wanted:
            trial, num_runs = new_trial(folder, mode), num_runs + 1
            while tried < wanted and not trial.is_finished():
                tried += fault(trial, references[mode])
            trial.finish(references[mode])
            losses += trial.losses
    return {
        "fault": name,
        "tried": tried,
        **{count: losses[count] for count in COUNTS},
        "num_runs": num_runs,
        "steps_per_run": NUM_STEPS,
        "save_every": SAVE_EVERY,
        "command": f"python benchmarks/faults.py OUT.jsonl {times} '{name}'",
        "commit": git_commit(),
        "hardware": f"{platform.machine()} CPU, one thread",
        "versions": {n: version(n) for n in ("torch", "transformers", "peft", "safetensors")}
        | {"python": platform.python_version()},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


if __name__ == "__main__":
    main()
