"""Runs against a reference: its source changes no loss, and a resumed run has that of its beginning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from engines import curve, train_curve
from preferences import pair_rows

from partwise.engine.ranks import Ranks
from partwise.training.checkpoint import checkpoint_folder

LORA = {"language_model": {"mode": "lora", "lora_rank": 4, "learning_rate": 1e-2}}


@pytest.fixture(scope="module")
def values(tiny_folder, make_image, tmp_path_factory):
    """A config of four steps on seven pairs, with and without image, which are also evaluated."""
    folder = tmp_path_factory.mktemp("pairs")
    make_image().save(folder / "red.png")
    rows = pair_rows(["red.png", None, "red.png", None, None, "red.png", None])
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = str(folder / "pairs.jsonl")

    def make(output: Path, parts: dict[str, Any], **objective: Any) -> dict[str, Any]:
        return {
            "model": {"path": str(tiny_folder("gemma3")), "dtype": "float32"},
            "parts": parts,
            "data": {"train": file, "eval": file, "max_seq_len": 128, "num_workers": 0},
            "objective": {"loss": "dpo", **objective},
            "train": {
                "steps": 4,
                "global_batch_size": 4,
                "micro_batch_size": 2,
                "learning_rate": 1e-3,
                "save_every": 2,
                "keep_last": 9,
                "verify": "off",
            },
            "output": str(output),
        }

    return make


def test_all_sources_of_a_reference_give_the_same_run(values, tmp_path):
    cache = tmp_path / "references"
    disk = {"reference": "precomputed", "reference_cache": str(cache)}
    off, copied, made, again = (
        curve(train_curve("single", values(tmp_path / name, LORA, **objective), Ranks()))
        for name, objective in {"off": {}, "copy": {"reference": "copy"}, "made": disk, "again": disk}.items()
    )
    assert off[0][0] == pytest.approx(0.693147180559, abs=1e-9) and off[-2][0] < 0.68
    assert copied == off
    assert made == [pytest.approx(step, rel=1e-6) for step in off]
    assert again == made
    assert len(list(cache.iterdir())) == 1  # of the one file that is both


def test_numbers_on_disk_are_read_and_not_made_again(values, tmp_path):
    import numpy as np

    cache = tmp_path / "references"
    disk = {"reference": "precomputed", "reference_cache": str(cache)}
    made = curve(train_curve("single", values(tmp_path / "made", LORA, **disk), Ranks()))
    (file,) = cache.iterdir()
    with np.load(file) as found:
        rows = found["rows"]
    assert rows.shape == (14,) and np.isfinite(rows).all() and (rows < 0).all()
    rows[::2] += 5
    np.savez(file, rows=rows, others=np.empty(0))
    changed = curve(train_curve("single", values(tmp_path / "changed", LORA, **disk), Ranks()))
    assert changed[0][0] > made[0][0] + 0.1  # as if the chosen answers had been likelier before


def test_a_resumed_full_run_is_the_uninterrupted_one(values, tmp_path):
    full = {"projector": "full", "language_model": "full"}
    whole = train_curve("single", values(tmp_path / "run", full), Ranks())
    expected = curve(whole)
    assert expected[3][0] < expected[0][0] and checkpoint_folder(whole, 2).is_dir()
    resumed = train_curve("single", values(tmp_path / "run", full), Ranks(), resume_step=2)
    assert curve(resumed) == expected
