"""`partwise cache`, and training on what it kept: the same run as with the tower, and whole folders."""

from __future__ import annotations

import json
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from starting import start, wait_for

FROZEN = {"projector": "full", "language_model": "full"}
LORA = {"projector": "full", "language_model": {"mode": "lora", "lora_rank": 2}}


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line] + [
        line["eval_loss"] for line in lines if "eval_loss" in line
    ]


@pytest.fixture
def make_config(toy: Any, tmp_path: Path) -> Callable[..., Path]:
    def make(name: str, **changes: object) -> Path:
        cached = {} if changes.pop("plain", False) else {"data__feature_cache": str(tmp_path / "cache")}
        defaults: dict[str, object] = {
            "parts": FROZEN,
            "data__eval": str(toy.held_out),
            "train__steps": 6,
            "train__save_every": 2,
        }
        return toy.config(tmp_path / name, **{**defaults, **cached, **changes})

    return make


@pytest.mark.parametrize("parts", [FROZEN, LORA], ids=["full", "lora"])
def test_a_run_without_the_tower_is_the_run_with_it(
    run_cli: Callable, make_config: Callable, toy: Any, parts: dict
) -> None:
    plain, kept = (
        make_config(name, parts=parts, train__save_every=None, plain=name == "plain")
        for name in ("plain", "kept")
    )
    assert run_cli("train", plain).code == 0
    done = run_cli("train", kept, "train.verify=sample")
    assert done.code == 0, done.err
    assert "features of 200 images are in the cache; 200 were made in" in done.out
    # A fresh process, with the tower and pixels, says what the run without them says.
    assert "verified in a fresh process: logits differ by" in done.out
    assert losses(kept.parent / "run") == pytest.approx(losses(plain.parent / "run"), rel=1e-5)
    files = [p.parent / "run" / "final" for p in (plain, kept)]
    name = "adapter_model.safetensors" if parts is LORA else "model.safetensors"
    trained, found = (load_file(folder / name) for folder in files)
    assert found.keys() == trained.keys()
    base = load_file(toy.base / "model.safetensors")
    for key, tensor in found.items():
        assert (tensor - trained[key]).norm() <= 1e-4 * trained[key].norm()
        if "vision_tower" in key:
            assert tensor.equal(base[key])
    assert parts is LORA or any("vision_tower" in key for key in found)


def test_a_run_that_stopped_goes_on_and_ends_where_it_would_have(
    run_cli: Callable, make_config: Callable
) -> None:
    whole, cut = make_config("whole"), make_config("cut")
    assert run_cli("train", whole).code == 0
    assert run_cli("train", cut).code == 0
    run = cut.parent / "run"
    for folder in (run / "final", run / "checkpoints" / "step-000006"):
        shutil.rmtree(folder)
    done = run_cli("train", cut, "--resume")
    assert done.code == 0, done.err
    assert "resuming from" in done.out
    assert "were made" not in done.out
    ends = [load_file(c.parent / "run" / "final" / "model.safetensors") for c in (whole, cut)]
    assert all(ends[0][key].equal(ends[1][key]) for key in ends[0])


def test_cache_says_what_it_did_and_keeps_it(run_cli: Callable, make_config: Callable) -> None:
    config = make_config("run")
    first = run_cli("cache", config)
    assert first.code == 0, first.err
    assert "features of the images of 200 rows" in first.out
    assert "200 were made in" in first.out
    assert "which spares a step about" in first.out
    assert "0 were made" in run_cli("cache", config).out
    checked = run_cli("check", config)
    assert checked.code == 0, checked.out
    assert "no step runs the vision tower" in checked.out
    assert "blank features" in checked.out
    # A later stage on what this one trained has the same tower.
    assert run_cli("train", config).code == 0
    final = config.parent / "run" / "final"
    assert "0 were made" in run_cli("cache", config, f"model.path={final}").out


def test_ranks_fill_a_share_each_and_train_as_one(
    run_cli: Callable, make_config: Callable, environment: dict[str, str], tmp_path: Path
) -> None:
    parts = {"train__steps": 3, "train__save_every": None}
    alone, together = (make_config(name, **parts) for name in ("alone", "together"))
    command = [sys.executable, "-m", "partwise.cli", "train", together, "--num-processes", "2", "engine=fsdp"]
    process = start(command, environment)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "features of 200 images are in the cache; 200 were made" in out
    assert run_cli("train", alone).code == 0
    assert losses(together.parent / "run") == pytest.approx(losses(alone.parent / "run"), rel=1e-5)


def test_cache_without_a_folder_is_refused(run_cli: Callable, make_config: Callable) -> None:
    done = run_cli("cache", make_config("run", plain=True))
    assert done.code == 1
    assert done.err.startswith("error: there is no data.feature_cache, and no objective.reference_cache.")


def test_preview_shows_rows_of_a_run_with_a_cache_that_is_empty(
    run_cli: Callable, make_config: Callable
) -> None:
    done = run_cli("preview", make_config("run"))
    assert done.code == 0, done.err
    assert "What color is the square?" in done.out


def test_a_killed_cache_goes_on_beside_another_that_writes_the_same(
    run_cli: Callable, make_config: Callable, environment: dict[str, str], tmp_path: Path
) -> None:
    config = make_config("run")
    command = [sys.executable, "-m", "partwise.cli", "cache", config]
    killed = start(command, environment)
    wait_for(lambda: any(tmp_path.glob("cache/*/??/*")), killed)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    both = [start(command, environment) for _ in range(2)]
    for process in both:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert "features of 200 images are in the cache" in out
    assert "features of 200 images are in the cache; 0 were made\n" in run_cli("cache", config).out
