"""The predicted time of a run beside the real one."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median

import pytest

import partwise
from partwise.config import Config
from partwise.records import Finding

STEPS = {"train__steps": 30, "train__log_every": 10}
CONFIGS: dict[str, dict[str, object]] = {
    "images, all parts": {**STEPS, "train__micro_batch_size": 16},
    "adapters, four micro-batches": {
        **STEPS,
        "parts": {"language_model": {"mode": "lora", "lora_rank": 4}},
        "train__micro_batch_size": 4,
    },
}


def predicted(config: Config) -> dict[str, float]:
    (finding,) = partwise.check(config, only=["time"])
    return finding.values


@pytest.mark.parametrize("name", CONFIGS)
def test_a_run_takes_about_the_predicted_time(toy, tmp_path: Path, name: str) -> None:
    """Predicted before and after, since other processes may take half of the machine at any moment."""
    config = partwise.load_config(toy.config(tmp_path, **CONFIGS[name]))
    before = predicted(config)
    partwise.train(config)
    after = predicted(config)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    real = median(line["step_seconds"] for line in lines)
    low, high = sorted((before["step_seconds"], after["step_seconds"]))
    print(f"{name}: predicted {before['step_seconds']:.4f} and {after['step_seconds']:.4f}, real {real:.4f}")
    assert low / 2 < real < high * 2


def test_the_estimate_adds_up_and_says_what_it_is_made_of(
    toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four micro-batches and an update a step; 11 steps with an evaluation after each fifth and the last."""

    def find(**changes: object) -> Finding:
        settings = {"train__steps": 11, "train__micro_batch_size": 4, "train__save_every": 5}
        settings |= {"data__packing": False, **changes}
        config = partwise.load_config(toy.config(tmp_path, **settings))
        (finding,) = partwise.check(config, only=["time"])
        return finding

    plain = find()
    values = plain.values
    step = 4 * values["micro_batch_seconds"] + values["update_seconds"] + 16 * values["row_seconds"]
    assert values["step_seconds"] == pytest.approx(step)
    assert values["seconds"] == pytest.approx(11 * step) and values["num_evaluations"] == 0
    assert "for 11 steps of" in plain.message and "4 micro-batches of" in plain.message
    assert plain.message.endswith("; without checkpoints") and plain.level == "info"

    evaluated = find(data__eval=str(toy.held_out), train__eval_every=5).values
    assert evaluated["num_evaluations"] == 3 and evaluated["evaluation_seconds"] > 0
    assert evaluated["seconds"] == pytest.approx(
        11 * evaluated["step_seconds"] + 3 * evaluated["evaluation_seconds"]
    )
    assert find(data__eval=str(toy.held_out)).values["num_evaluations"] == 1


def test_processes_that_prepare_rows_take_their_time_meanwhile(toy, tmp_path: Path) -> None:
    config = partwise.load_config(toy.config(tmp_path, data__num_workers=2, data__packing=True))
    (finding,) = partwise.check(config, only=["time"])
    values = finding.values
    assert "1 micro-batch of" in finding.message  # all 16 rows fit into one pack
    computing = values["micro_batch_seconds"] + values["update_seconds"]
    assert values["step_seconds"] == pytest.approx(max(computing, 16 * values["row_seconds"] / 2))
    assert "each of 2 other processes prepares" in finding.message
