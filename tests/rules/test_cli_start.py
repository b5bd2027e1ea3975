"""The command line answers at once, and imports nothing heavy before it knows the command."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

PARTWISE = Path(sys.executable).with_name("partwise")


def test_help_answers_at_once() -> None:
    """In processor time, which other processes on the machine do not lengthen."""
    seconds = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([PARTWISE, "--help"], capture_output=True, text=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert "part by part" in done.stdout
    assert min(seconds) < 0.3, seconds


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, partwise.cli; print({'torch', 'transformers', 'pydantic', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
