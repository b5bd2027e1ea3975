"""The command line answers at once, and imports nothing heavy before it knows the command."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

PARTWISE = Path(sys.executable).with_name("partwise")


def test_help_answers_at_once() -> None:
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        done = subprocess.run([PARTWISE, "--help"], capture_output=True, text=True, check=True)
        seconds.append(time.perf_counter() - start)
    assert "part by part" in done.stdout
    assert min(seconds) < 0.3, seconds


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, partwise.cli; print({'torch', 'transformers', 'pydantic', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
