"""How long `make demo` takes on this machine: the demo itself, with a clock at each command that it runs.

Usage: python -m benchmarks.demo OUT.jsonl; needs no GPU. Everything is written to a temporary folder. One
JSON line; `load_average` says whether something else ran at the time.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.step import append_row, describe_machine

ROOT = Path(__file__).parents[1]
DIGITS = ROOT / "examples/digits"
# Seconds of each command, by its first argument; "data" is all before the first of them.
TIMED = """
import json, time
import demo

start, run, seconds = time.monotonic(), demo.run, {}

def timed(program, *arguments):
    begin = time.monotonic()
    seconds.setdefault("data", begin - start)
    run(program, *arguments)
    seconds[str(arguments[0])] = time.monotonic() - begin

demo.run = timed
demo.main()
seconds["total"] = time.monotonic() - start
print("SECONDS", json.dumps(seconds))
"""
STAGES = {"data": "data", "train": "training", "export": "export", "total": "total"}


def main() -> None:
    out = Path(sys.argv[1])
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "examples").symlink_to(ROOT / "examples")
        row = {
            "cell": "digits demo",
            "command": "python -m benchmarks.demo OUT.jsonl",
            **describe_machine(),
            "num_cores": os.cpu_count(),
            "load_average": round(load, 2),
            **run_demo(folder),
            **read_steps(folder / "runs/digits/run/metrics.jsonl"),
        }
    append_row(out, row)


def run_demo(folder: Path) -> dict[str, float]:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(DIGITS)]),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    command = [sys.executable, "-c", TIMED]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stdout[-2000:] + done.stderr[-2000:])
    last = done.stdout.strip().splitlines()[-1]
    seconds = json.loads(last.removeprefix("SECONDS "))
    return {f"{name}_seconds": round(seconds[stage], 1) for stage, name in STAGES.items()}


def read_steps(path: Path) -> dict[str, Any]:
    records = [json.loads(line) for line in path.read_text().splitlines()]
    steps = [record for record in records if "loss" in record]
    return {
        "steps": steps[-1]["step"],
        "step_seconds_median": round(statistics.median(step["step_seconds"] for step in steps), 4),
        "last_loss": steps[-1]["loss"],
        "eval_loss": [record["eval_loss"] for record in records if "eval_loss" in record][-1],
    }


if __name__ == "__main__":
    main()
