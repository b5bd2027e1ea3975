"""metrics.jsonl, the progress line, and what a step tells when a number is not finite."""

from __future__ import annotations

import json
import resource
from io import StringIO

import pytest
import torch
from rich.console import Console

from partwise.errors import TrainingError
from partwise.records import StepMetrics
from partwise.training.metrics import MetricsLog, ProgressLine, format_step, read_metrics
from partwise.training.step import StepOutcome, read_outcomes


def make_metrics(step: int, **changes) -> StepMetrics:
    values = {
        "step": step,
        "epoch": step / 10,
        "loss": 2.0 / step,
        "grad_norm": 1.25,
        "grad_norms": {"projector": 0.75, "language_model": 1.0},
        "update_ratios": {"projector": 4e-3, "language_model": 5e-4},
        "zero_gradient_fractions": {"projector": 0.0, "language_model": 0.75},
        "learning_rates": {"projector": 1e-4, "language_model": 2e-5},
        "num_input_tokens": 3000,
        "num_target_tokens": 400,
        "num_dropped": {},
        "step_seconds": 0.5,
        "data_wait_seconds": 0.01,
        "peak_memory_bytes": 3 * 2**30,
    }
    return StepMetrics(**{**values, **changes})


def test_each_line_is_on_disk_when_it_is_written(tmp_path):
    log = MetricsLog(tmp_path)
    log.write_step(make_metrics(1, num_dropped={"too long": 2}))
    record = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert record["loss"] == 2.0 and record["num_dropped"] == {"too long": 2}
    assert record.keys() == {
        "step", "epoch", "loss", "grad_norm", "grad_norms", "update_ratios", "zero_gradient_fractions",
        "learning_rates", "num_input_tokens", "num_target_tokens", "num_dropped", "step_seconds",
        "data_wait_seconds", "peak_memory_bytes",
    }  # fmt: skip
    log.write_eval(1, 1.5)
    assert list(read_metrics(tmp_path))[1] == {"step": 1, "eval_loss": 1.5}


def test_resuming_drops_later_and_torn_lines(tmp_path):
    log = MetricsLog(tmp_path)
    for step in (1, 2, 3):
        log.write_step(make_metrics(step))
    log.write_eval(3, 1.0)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    log = MetricsLog(tmp_path, last_step=2)
    log.write_step(make_metrics(3, loss=9.0))
    assert [(r["step"], r["loss"]) for r in read_metrics(tmp_path)] == [(1, 2.0), (2, 1.0), (3, 9.0)]


def test_a_full_disk_is_told(tmp_path):
    log = MetricsLog(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(TrainingError) as caught:
            log.write_step(make_metrics(1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(caught.value) == (
        f"cannot write {tmp_path}/metrics.jsonl: [Errno 27] File too large. Checkpoints are untouched: "
        "free space or make the folder writable, then resume."
    )
    # What was cut off is not a record.
    assert list(read_metrics(tmp_path)) == []


def test_a_plain_line_per_step_where_there_is_no_terminal():
    console = Console(file=StringIO(), width=40)
    with ProgressLine(10, 0, console) as progress:
        progress.show_step(make_metrics(2, num_dropped={"too long": 2, "no target token": 1}))
        progress.show_eval(2, 0.5)
    first, second = console.file.getvalue().splitlines()
    assert first.startswith(
        "step 2/10  loss 1.0000  norm 1.25  lr projector 1.00e-04,language_model 2.00e-05  "
        "update projector 4.0e-03,language_model 5.0e-04  zero gradients language_model 0.75  "
        "6,000 tokens/s  3.0 GiB  dropped 3  left 0:00:00"
    )
    assert second == "step 2/10  eval loss 0.5000"


def test_a_live_line_on_a_terminal():
    console = Console(file=StringIO(), force_terminal=True, width=160)
    with ProgressLine(10, 0, console) as progress:
        progress.show_step(make_metrics(2))
    text = console.file.getvalue()
    assert "loss 1.0000" in text and "\x1b[" in text


@pytest.mark.parametrize("width", [60, 80])
def test_the_live_line_wraps_in_a_narrow_terminal(width):
    console = Console(file=StringIO(), force_terminal=True, width=width, color_system=None)
    with ProgressLine(10, 0, console) as progress:
        progress.show_step(make_metrics(2))
    text = " ".join(console.file.getvalue().split())
    assert "loss 1.0000" in text and "left 0:00:00" in text and "\u2026" not in text


def test_one_rate_is_shown_without_part_names():
    line = format_step(make_metrics(2, learning_rates={"projector": 1e-4, "language_model": 1e-4}), 10, 75.0)
    assert "  lr 1.00e-04  " in line and line.endswith("left 0:01:15")


def make_outcome(step: int, *values: float) -> StepOutcome:
    rows = tuple(f"rows.jsonl:{step}{i}" for i in range(6))
    return StepOutcome(step, torch.tensor(values).double(), ("projector", "language_model"), rows, 9, 3, {})


def test_norms_combine_to_the_global_norm():
    values = read_outcomes([make_outcome(0, 1.5, 3.0, 4.0)])[0]
    assert (values.loss, values.grad_norm) == (1.5, 5.0)
    assert values.grad_norms == {"projector": 3.0, "language_model": 4.0}


def test_the_first_step_that_is_not_finite_is_named_with_parts_and_rows():
    nan = float("nan")
    outcomes = [
        make_outcome(0, 1, 2, 3),
        make_outcome(1, 1.5, float("inf"), 3),
        make_outcome(2, nan, nan, nan),
    ]
    with pytest.raises(TrainingError) as caught:
        read_outcomes(outcomes)
    assert str(caught.value) == (
        "step 2: the loss is 1.5 and the gradient norms are inf in projector, 3 in language_model; "
        "the rows are rows.jsonl:10, rows.jsonl:11, rows.jsonl:12, rows.jsonl:13 and 2 more. "
        "Nothing was saved after it. Look at these rows, lower the learning rate or lengthen the "
        "warm-up, and resume from the newest checkpoint."
    )
