"""Trackers: nothing that they do stops or slows a run, and each library has the numbers after a resume."""

from __future__ import annotations

import re
import sqlite3
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
from PIL import Image

from partwise.config import load_config
from partwise.errors import ConfigError
from partwise.trackers import tracking as tracking_module
from partwise.trackers.libraries import TRACKERS, require_tracker
from partwise.trackers.tracker import Sample, TrackedRun
from partwise.trackers.tracking import Tracking, numbers_of

SAMPLE = Sample("rows.jsonl:1", (Image.new("RGB", (8, 6), "red"),), "Which color?", "red", "blue")


def make_run(folder: Path, first_step: int = 0) -> TrackedRun:
    config = {"train": {"seed": 3, "adam_betas": [0.9, 0.95]}, "output": "o"}
    return TrackedRun(folder, "project", "name", "abcd1234", first_step, config)


class Fake:
    def __init__(self) -> None:
        self.calls: list[tuple] = []

    def __call__(self, run: TrackedRun) -> Fake:
        self.calls.append(("start", run.name, threading.current_thread() is threading.main_thread()))
        return self

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        self.calls.append(("log", dict(numbers), step))

    def log_samples(self, samples: Sequence[Sample], step: int) -> None:
        self.calls.append(("samples", [sample.text for sample in samples], step))

    def finish(self, failed: bool) -> None:
        self.calls.append(("finish", failed))


class Failing(Fake):
    def log(self, numbers: Mapping[str, float], step: int) -> None:
        super().log(numbers, step)
        raise ConnectionError("no route\nto host")


def test_numbers_of_a_record():
    record = {
        "step": 3,
        "loss": 1.5,
        "grad_norms": {"projector": 2.0, "language_model": float("nan")},
        "num_input_tokens": 100,
        "step_seconds": 0.5,
        "stage": "first",
        "is_last": True,
    }
    assert numbers_of(record) == {
        "loss": 1.5,
        "grad_norms/projector": 2.0,
        "num_input_tokens": 100.0,
        "step_seconds": 0.5,
        "tokens_per_second": 200.0,
    }
    assert numbers_of({"step": 3, "checkpoint": "step-000003"}) == {}


def test_calls_come_in_order_in_another_thread(tmp_path):
    fake, told = Fake(), []
    with Tracking({"fake": fake}, make_run(tmp_path), told.append) as tracking:
        tracking.log_samples([SAMPLE], 0)
        tracking.log({"step": 1, "loss": 2.0})
        tracking.log({"step": 1, "warning": "loss spike"})
    assert fake.calls == [
        ("start", "name", False),
        ("samples", ["rows.jsonl:1\nprompt: Which color?\nanswer: red\nmodel: blue"], 0),
        ("log", {"loss": 2.0}, 1),
        ("finish", False),
    ]
    assert told == []


def test_a_run_that_failed_is_finished_as_failed(tmp_path):
    fake = Fake()
    with pytest.raises(ZeroDivisionError), Tracking({"fake": fake}, make_run(tmp_path), print):
        _ = 1 / 0
    assert fake.calls[-1] == ("finish", True)


def test_a_tracker_that_fails_is_told_once_and_tried_again(tmp_path):
    fake, failing, told = Fake(), Failing(), []
    with Tracking({"fake": fake, "failing": failing}, make_run(tmp_path), told.append) as tracking:
        for step in range(1, 6):
            tracking.log({"step": step, "loss": 1.0})
    assert told == [
        "warning: the tracker failing may lack records, training goes on: no route to host",
    ]
    assert len([call for call in failing.calls if call[0] == "log"]) == 5 and failing.calls[-1][0] == "finish"
    assert len(fake.calls) == 7


def test_a_tracker_that_does_not_start_is_left_out(tmp_path):
    def refuse(run: TrackedRun) -> Fake:
        raise OSError("disk full")

    told: list[str] = []
    with Tracking({"broken": refuse}, make_run(tmp_path), told.append) as tracking:
        for step in range(1, 4):
            tracking.log({"step": step, "loss": 1.0})
    assert told == ["warning: the tracker broken is left out, training goes on: disk full"]


def test_a_tracker_that_hangs_slows_nothing(tmp_path, monkeypatch):
    """200 steps while it hangs; the end waits for it as long as it may, and no longer."""
    monkeypatch.setattr(tracking_module, "FINISH_SECONDS", 0.3)
    monkeypatch.setattr(tracking_module, "MOST_WAITING", 100)
    release, told = threading.Event(), []

    class Hanging(Fake):
        def log(self, numbers: Mapping[str, float], step: int) -> None:
            release.wait()

    with Tracking({"hanging": Hanging()}, make_run(tmp_path), told.append) as tracking:
        start = time.monotonic()
        for step in range(1, 201):
            tracking.log({"step": step, "loss": 1.0})
        assert time.monotonic() - start < 0.2
    assert told == ["warning: the tracker hanging is left out, training goes on: 100 records wait for it"]
    with Tracking({"hanging": Hanging()}, make_run(tmp_path), told.append) as tracking:
        tracking.log({"step": 1, "loss": 1.0})
        start = time.monotonic()
    assert 0.25 < time.monotonic() - start < 2
    assert told[1] == "warning: the tracker hanging may lack records, training goes on: not done after 0 s"
    release.set()


