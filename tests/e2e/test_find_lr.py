"""`partwise find-lr` on a task that is really learned: the suggestion trains, the run folder is not made."""

from __future__ import annotations

import json

from PIL import Image

from partwise.config import load_config
from partwise.rates.sweep import sweep_rates
from partwise.training.job import Job


def test_the_suggested_rate_trains_and_the_run_folder_is_not_made(toy, tmp_path, run_cli) -> None:
    config = toy.config(tmp_path, train__global_batch_size=8)
    done = run_cli("find-lr", config, "--together", "--steps", "28", "--low", "1e-6", "--high", "3")
    assert done.code == 0, done.err
    assert not (tmp_path / "run").exists()
    folder = tmp_path / "run-find-lr"
    assert Image.open(folder / "find-lr.png").width > 400
    (record,) = json.loads((folder / "find-lr.json").read_text())
    rate = record["rate"]
    assert record["parts"] == ["vision_tower", "projector", "language_model"]
    assert 1e-4 < rate < 2e-2  # the other tests of this task train at 3e-3
    assert f"learning_rate: {rate:g}" in done.out and "suggested" in done.out
    assert len(record["rates"]) == len(record["losses"]) == len(record["smoothed"]) <= 28

    job = Job(load_config(config), only_looks=True)
    good = sweep_rates(job, (rate,) * 12, record["parts"])
    assert good.losses[-1] < 0.6 * good.first_loss and not good.has_diverged
    wild = sweep_rates(job, (3.0,) * 12, record["parts"])
    assert wild.losses[-1] > good.losses[-1]


def test_adapters_are_swept_alone(toy, tmp_path, run_cli) -> None:
    parts = {"vision_tower": "frozen", "projector": "full", "language_model": "lora"}
    config = toy.config(tmp_path, parts=parts, train__global_batch_size=4, train__micro_batch_size=4)
    done = run_cli("find-lr", config, "--steps", "20", "--out", tmp_path / "found")
    assert done.code == 0, done.err
    records = json.loads((tmp_path / "found/find-lr.json").read_text())
    assert [record["parts"] for record in records] == [["projector"], ["language_model"]]
    assert "lora r16" in done.out and "sweeping language_model from 1e-07 to 1 in 20 steps" in done.out


def test_what_cannot_be_swept_is_refused(toy, tmp_path, run_cli) -> None:
    frozen = run_cli("find-lr", toy.config(tmp_path, parts={"projector": "frozen"}))
    assert frozen.code == 1 and "nothing would train" in frozen.err
    config = toy.config(tmp_path)
    few = run_cli("find-lr", config, "--steps", "5")
    assert few.code == 1 and "--steps 5: a range test needs at least 20" in few.err
    swapped = run_cli("find-lr", config, "--low", "1", "--high", "0.1")
    assert swapped.code == 1 and "the lower one first" in swapped.err
