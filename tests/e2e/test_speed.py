"""The benchmark of contenders: its floors, its rows, its search, its page, and one small run of all of it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

from benchmarks.speed import __main__ as command
from benchmarks.speed import report
from benchmarks.speed.cells import CELLS, TINY
from benchmarks.speed.contenders import TITLES
from benchmarks.speed.contenders.batch import Collate
from benchmarks.speed.contenders.mask import probe_mask, window_is_kept
from benchmarks.speed.contenders.measure import (
    Attempt,
    Clock,
    Job,
    Setting,
    Step,
    affordable_steps,
    find_fastest,
    measure,
)
from benchmarks.speed.contenders.model import open_processor
from benchmarks.speed.contenders.partwise import write_config
from benchmarks.speed.floor import PEAK_RATE, floor_seconds, floor_tokens_per_second, seen_pairs
from benchmarks.speed.mixtures import MIXTURES, Lengths, draw_rows
from benchmarks.speed.rows import write_rows
from benchmarks.speed.settings import FASTEST
from partwise.config import load_config
from partwise.data.loader import StepLoader
from partwise.tiny import write_tiny

ROOT = Path(__file__).parents[2]
# Tokens per second at 790 TFLOP/s, worked out by another program from the same mixtures.
FLOORS = {
    "C1": 33_500,
    "C3": 49_400,
    "C4": 29_000,
    "C5": 40_800,
    "C6": 41_800,
    "C7": 29_000,
    "C8": 25_200,
    "C8-cached": 58_800,
    "C9": 12_400,
    "C10": 57_800,
    "C11": 23_200,
}


@pytest.mark.parametrize("name", FLOORS)
def test_floors_are_those_of_another_reckoning(name: str) -> None:
    assert floor_tokens_per_second(CELLS[name], num_rows=8000) == pytest.approx(FLOORS[name], rel=0.02)


def test_a_floor_by_hand() -> None:
    """Llama-3.1-8B with adapters of rank 16 on one row of 4,096 tokens of which 4,072 are targets."""
    layer = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336
    adapter = 16 * (2 * 8192 + 2 * 5120 + 3 * 18432)
    operations = 4 * 32 * layer * 4096 + 4 * 128256 * 4096 * 4072 + 6 * 32 * adapter * 4096
    operations += 3.5 * 4 * 4096 * 32 * 4096 * 4097 / 2
    row = Lengths(4096, 4072)
    assert draw_rows("4k", 1) == [row]
    assert floor_seconds(CELLS["C11"], [row]) == pytest.approx(operations / PEAK_RATE, rel=1e-12)


def test_pairs_are_those_of_a_written_out_mask() -> None:
    sizes = {"text": {**TINY["text"], "sliding_window": 5}, "mm_tokens": 4}
    length, image = 12, range(3, 7)
    seen = 0
    for window in (5, length):
        for query in range(length):
            for key in range(length):
                seen += query - window < key <= query or (query in image and key in image and key > query)
    assert seen_pairs(sizes, Lengths(length, 3, num_images=1)) == seen


@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures_are_the_same_each_time(name: str) -> None:
    rows = draw_rows(name, 50)
    assert draw_rows(name, 60)[:50] == rows
    limits = [cell.max_seq_len for cell in CELLS.values() if cell.mixture == name]
    assert all(0 < row.num_targets < row.num_tokens <= min(limits) for row in rows)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny("gemma3", tmp_path_factory.mktemp("speed") / "base", **TINY)


@pytest.fixture(scope="module")
def job(base: Path) -> Job:
    folder = base.parent / "tiny"
    write_rows(CELLS["tiny"], base, folder, num_rows=12)
    return Job("tiny", base, folder, 2, 1, 1, (1, 2, 4), seconds=60, num_workers=0)


def test_rows_have_their_lengths_and_come_in_the_order_of_the_steps(job: Job) -> None:
    samples = job.samples()
    batch = Collate(open_processor(job))(samples)
    lengths = draw_rows("tiny", 12)
    assert batch["attention_mask"].sum(1).tolist() == [row.num_tokens for row in lengths]
    assert (batch["labels"] >= 0).sum(1).tolist() == [row.num_targets for row in lengths]
    assert len(batch["pixel_values"]) == sum(row.num_images for row in lengths)
    written = [json.loads(line) for line in (job.folder / "rows.jsonl").read_text().splitlines()]
    loader = StepLoader(written, None, 0, 4, 2, seed=0, num_workers=0)  # type: ignore[arg-type]
    order = [row for step in range(3) for row in loader.step_rows(step)]
    assert [written[row]["messages"] for row in order] == [sample["messages"] for sample in samples]


def test_a_mask_is_judged_by_what_it_does(job: Job) -> None:
    model = AutoModelForImageTextToText.from_pretrained(job.base)
    batch = Collate(open_processor(job))(job.samples()[:1])
    del batch["labels"]
    right, reason = probe_mask(model, batch)
    assert right, reason
    without_blocks = {key: value for key, value in batch.items() if key != "token_type_ids"}
    right, reason = probe_mask(model, without_blocks)
    assert right is False and "only earlier ones" in reason
    with torch.no_grad():
        assert window_is_kept(model.eval(), batch, window=64)[0]
        assert not window_is_kept(model, batch, window=32)[0]


class Pretender:
    """Faster with every size, until memory runs out at micro-batches of 4 without checkpointing."""

    precision = ""

    def __init__(self) -> None:
        self.ran: list[Setting] = []

    def run(self, setting: Setting, num_steps: int) -> Iterator[Step]:
        self.ran.append(setting)
        if setting.micro_batch_size >= 4 and not setting.gradient_checkpointing:
            raise torch.OutOfMemoryError
        rate = {1: 10, 2: 20, 4: 30, 8: 25, 16: 99}[setting.micro_batch_size]
        yield from (Step(rate, 1.0, loss=len(self.ran)) for _ in range(num_steps))


def test_the_fastest_setting_is_found(job: Job) -> None:
    large = replace(job, name="C8", micro_batches=(1, 2, 4, 8, 16, 48), started=time.time())
    pretender = Pretender()
    fitting, tried = find_fastest(pretender, large, Clock(large))
    assert [attempt.setting for attempt in fitting] == [Setting(4, True), Setting(8, True), Setting(2, False)]
    order = [(4, False), (2, False), (4, True), (8, True)]
    assert [attempt.setting for attempt in tried] == pretender.ran == [Setting(*pair) for pair in order]
    assert [attempt.describe().get("tokens_per_second") for attempt in tried] == [None, 20, 30, 25]
    assert tried[0].describe()["error"] == "out of memory"
    late = replace(large, started=0.0)
    found = find_fastest(Pretender(), late, Clock(late))
    assert found[0][0].setting == Setting(2, False) and len(found[1]) == 2, "time was over once one fitted"


def test_a_setting_that_does_not_hold_out_gives_way_to_the_next(job: Job) -> None:
    late = replace(job, started=time.time())
    steps = [Step(10, 0.001, 1.0)] * 3
    fitting = [Attempt(Setting(4, False), steps), Attempt(Setting(2, False), steps)]
    found = measure(Pretender(), late, Clock(late), fitting)
    assert found["micro_batch_size"] == 2 and found["runs"] == 2 and found["tokens_per_second"] == 20
    with pytest.raises(SystemExit, match="out of memory"):
        measure(Pretender(), late, Clock(late), fitting[:1])


def test_measured_steps_fit_the_time(job: Job) -> None:
    job = replace(job, num_steps=15, num_warmup_steps=5, seconds=100, measure_until=0.5)
    for elapsed, numbers in ((0, (5, 15)), (38, (2, 4)), (99, (1, 2))):
        late = replace(job, started=time.time() - elapsed)
        assert affordable_steps(late, Clock(late), step_seconds=1.9) == numbers


def test_a_contender_that_fails_or_takes_too_long_says_so(job: Job) -> None:
    row = command.measure_one("hf", replace(job, seconds=0.2), [])
    assert row["error"] == "stopped after 0 seconds" and row["contender"] == "hf"
    assert "error" in command.run_contender("no_such_contender", job, patience=1.0)


@pytest.mark.parametrize("name", CELLS)
def test_our_settings_make_a_config(name: str, job: Job, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    cell_job = replace(job, name=name)
    path.write_text(json.dumps(write_config(cell_job)))
    assert load_config(path).train.global_batch_size == CELLS[name].rows_per_step
    assert set(FASTEST) == set(CELLS)


def row(contender: str, rate: int, cell: str = "C4", **changes: object) -> dict:
    return {
        "cell": cell,
        "contender": contender,
        "hardware": "a GPU",
        "num_gpus": 1,
        "date": "2026-01-01",
        "tokens_per_second": rate,
        "floor_fraction": 0.5,
        "floor_tokens_per_second": 2 * rate,
        "peak_memory_bytes": 2**31,
        "micro_batch_size": 8,
        "gradient_checkpointing": False,
        "mask_is_right": True,
        "mask_reason": "as it should be",
        **changes,
    }


def test_the_page_compares_with_the_fastest_right_mask() -> None:
    rows = [
        row("partwise", 3000),
        row("partwise", 9000, date="2025-12-31"),
        row("hf", 1000),
        row("hf-liger", 1500),
        row("hf-flash", 2500, mask_is_right=False, mask_reason="images are cut"),
        row("partwise", 6000, cell="C10"),
        row("trl", 2000, hardware="another GPU"),
        row("hf", 1, date="2026-02-01", tokens_per_second=None, error="no | memory"),
        {**row("unsloth", 1), "error": "not | there"},
    ]
    page = report.page(rows)
    assert "| C4 | Partwise | 1 | 3,000 | 50% | 15% | 2.0 | 8 | right | 2.00 |" in page
    assert "| C10 | Partwise | 1 | 6,000 | 50% | 16% | 2.0 | 8 | right | 4.00 |" in page
    assert "| **wrong** |" in page and "images are cut" in page
    assert f"| C4 | {TITLES['hf']} | 1 | 1,000 |" in page, "a failure does not take the place of a figure"
    assert "Unsloth: not \\| there" in page
    assert "2.0 (C4) to 4.0 (C10) times" in page


def test_the_page_without_rows_says_so() -> None:
    assert "Nothing is measured yet" in report.page([])


def test_the_page_is_what_the_rows_give() -> None:
    rows, demo = report.read_rows(report.ROWS), report.read_rows(report.DEMO_ROWS)
    assert report.PAGE.read_text() == report.page(rows, demo)
    assert report.PLOT.is_file() == bool(report.measured(rows))


def test_the_plot_is_drawn(tmp_path: Path) -> None:
    report.draw(
        [row("partwise", 3000), row("hf", 1000), row("partwise", 4000, cell="C1")], tmp_path / "plot.png"
    )
    assert (tmp_path / "plot.png").stat().st_size > 5000


def test_contenders_train_the_same(environment: dict[str, str], tmp_path: Path) -> None:
    """A whole call on the CPU: the first losses of Partwise and of plain transformers are equal."""
    out = tmp_path / "rows.jsonl"
    options = "--cells tiny --contenders partwise hf --num-workers 0"
    numbers = "--steps 2 --warmup 1 --sweep-steps 1 --micro-batches 2 --time-limit 200"
    call = [sys.executable, "-m", "benchmarks.speed", str(out), *options.split(), *numbers.split()]
    done = subprocess.run(call, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    ours, hf = (json.loads(line) for line in out.read_text().splitlines())
    assert [ours.get("error"), hf.get("error")] == [None, None], (ours, hf)
    assert ours["run_id"] == hf["run_id"]
    assert ours["first_loss"] == pytest.approx(hf["first_loss"], rel=1e-4)
    assert "warning" not in hf
    assert ours["tokens_per_step"] == hf["tokens_per_step"] and ours["runs"] == hf["runs"] == 2
    assert hf["mask_is_right"]
    floor = hf["floor_tokens_per_second"]
    assert hf["floor_fraction"] == pytest.approx(hf["tokens_per_second"] / floor, rel=0.01)
    for found in (ours, hf):
        for name in ("method", "commit", "command", "versions", "hardware", "date", "peak_memory_bytes"):
            assert found[name], name
