"""A run with trackers as a user starts it: what is in them after training and after a resume."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from partwise.trackers import libraries


def read_events(run: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return events


def test_a_resumed_run_goes_on_in_its_trackers(toy, tmp_path, run_cli, monkeypatch) -> None:
    """A third tracker refuses everything: the run is told of it once, and the others have all steps."""
    pytest.importorskip("tensorboard")

    class Refusing:
        def __init__(self, run) -> None:
            self.run = run

        def log(self, numbers, step) -> None:
            raise OSError("no space left on device")

        log_samples = log

        def finish(self, failed) -> None:
            raise OSError("no space left on device")

    monkeypatch.setitem(libraries.TRACKERS, "trackio", Refusing)
    monkeypatch.setattr("partwise.preflight.packages.require_tracker", lambda name, what: None)
    config = toy.config(
        tmp_path,
        train__steps=4,
        train__save_every=2,
        track={"to": ["tensorboard", "trackio"], "samples": 3},
        data__eval=str(toy.train),
        evaluate={"rows": 2, "max_new_tokens": 4},
    )
    run = tmp_path / "run"
    done = run_cli("train", config)
    assert done.code == 0, done.err
    said = [line for line in done.out.splitlines() if line.startswith("warning: the tracker")]
    assert said == [
        "warning: the tracker trackio may lack records, training goes on: no space left on device"
    ]
    losses = {line["step"]: line["loss"] for line in read_lines(run) if "loss" in line}
    first = json.loads((run / "tracking.json").read_text())
    events = read_events(run)
    assert {e.step: e.value for e in events.Scalars("loss")} == pytest.approx(losses)
    texts = {e.step: e.tensor_proto.string_val[0].decode() for e in events.Tensors("samples/0/text_summary")}
    answers = [json.loads(line)["answer"] for line in (run / "samples.jsonl").read_text().splitlines()]
    assert "model:" not in texts[0] and texts[4].rstrip().endswith(f"model: {answers[0]}".rstrip())

    shutil.rmtree(run / "final")
    shutil.rmtree(run / "checkpoints/step-000004")
    resumed = run_cli("train", config, "--resume", "track.samples=0")
    assert resumed.code == 0, resumed.err
    assert json.loads((run / "tracking.json").read_text()) == first
    events = read_events(run)
    assert [e.step for e in events.Scalars("loss")] == [1, 2, 3, 4]
    assert {e.step: e.value for e in events.Scalars("loss")} == pytest.approx(losses)
    assert {"learning_rates/projector", "update_ratios/language_model", "tokens_per_second"} <= set(
        events.Tags()["scalars"]
    )
    assert set(events.Tags()["images"]) == {"samples/0-0", "samples/1-0", "samples/2-0"}


def read_lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
