"""Runs as pictures: what is read of metrics.jsonl, the panels, the PNG, and the page in a real browser."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from partwise.errors import CheckpointError
from partwise.plots import plot_runs
from partwise.plots.curves import COLORS, Stage, make_panels, read_curves, read_runs, smooth
from partwise.plots.page import MAX_POINTS, curves_page
from partwise.records import StepMetrics

BAD_NAME = "</script><img src=x onerror=alert(1)>"


def make_metrics(step: int, loss: float) -> StepMetrics:
    return StepMetrics(
        step=step,
        epoch=step / 10,
        loss=loss,
        grad_norm=1.25,
        grad_norms={"projector": 0.75, "language_model": 1.0},
        update_ratios={"projector": 4e-3},
        zero_gradient_fractions={"projector": 0.0},
        learning_rates={"projector": 1e-4, "language_model": 2e-5},
        num_input_tokens=3000,
        num_target_tokens=400,
        num_dropped={},
        step_seconds=0.5,
        data_wait_seconds=0.01,
        peak_memory_bytes=3 * 2**30,
    )


def write_run(folder: Path, steps: range, scale: float = 1.0, stages: tuple[str, ...] = ()) -> Path:
    """Of logged steps, a third of them in each stage; an evaluation after the last."""
    folder.mkdir(parents=True)
    with (folder / "metrics.jsonl").open("w") as file:
        for i, step in enumerate(steps):
            stage = {"stage": stages[i * len(stages) // len(steps)]} if stages else {}
            file.write(json.dumps(asdict(make_metrics(step, scale / step)) | stage) + "\n")
        file.write(json.dumps({"step": steps[-1], "eval_loss": scale / steps[-1]}) + "\n")
    return folder


@pytest.fixture(scope="module")
def three_runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("runs")
    stages = ("language model", "+ projector", "<b>+ tower</b>")
    return [
        write_run(root / "one", range(1, 61), 1.0, stages),
        write_run(root / "two", range(1, 61), 2.0),
        write_run(root / BAD_NAME.replace("/", "_"), range(1, 61), 3.0),
    ]


@pytest.fixture(scope="module")
def drawn(three_runs: list[Path]) -> tuple[Path, Path]:
    picture, page = plot_runs(three_runs)
    return picture, page


def test_smoothing_does_not_lag_and_keeps_the_ends():
    line = [float(value) for value in range(100)]
    assert smooth(line) == pytest.approx(line)
    noisy = [value + (-1) ** index * 5 for index, value in enumerate(line)]
    assert max(abs(a - b) for a, b in zip(smooth(noisy)[10:90], line[10:90], strict=True)) < 2
    assert smooth([1.0, 2.0]) == [1.0, 2.0]


def test_smoothing_passes_over_what_is_missing():
    assert smooth([1.0, None, 3.0], 1.0) == [1.0, 2.0, 3.0]
    assert smooth([None, None, None], 1.0) == [None, None, None]


def test_target_tokens_count_the_steps_between_logged_ones(tmp_path):
    run = read_curves(write_run(tmp_path / "run", range(10, 41, 10)), "run")
    assert run.steps == (10, 20, 30, 40)
    assert run.target_tokens == (4000, 8000, 12000, 16000)
    assert run.place("tokens", 25) == 8000 and run.place("tokens", 5) == 0 and run.place("steps", 25) == 25


def test_what_is_not_finite_is_left_out(tmp_path):
    folder = write_run(tmp_path / "run", range(1, 4))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(asdict(make_metrics(4, math.nan))) + "\n")
        file.write(json.dumps({"step": 4, "eval_loss": math.inf}) + "\n")
    run = read_curves(folder, "run")
    assert run.values["loss"][-1] is None and len(run.evals) == 1
    data = page_data(curves_page([run], make_panels([run]), "steps", 0.05))
    assert data["runs"][0]["values"]["loss"] == [1.0, 0.5, 0.33333, None]


def test_stages_are_the_stretches_with_one_name(three_runs):
    one, two, _ = read_runs(three_runs)
    assert one.stages == (
        Stage("language model", 0, 20),
        Stage("+ projector", 20, 40),
        Stage("<b>+ tower</b>", 40, 60),
    )
    assert two.stages == ()


def test_one_run_has_a_line_per_part_and_several_a_panel_per_part(three_runs):
    runs = read_runs(three_runs)
    alone = {panel.title: panel for panel in make_panels(runs[:1])}
    assert list(alone) == [
        "loss per target token (nats)",
        "gradient norm per part",
        "update / weights per part",
        "learning rate per part",
        "peak memory (GiB)",
        "input tokens per second",
    ]
    assert [line.label for line in alone["gradient norm per part"].lines] == ["projector", "language_model"]
    assert [line.label for line in alone["update / weights per part"].lines] == ["projector"]
    panels = {panel.title: panel for panel in make_panels(runs)}
    norms = panels["gradient norm: projector"]
    assert [line.label for line in norms.lines] == [run.name for run in runs]
    assert len({line.color for line in norms.lines}) == len({line.dash for line in norms.lines}) == 3
    assert "update / weights: language_model" not in panels


def test_runs_of_one_name_are_told_apart(tmp_path):
    folders = [write_run(tmp_path / name / "run", range(1, 3)) for name in ("a", "b")]
    assert [run.name for run in read_runs(folders)] == [str(folder) for folder in folders]


def test_the_picture_shows_each_run_in_its_color(drawn, three_runs):
    picture, _ = drawn
    assert picture == three_runs[0] / "plots" / "curves.png"
    colors = set(Image.open(picture).convert("RGB").getdata())
    assert {rgb(color) for color in COLORS[:3]} <= colors
    assert rgb(COLORS[4]) not in colors
    assert {(232, 238, 244), (246, 241, 228)} <= colors  # the bands of stages


def rgb(color: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(color[1:]))


def test_a_folder_without_steps_is_refused(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"metrics\.jsonl has no logged step, so there is nothing to draw"
    ):
        plot_runs([tmp_path])


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.tags.append((tag, dict(attributes)))


def page_data(page: str) -> dict:
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.S)
    assert found
    return json.loads(found[1])


def test_the_page_needs_nothing_else_and_no_name_becomes_a_tag(drawn):
    text = drawn[1].read_text()
    reader = Tags()
    reader.feed(text)
    names = [tag for tag, _ in reader.tags]
    assert names.count("script") == 2 and "img" not in names and "b" not in names and "link" not in names
    assert not [
        value for _, attributes in reader.tags for key, value in attributes.items() if key in ("src", "href")
    ]
    assert "default-src 'none'" in text
    data = page_data(text)
    assert data["runs"][2]["name"] == BAD_NAME.replace("/", "_")
    assert data["runs"][0]["stages"][2]["name"] == "<b>+ tower</b>"


def test_a_long_run_is_thinned_and_keeps_its_last_step(tmp_path):
    run = read_curves(write_run(tmp_path / "run", range(1, 2 * MAX_POINTS + 2)), "run")
    data = page_data(curves_page([run], make_panels([run]), "tokens", 0.1))
    (thin,) = data["runs"]
    assert thin["stride"] == 3 and len(thin["steps"]) <= MAX_POINTS
    assert thin["steps"][-1] == 2 * MAX_POINTS + 1 and len(thin["values"]["loss"]) == len(thin["steps"])
    assert (data["axis"], data["smoothing"]) == ("tokens", 0.1)


@pytest.mark.skipif(not shutil.which("chromium"), reason="no browser on this machine")
def test_a_browser_draws_all_lines_without_a_fault(drawn):
    """Scripts that fail leave no lines: each line is a path of what was logged and one of it smoothed."""
    command = [
        *("chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--dump-dom"),
    ]
    done = subprocess.run([*command, drawn[1].as_uri()], capture_output=True, text=True, timeout=60)
    paths = re.findall(r'<path d="M[^"]+L[^"]*"', done.stdout)
    # Loss, 2 norms, 1 ratio and tokens/s of 3 runs, twice; 2 learning rates and the memory once.
    assert len(paths) == 3 * (2 * 5 + 3)
    assert "NaN" not in "".join(paths)
    assert "&lt;b&gt;+ tower" in done.stdout and "<img" not in done.stdout
