"""A checkpoint that several ranks write: each the optimizer's shards that it holds, the first all the rest.

In: the temporary folder of a checkpoint, which every rank sees. Out: one file per rank in it. A file appears
under its name when it is whole; the first rank waits for all of them before the folder gets its manifest.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor

from partwise.engine.ranks import Ranks
from partwise.engine.single import Stretch
from partwise.errors import TrainingError
from partwise.training.state import state_file, write_state

POLL_SECONDS = 0.05
# How long the others may still take once the run has ended by a fault.
GRACE_SECONDS = 10.0


class Shards:
    """This rank's place among those that write."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.deadline: float | None = None

    def write(self, folder: Path, state: dict[str, Tensor], stretches: Mapping[str, Stretch]) -> None:
        """This rank's file. Raises: OSError, SafetensorError: the disk refuses; the first rank is told."""
        path = folder / state_file(self.ranks.rank, self.ranks.size)
        partial, failed = path.with_name(f".{path.name}"), path.with_suffix(".failed")
        try:
            path.parent.mkdir(exist_ok=True)
            write_state(partial, state, stretches)
            partial.rename(path)
        except (OSError, SafetensorError) as error:
            with suppress(OSError):
                failed.write_text(str(error))
            raise

    def wait_for_others(self, folder: Path) -> None:
        """Until all files are there. Raises: TrainingError: another rank could not write its own."""
        for rank in range(self.ranks.size):
            path = folder / state_file(rank, self.ranks.size)
            while not path.is_file():
                failed = path.with_suffix(".failed")
                if failed.is_file():
                    raise TrainingError(
                        f"rank {rank} cannot write its shards of {folder}: {failed.read_text()}. Earlier "
                        "checkpoints are untouched: free space or make the folder writable, then resume."
                    )
                if self.deadline and time.monotonic() > self.deadline:
                    raise TrainingError(
                        f"{path} did not come: rank {rank} is gone, or does not see the run folder. Put the "
                        "output on a file system that all nodes share."
                    )
                time.sleep(POLL_SECONDS)

    def give_up_soon(self) -> None:
        """The run ends by a fault: others that do not write soon will not write at all."""
        self.deadline = time.monotonic() + GRACE_SECONDS
