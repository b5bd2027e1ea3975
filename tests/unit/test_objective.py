"""The objective section: its defaults, faults of keys that a loss does not read, and what its page says."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest
import torch

from partwise.config import ObjectiveConfig, load_config
from partwise.config.objective import BETAS, READ_BY, SHAPES, Loss, check_objective
from partwise.data.sources import READS
from partwise.errors import ConfigError
from partwise.training.preference import log_one_minus_exp
from partwise.training.reference import reference_source

PAGE = (Path(__file__).parents[2] / "docs" / "objectives.md").read_text(encoding="utf-8")


ALONE = {"span": SimpleNamespace(name=""), "has_own_rows": False}


def faults(**keys):
    return [fault.text for fault in check_objective(ObjectiveConfig(**keys))]


def test_each_key_is_read_by_some_loss_and_each_loss_has_rows():
    assert set(READ_BY) == set(ObjectiveConfig.model_fields) - {"loss"}
    assert set(SHAPES) == set(get_args(Loss)) == {"sft", "text"} | set(BETAS)
    assert set(SHAPES.values()) == set(READS)


def test_a_key_without_effect_is_a_fault():
    assert faults(loss="sft", beta=0.1) == [
        "objective.beta: 0.1 has no effect: objective.loss sft does not read it, but dpo, orpo, simpo, kto. "
        "Remove it, or change the loss."
    ]
    assert faults(loss="orpo", reference="copy")[0].startswith('objective.reference: "copy" has no effect')
    assert "objective.variant ipo" in faults(loss="dpo", variant="ipo", label_smoothing=0.1)[0]
    assert "keeps nothing on disk" in faults(loss="dpo", reference="copy", reference_cache="x")[0]
    assert faults(loss="simpo", gamma=0.5, sft_weight=1.0) == faults() == faults(loss="dpo", beta=None) == []


def test_defaults_of_a_loss():
    assert [ObjectiveConfig(loss=loss).strength for loss in ("dpo", "orpo", "simpo", "kto")] == [
        0.1,
        0.1,
        2.0,
        0.1,
    ]
    assert ObjectiveConfig(loss="simpo", beta=3.0).strength == 3.0
    assert ObjectiveConfig(loss="dpo").per_row == 2 and ObjectiveConfig(loss="kto").per_row == 1


@pytest.mark.parametrize(
    ("reference", "modes", "adapter", "engine", "expected"),
    [
        ("auto", ("frozen", "lora"), None, "fsdp", "adapter_off"),
        ("auto", ("full", "lora"), None, "single", "precomputed"),
        ("auto", ("frozen", "lora"), "run/final", "single", "precomputed"),
        ("adapter_off", ("lora", "lora"), None, "zero3", "adapter_off"),
        ("adapter_off", ("full", "lora"), None, "single", "projector trains in full"),
        ("adapter_off", ("frozen", "lora"), "run/final", "single", "goes on with the adapter run/final"),
        ("copy", ("full", "full"), None, "ddp", "copy"),
        ("copy", ("frozen", "lora"), None, "zero2", "a copy would lie whole on each rank"),
    ],
)
def test_where_a_reference_comes_from(reference, modes, adapter, engine, expected):
    parts = [
        SimpleNamespace(part=p, mode=m) for p, m in zip(("projector", "language_model"), modes, strict=True)
    ]
    config = SimpleNamespace(
        objective=ObjectiveConfig(loss="dpo", reference=reference), where=lambda key: "c.yaml:4"
    )
    job = SimpleNamespace(
        config=config, base_adapter=adapter, whole_plan=SimpleNamespace(parts=parts), **ALONE
    )
    if " " not in expected:
        assert reference_source(job, engine) == expected
        return
    with pytest.raises(ConfigError, match=f"^c.yaml:4: objective.reference: {reference}.*{expected}"):
        reference_source(job, engine)


def test_log_of_one_less_a_probability_is_exact_at_both_ends():
    values = torch.tensor([-1e-12, -0.5, -math.log(2), -3.0, -60.0], dtype=torch.float64, requires_grad=True)
    found = log_one_minus_exp(values)
    found.sum().backward()
    expected = [math.log(-math.expm1(v)) for v in values.tolist()]
    assert found.tolist() == pytest.approx(expected, rel=1e-9) and values.grad.isfinite().all()


def test_the_page_has_a_config_that_loads_and_rows_that_are_read(tmp_path):
    (config,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "run.yaml").write_text(config)
    assert load_config(tmp_path / "run.yaml").objective.strength == 0.1
    rows = [
        json.loads(line)
        for block in re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)
        for line in block.splitlines()
    ]
    pairs, labelled, texts = rows[:3], rows[3:4], rows[4:]
    assert len({READS["pairs"](row, "a.jsonl", 0) for row in pairs}) == 1
    assert READS["labels"](labelled[0], "a.jsonl", 0)[0].side == "chosen"
    assert [len(READS["texts"](row, "a.jsonl", 0)[0].images) for row in texts] == [0, 2]
    for loss in get_args(Loss):
        assert f"| `{loss}`" in PAGE
