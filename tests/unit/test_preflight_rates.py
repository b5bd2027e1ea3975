"""The hint at LoRA rates that are those of full fine-tuning."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from partwise.config import load_config
from partwise.preflight import Context
from partwise.preflight.rates import check_rates
from partwise.records import Finding
from partwise.training.job import Job


@pytest.fixture
def rates_of(tmp_path: Path, tiny_folder: Callable[[str], Path]) -> Callable[..., list[Finding]]:
    def find(parts: str, *overrides: str) -> list[Finding]:
        path = tmp_path / "c.yaml"
        model = tiny_folder("gemma3")
        path.write_text(f"model: {{path: {model}}}\nparts: {parts}\ndata: {{train: a.jsonl}}\noutput: o\n")
        return check_rates(Context(Job(load_config(path, overrides))))

    return find


def test_a_lora_part_with_the_default_rate_is_hinted_at(rates_of, tmp_path) -> None:
    (finding,) = rates_of("{projector: full, language_model: lora}")
    assert (finding.check, finding.level) == ("rates", "warning")
    assert finding.message == (
        "train.learning_rate: language_model trains with LoRA at 2e-05, a rate for full fine-tuning: "
        "adapters usually take ten times as much, and learn slowly with this"
    )
    assert (
        finding.fix
        == "Set parts.language_model.learning_rate: 0.0002, or try it out: partwise find-lr CONFIG."
    )


def test_its_own_rate_is_named_with_its_line(rates_of, tmp_path) -> None:
    (finding,) = rates_of("{language_model: {mode: lora, learning_rate: 1e-5}}")
    assert finding.message.startswith("parts.language_model.learning_rate: ")
    assert finding.where == f"{tmp_path}/c.yaml:2"


@pytest.mark.parametrize(
    "parts",
    ["{projector: full, language_model: full}", "{language_model: {mode: lora, learning_rate: 1e-4}}"],
)
def test_usual_rates_are_no_finding(rates_of, parts) -> None:
    assert rates_of(parts) == []
    assert rates_of("{language_model: lora}", "train.learning_rate=2e-4") == []
