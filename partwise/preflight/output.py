"""Can the run folder be written?"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from partwise.errors import ConfigError
from partwise.records import Finding
from partwise.training.job import Job


def check_output(job: Job, max_rows: int | None) -> list[Finding]:
    """The output folder is writable, or can be made.

    Raises:
        ConfigError: it is a file, or its nearest existing parent cannot be written.
    """
    output = Path(job.config.output)
    where = job.config.where("output")
    existing = next(path for path in (output.absolute(), *output.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise ConfigError(f"{where}: output: {existing} is a file, not a folder. Choose another output.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(
            f"{where}: output: {output} cannot be written: no permission in {existing}. "
            "Choose another output."
        )
    free = shutil.disk_usage(existing).free
    return [Finding("output", "info", f"{output} can be written, {free / 2**30:.1f} GiB free", where)]
