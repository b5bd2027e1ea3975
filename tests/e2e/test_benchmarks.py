"""The benchmarks that need no GPU run, and what they promise holds in short, too."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def run_benchmark(environment, tmp_path):
    def run(name: str, *arguments: str) -> list[dict]:
        out = tmp_path / "rows.jsonl"
        command = [sys.executable, BENCHMARKS / f"{name}.py", out, *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        return [json.loads(line) for line in out.read_text().splitlines()]

    return run


def test_four_kills_lose_nothing(run_benchmark) -> None:
    """The same with 50 kills, and the other faults, are rows in benchmarks/results/faults.jsonl."""
    (row,) = run_benchmark("faults", "4", "kill -9")
    assert (row["fault"], row["tried"]) == ("kill -9", 4)
    assert {row[count] for count in ("lost_steps", "lost_checkpoints", "other_results")} == {0}


def test_the_stall_of_a_save_is_measured(run_benchmark) -> None:
    full, lora = run_benchmark("saves", "tiny full", "tiny lora")
    for row in (full, lora):
        assert row["copied"] and 0 < row["host_copy_bytes"] < row["save_bytes"]
        assert min(row["stall_seconds"], row["write_seconds"], row["stall_seconds_without_copy"]) > 0
    assert full["host_copy_bytes"] > 2 * lora["host_copy_bytes"]


def test_the_page_shows_the_rows_and_nothing_was_lost() -> None:
    table = runpy.run_path(str(BENCHMARKS / "fault_table.py"))
    assert table["PAGE"].read_text() == table["page"]()
    rows = [json.loads(line) for line in table["ROWS"].read_text().splitlines()]
    assert [row["fault"] for row in rows] == list(table["WHAT"])
    for row in rows:
        assert row["tried"] >= (50 if row["fault"] == "kill -9" else 10)
        counts = ("lost_steps", "lost_checkpoints", "other_results", "unclear_errors")
        assert not any(row[count] for count in counts), row
