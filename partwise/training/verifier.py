"""Checkpoints compared with the trained model while training goes on: one at a time, in a fresh process.

In: what the model says about a few rows when a checkpoint is taken, and its folder once it is on disk. Out: a
Finding for report.json, or the error that ends the run; the folder is put aside then. A checkpoint that is
taken while the one before is still being compared is left to its checksums.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from partwise.errors import CheckpointError
from partwise.lineage.publish import replace_folder
from partwise.lineage.verify import Probe, Verification, start_verification
from partwise.records import Finding


class Verifier:
    """`take` gives a Probe of the model as it is now, where rows allow one; `note` gets the findings.

    With several ranks, `agree` gives each what the first one says: only that one compares.

    Without `take` nothing is compared. The process computes on the CPU: room that a GPU has between two steps
    is not room to take.
    """

    def __init__(
        self,
        take: Callable[[], Probe | None] | None,
        quantization: dict[str, Any] | None,
        note: Callable[[Finding], None],
        agree: Callable[[bool], bool] = bool,
    ) -> None:
        self._take = take
        self.agree = agree
        self.quantization = quantization
        self.note = note
        self.running: Verification | None = None

    @property
    def folder(self) -> Path | None:
        """What is being compared and must stay."""
        return self.running.folder if self.running else None

    def take(self) -> Probe | None:
        """For a checkpoint of this moment; None where it will not be compared."""
        self.poll()
        is_wanted = self.agree(self._take is not None and not self.running)
        return self._take() if self._take and is_wanted else None

    def start(self, folder: Path, probe: Probe) -> None:
        quantization = {str(folder): self.quantization}
        self.running = start_verification(folder, probe, quantization=quantization, device="cpu")

    def poll(self) -> None:
        """Note the comparison that has ended. Raises: CheckpointError when it failed."""
        if self.running and self.running.is_done():
            self.wait()

    def wait(self) -> None:
        """`poll`, once the comparison has ended."""
        running, self.running = self.running, None
        if not running:
            return
        try:
            self.note(running.finish())
        except CheckpointError as error:
            aside = running.folder.with_name(f"refused-{running.folder.name}")
            replace_folder(running.folder, aside)
            raise CheckpointError(f"{error} It stands at {aside} now.") from error

    def cancel(self) -> None:
        running, self.running = self.running, None
        if running:
            running.cancel()
