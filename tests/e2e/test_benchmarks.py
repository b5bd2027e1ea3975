"""The benchmarks that need no GPU run, and what they promise holds in short, too."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import stages

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


@pytest.fixture
def scaling(monkeypatch) -> dict:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return runpy.run_path(str(BENCHMARKS / "scaling.py"))


def test_the_page_of_predictions_is_what_the_arithmetic_gives(scaling) -> None:
    assert scaling["PAGE"].read_text() == scaling["page"]()


def test_the_page_of_stages_has_what_was_measured() -> None:
    assert stages.page() == stages.PAGE.read_text()
    assert {row.split(" | ")[0].strip("| ") for row in stages.PAGE.read_text().splitlines()} >= set(
        stages.WAYS
    )


def test_a_prediction_by_hand(scaling) -> None:
    """Gemma-3-4B in full with fsdp on 64 GPUs, from its shape."""
    attention = 2 * 2560 * 2048 + 2 * 2560 * 1024
    layer = attention + 3 * 2560 * 10240 + 4 * 2560 + 2 * 256
    layers, root = 34 * layer, 262208 * 2560 + 2560
    case = scaling["case"]("Gemma-3-4B", "full")
    assert (case.num_trained, case.num_gathered) == (layers + root, 2 * layers + root)
    gathered, gradients = 2 * (2 * layers + root), 4 * (layers + root)
    moves = scaling["moved"](case, "fsdp", 64)
    assert moves.node == (gathered + gradients) * 7 / 8
    assert moves.network == 2 * (gradients / 8) * 7 / 8
    seconds = moves.node / 260e9 + moves.network / 50e9
    assert moves.seconds == pytest.approx(seconds) == pytest.approx(0.1679, rel=1e-3)
    compute = 4 * 2 * (layers + root) * 8192 / 400e12
    cells = scaling["row"](case, "fsdp", 64).split(" | ")
    assert cells[2:7] == ["25.99", "3.40", "168", f"{compute / (compute + seconds):.0%}", "2,163"]


def test_collectives_move_what_the_others_have(scaling) -> None:
    """Over any number of nodes a GPU receives all bytes but its own part, by one way or the other."""
    for num_gpus in (2, 8, 64, 512):
        moves = scaling["collected"](1.0, num_gpus)
        assert moves.node + moves.network == pytest.approx((num_gpus - 1) / num_gpus)


def test_the_head_beside_other_ways_to_compute_its_loss(run_benchmark) -> None:
    rows = run_benchmark("head", "small")
    ours, others = ([row for row in rows if ("ours" in row["cell"]) is is_ours] for is_ours in (True, False))
    assert len(ours) == 6 and len(others) == 4
    for row in ours:
        likes = [other for other in others if len(other["gradient_errors"]) == len(row["gradient_errors"])]
        assert likes
        for other in likes:
            pairs = zip(row["gradient_errors"], other["gradient_errors"], strict=True)
            assert all(mine <= theirs for mine, theirs in pairs)
