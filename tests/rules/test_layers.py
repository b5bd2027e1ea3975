"""Rules of the house that a tool can hold: layers, forbidden names, what may say requires_grad."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "partwise").rglob("*.py"))
ENGINE_FILES = {f"engine/{path.name}" for path in (ROOT / "partwise" / "engine").glob("*.py")}


def test_imports_go_down_only() -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["utils", "common", "helpers", "base"])
def test_no_file_is_named_after_nothing(name: str) -> None:
    assert not [path for path in SOURCES if path.stem == name]


def files_saying(pattern: str) -> set[str]:
    return {str(p.relative_to(ROOT / "partwise")) for p in SOURCES if re.search(pattern, p.read_text(), re.M)}


def test_one_place_for_each_decision() -> None:
    assert files_saying(r"\.requires_grad\s*=|requires_grad_\(") <= {"model/parts.py"}
    assert files_saying(r"^\s*(from|import) deepspeed|torch\.distributed") <= ENGINE_FILES
    assert files_saying(r"\.generate\(") <= {"evaluation/generate.py"}
    assert files_saying(r"model_type\s*(==|in)\b") <= {"families.py"}
    assert files_saying(r"os\.environ\.get\(|os\.environ\[|getenv|environment\.get\(") <= {"engine/launch.py"}


def test_files_stay_short() -> None:
    long = {str(p.relative_to(ROOT)): n for p in SOURCES if (n := len(p.read_text().splitlines())) > 450}
    assert not long
