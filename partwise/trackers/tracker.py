"""What a tracker is: started by being made, then numbers and samples at steps, then an end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from PIL import Image as PILImage


@dataclass(frozen=True)
class TrackedRun:
    """`run_id` is the same after a resume, `first_step` the steps that were done before this start."""

    folder: Path
    project: str
    name: str
    run_id: str
    first_step: int
    config: Mapping[str, Any]

    @property
    def unique_name(self) -> str:
        """For trackers that know a run by its name."""
        return f"{self.name}-{self.run_id}"


@dataclass(frozen=True)
class Sample:
    """A row as a person judges it: `answer` is the data's, `generated` the model's, once there is one."""

    row: str
    images: tuple[PILImage.Image, ...]
    prompt: str
    answer: str
    generated: str | None = None

    @property
    def text(self) -> str:
        lines = [self.row, f"prompt: {self.prompt}", f"answer: {self.answer}"]
        return "\n".join([*lines, *([f"model: {self.generated}"] if self.generated is not None else [])])


class Tracker(Protocol):
    """Whatever it raises is told once and stops nothing; its methods are called in one thread."""

    def log(self, numbers: Mapping[str, float], step: int) -> None: ...

    def log_samples(self, samples: Sequence[Sample], step: int) -> None: ...

    def finish(self, failed: bool) -> None: ...
