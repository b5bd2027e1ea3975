"""The precision check: rates that wreck or never reach the weights, and files of another type."""

from __future__ import annotations

import pytest
import torch

from partwise.config import load_config
from partwise.preflight import Context
from partwise.preflight.precision import check_precision, typical_size
from partwise.training.job import Job


@pytest.fixture
def findings(tiny_folder, tmp_path):
    def run(rate: float, mode: str = "full", dtype: str = "float32") -> list:
        path = tmp_path / "config.yaml"
        path.write_text(
            f"model: {{path: {tiny_folder('gemma3')}, dtype: {dtype}}}\nparts: {{language_model: {mode}}}\n"
            f"data: {{train: rows.jsonl}}\noutput: run\ntrain: {{learning_rate: {rate}}}\n"
        )
        return check_precision(Context(Job(load_config(path))))

    return run


@pytest.mark.parametrize(
    ("rate", "mode", "level"),
    [
        (1e-5, "full", "info"),
        (2e-4, "lora", "info"),
        (0.5, "full", "warning"),
        (0.5, "lora", "warning"),
        (1e-12, "full", "warning"),
    ],
)
def test_a_rate_is_judged_by_the_weights_it_moves(findings, rate, mode, level) -> None:
    (finding,) = findings(rate, mode)
    assert finding.level == level
    assert bool(finding.fix) == (level == "warning")
    assert finding.message.startswith("train.learning_rate")
    assert finding.values["update_fraction"] == pytest.approx(rate / finding.values["typical_weight"])


def test_files_of_another_type_are_said(findings) -> None:
    types, rate = findings(1e-5, dtype="bfloat16")
    assert types.level == rate.level == "info"
    assert "float32 tensors, and all become bfloat16" in types.message


def test_new_adapters_that_are_zero_do_not_count() -> None:
    assert typical_size([torch.zeros(4, 4), torch.full((4, 4), -0.5)]) == pytest.approx(0.5)
    assert typical_size([torch.zeros(4, 4)]) == 0.0
