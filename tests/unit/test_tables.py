"""The plan as a table: names and numbers are whole in a terminal of 80 columns."""

from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console

from partwise.records import LoraSettings, PartPlan, PartsPlan
from partwise.tables import format_seconds, held_lines, plan_table

LORA = LoraSettings(rank=16, alpha=32, dropout=0.0, use_rslora=False, use_dora=False)


def make_part(part: str, mode: str, **changes) -> PartPlan:
    values = {
        "module_paths": (),
        "num_parameters": 417_000_000,
        "num_trainable": 32_800_000,
        "num_layers": 27,
        "trainable": (),
        "held": {},
        "learning_rate": 2.5e-5,
        "weight_decay": 0.0,
    }
    return PartPlan(part=part, mode=mode, **{**values, **changes})


def test_80_columns_hold_the_widest_usual_plan():
    lora = make_part("language_model", "lora", lora=LORA, lora_targets=("x",) * 238)
    plan = PartsPlan((make_part("vision_tower", "frozen", num_trainable=0), lora))
    console = Console(file=StringIO(), width=80)
    console.print(plan_table(plan))
    text = console.file.getvalue()
    assert "\u2026" not in text
    for words in (
        "parameters",
        "trainable",
        "learning",
        "language_model",
        "417 M",
        "32.8 M",
        "2.5e-05",
        "238",
    ):
        assert words in text
    assert max(map(len, text.splitlines())) <= 80


def test_held_tensors_are_counted_in_words():
    one = make_part("projector", "full", held={"a": "it stands alone"})
    two = make_part("vision_tower", "full", held={"b": "it is unused", "c": "it is unused"})
    assert held_lines(PartsPlan((one, two))) == [
        "projector: 1 tensor stays frozen: it stands alone (a)",
        "vision_tower: 2 tensors stay frozen: it is unused (b, c)",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.00076, "0.76 ms"),
        (0.0123, "12 ms"),
        (3.61, "3.6 s"),
        (99.4, "99 s"),
        (119.6, "2 min"),
        (4_800, "1 h 20 min"),
        (3_599, "1 h 0 min"),
        (86_399, "1 d 0 h"),
        (273_600, "3 d 4 h"),
    ],
)
def test_times_are_told_in_two_units(seconds, text):
    assert format_seconds(seconds) == text
