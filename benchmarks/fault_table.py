"""The table of faults in docs/checkpoints.md, from benchmarks/results/faults.jsonl.

Usage: python benchmarks/fault_table.py; writes it. A test holds that page and rows agree.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROWS = ROOT / "benchmarks/results/faults.jsonl"
PAGE = ROOT / "docs/checkpoints.md"
MARKED = re.compile(r"(<!-- faults:start -->\n).*?(<!-- faults:end -->)", re.S)
WHAT = {
    "kill -9": "`kill -9`, at its start, in a step, in a save, while `final/` is written",
    "SIGTERM": "SIGTERM",
    "SIGINT": "SIGINT (Ctrl-C)",
    "full disk": "the disk is full from a random moment on",
    "read-only folder": "`checkpoints/` is read-only from a random moment on",
    "truncated file": "`kill -9`, and the newest optimizer file is cut off anywhere",
    "flipped bit": "`kill -9`, and one bit of the newest optimizer file is flipped",
}


def table() -> str:
    rows = [json.loads(line) for line in ROWS.read_text().splitlines()]
    lines = [
        "| fault | times | checkpoints lost | saved steps lost | other weights at the end | unclear error |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        counts = ("tried", "lost_checkpoints", "lost_steps", "other_results", "unclear_errors")
        lines.append(f"| {WHAT[row['fault']]} | {' | '.join(str(row[count]) for count in counts)} |")
    return "\n".join(lines) + "\n"


def page() -> str:
    """docs/checkpoints.md with the table as the rows have it."""
    return MARKED.sub(lambda match: match[1] + table() + match[2], PAGE.read_text())


if __name__ == "__main__":
    PAGE.write_text(page())