@pytest.fixture
def run_twice(tmp_path: Path) -> Callable[[str], Path]:
    """Steps 1 to 4, then a resume after step 2 with steps 3 and 4 anew; the run folder."""

    def run(name: str) -> Path:
        told: list[str] = []
        with Tracking({name: TRACKERS[name]}, make_run(tmp_path), told.append) as tracking:
            tracking.log_samples([SAMPLE], 0)
            for step in range(1, 5):
                tracking.log({"step": step, "loss": float(step), "grad_norms": {"projector": 0.5}})
        with Tracking({name: TRACKERS[name]}, make_run(tmp_path, 2), told.append) as tracking:
            for step in (3, 4):
                tracking.log({"step": step, "loss": 10.0 * step})
        assert told == []
        return tmp_path

    return run


def test_tensorboard_has_one_curve_after_a_resume(run_twice):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_twice("tensorboard") / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1), (2, 2), (3, 30), (4, 40)]
    assert [e.step for e in events.Scalars("grad_norms/projector")] == [1, 2]
    (image,) = events.Images("samples/0-0")
    assert (image.width, image.height) == (8, 6)
    (text,) = events.Tensors("samples/0/text_summary")
    assert b"answer: red" in text.tensor_proto.string_val[0]


def test_wandb_offline_writes_one_run_id(run_twice, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = run_twice("wandb")
    runs = [path.name for path in (folder / "wandb").iterdir() if path.is_dir() and path.name != "latest-run"]
    # Two starts within a second get a number behind the id.
    assert runs and all(re.fullmatch(r"offline-run-\d+_\d+-abcd1234(-\d+)?", name) for name in runs)
    (written,) = {path.name for path in (folder / "wandb").rglob("*.wandb")}
    assert written == "run-abcd1234.wandb"
    assert [Image.open(path).size for path in (folder / "wandb").rglob("samples_*.png")] == [(8, 6)]
    content = b"".join(path.read_bytes() for path in (folder / "wandb").rglob("*.wandb"))
    assert b"grad_norms/projector" in content


def test_wandb_without_a_login_asks_nobody(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setattr(wandb, "login", lambda prompt: prompt)
    monkeypatch.setattr(wandb, "setup", lambda: type("S", (), {"settings": wandb.Settings(mode="online")}))
    with pytest.raises(
        ConfigError, match=r"no one is logged in\. Run wandb login, or set WANDB_MODE=offline"
    ):
        TRACKERS["wandb"](make_run(tmp_path))


def test_mlflow_goes_on_in_its_run(run_twice, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)
    run_twice("mlflow")
    client = mlflow.tracking.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("project").experiment_id])
    assert run.info.status == "FINISHED" and run.data.params["train.seed"] == "3"
    history = [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "loss")]
    assert sorted(history) == [(1, 1), (2, 2), (3, 3), (3, 30), (4, 4), (4, 40)]
    assert {f.path for f in client.list_artifacts(run.info.run_id, "samples/step-000000")} == {
        "samples/step-000000/0-0.png",
        "samples/step-000000/0.txt",
    }


def test_trackio_goes_on_in_its_run(run_twice, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    pytest.importorskip("trackio")
    run_twice("trackio")
    (database,) = (tmp_path / "trackio").glob("*.db")
    rows = sqlite3.connect(database).execute("select run_name, step from metrics").fetchall()
    assert {name for name, _ in rows} == {"name-abcd1234"}
    assert sorted(step for _, step in rows) == [0, 1, 2, 3, 3, 4, 4]


def test_a_missing_package_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("partwise.trackers.libraries.find_spec", lambda name: None)
    with pytest.raises(ConfigError) as caught:
        require_tracker("wandb", "c.yaml:4: track: wandb")
    assert str(caught.value) == (
        "c.yaml:4: track: wandb needs the package wandb, which is not installed. pip install wandb, or "
        '"partwise[trackers]" for all trackers.'
    )


CONFIG = "model: {path: m}\nparts: {projector: full}\ndata: {train: a.jsonl}\noutput: o\n"


def test_a_list_is_short_for_a_section(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(CONFIG + "track: [tensorboard, wandb]\n")
    short = load_config(path).tracking
    path.write_text(CONFIG + "track: {to: [tensorboard, wandb]}\n")
    assert short == load_config(path).tracking and short.to == ["tensorboard", "wandb"]
    assert load_config(path, ["track.name=mine"]).tracking.name == "mine"
    path.write_text(CONFIG)
    assert load_config(path).tracking is None


def test_an_unknown_tracker_is_named_with_its_line(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(CONFIG + "track: [tensorbord]\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(caught.value) == (
        f'{path}:5: track.0: "tensorbord" is not one of tensorboard, wandb, mlflow, trackio. '
        'Did you mean "tensorboard"?'
    )
