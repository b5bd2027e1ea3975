"""Which of a run's steps a stage has, and what a checkpoint says of the stages so far."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from partwise.config import StableConfig


@dataclass(frozen=True)
class Finished:
    """A stage that has ended, and how many steps it had."""

    name: str
    steps: int


@dataclass(frozen=True)
class StageSpan:
    """`num_steps` steps of a run, or less with `until`, after those of the stages that have finished.

    `run_steps` are those of the whole run, if no stage ends early. `name` is "" where there are no stages.
    """

    num_steps: int
    name: str = ""
    finished: tuple[Finished, ...] = ()
    run_steps: int = 0
    is_last: bool = True
    until: StableConfig | None = None

    @property
    def first_step(self) -> int:
        """How many steps of the run came before."""
        return sum(stage.steps for stage in self.finished)

    @property
    def last_step(self) -> int:
        """The run's step after which the stage ends at the latest."""
        return self.first_step + self.num_steps

    def stamp(self, manifest: dict[str, Any], step: int, is_done: bool) -> dict[str, Any]:
        """The manifest with the stages so far, this one the last; as it is where there are none."""
        if not self.name:
            return manifest
        current = {"name": self.name, "steps": step - self.first_step, "is_done": is_done}
        return {**manifest, "stages": [*({**asdict(f), "is_done": True} for f in self.finished), current]}


def finished_stages(manifest: Mapping[str, Any] | None) -> list[Finished]:
    """The stages that had ended when a checkpoint was written; none where there is no checkpoint."""
    stages = (manifest or {}).get("stages", ())
    return [Finished(stage["name"], stage["steps"]) for stage in stages if stage["is_done"]]
