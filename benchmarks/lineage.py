"""How long it takes to know a model of Gemma-3-4B's shape by its content.

Usage: python benchmarks/lineage.py OUT.jsonl [--tiny]; `--tiny` needs no GPU and times a small model. One
JSON line per cell: the fingerprint of all weights per part, and the checksums of the folder's files. Files
are in the page cache, as they are after a model was saved or loaded.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from step import append_row, describe_machine, write_model

from partwise.lineage.checksums import sha256
from partwise.lineage.fingerprint import weights_fingerprint
from partwise.model.folder import weight_files
from partwise.model.load import empty_model
from partwise.tiny import write_tiny

NUM_RUNS = 3


def main() -> None:
    out, is_tiny = Path(sys.argv[1]), "--tiny" in sys.argv
    with tempfile.TemporaryDirectory() as folder_name:
        folder = Path(folder_name) / "base"
        write_tiny("gemma3", folder) if is_tiny else write_model(folder)
        files, model = weight_files(folder), empty_model(folder)
        cells: dict[str, Callable[[], object]] = {
            "fingerprint": lambda: weights_fingerprint(files, model),
            "file checksums": lambda: [sha256(file) for file in files],
        }
        for name, run in cells.items():
            row = {
                "cell": f"{'tiny gemma-3' if is_tiny else 'gemma-3-4b'}, {name}",
                "command": f"python benchmarks/lineage.py OUT.jsonl{' --tiny' if is_tiny else ''}",
                **describe_machine(),
                "num_bytes": sum(file.stat().st_size for file in files),
                "num_cores": os.cpu_count(),
                **timed(run),
            }
            append_row(out, row)


def timed(run: Callable[[], object]) -> dict[str, object]:
    seconds = []
    for _ in range(NUM_RUNS):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return {
        "runs": NUM_RUNS,
        "seconds_median": round(statistics.median(seconds), 3),
        "seconds_min": round(min(seconds), 3),
        "seconds_max": round(max(seconds), 3),
    }


if __name__ == "__main__":
    main()
