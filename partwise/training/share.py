"""A rank's share of each step, with what all ranks have together.

In: a loader of this rank's micro-batches. Out: the same with the totals of the step, which its loss is
divided by. Where ranks gather weights together, micro-batches are also made alike: as many on each rank, and
with an image where one of them has one. Ranks talk once a step, about numbers on the host.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from itertools import zip_longest
from typing import TYPE_CHECKING, NamedTuple

from partwise.data.align import align_batches
from partwise.data.chat import truncate
from partwise.data.loader import refuse_empty
from partwise.engine.single import Engine
from partwise.errors import DataError
from partwise.records import Batch, Example, StepData, Totals
from partwise.training.probe import probe_examples

if TYPE_CHECKING:
    from partwise.data.loader import StepLoader


class Shares:
    """The steps of a loader as this rank runs them."""

    def __init__(self, loader: StepLoader, engine: Engine) -> None:
        self.loader = loader
        self.engine = engine

    @property
    def steps_per_epoch(self) -> int:
        return self.loader.steps_per_epoch

    def iterate(self, first_step: int, last_step: int) -> Iterator[StepData]:
        """As the loader's. All ranks must run it together.

        Raises:
            DataError: as the loader's, or no rank has a target token.
        """
        for step_data in self.loader.iterate(first_step, last_step):
            yield self.agree(step_data)

    def agree(self, step_data: StepData) -> StepData:
        """The share with its totals, aligned where the engine needs it. Raises: DataError."""
        ranks = self.engine.ranks
        if ranks.size == 1:
            return step_data
        said = ranks.gather(tell(step_data))
        dropped = sum((share.dropped for share in said), Counter[str]())
        totals = Totals(
            num_target_tokens=sum(share.num_target_tokens for share in said),
            num_input_tokens=sum(share.num_input_tokens for share in said),
            rows=tuple(row for share in said for row in share.rows),
            counts=sum((share.counts for share in said), Counter[str]()),
        )
        if totals.num_target_tokens == 0:
            refuse_empty(step_data.step, self.loader.row_names(step_data.step), dropped)
        batches, others = step_data.batches, step_data.others
        if self.engine.runs_together:
            batches = self._align(batches, [share.has_media for share in said])
            others = self._align(others, [share.others_have_media for share in said])
        return StepData(step_data.step, batches, dropped, totals, others)

    def _align(self, batches: tuple[Batch, ...], told: list[list[bool]]) -> tuple[Batch, ...]:
        """Made like those of the other ranks, which told which of theirs have media."""
        flags = zip_longest(*told, fillvalue=False)
        has_media = [self.engine.runs_vision and any(position) for position in flags]
        text, image = self.fillers
        return align_batches(batches, has_media, text, image, self.loader.pad_token_id, self.loader.packs)

    @cached_property
    def examples(self) -> list[Example]:
        """A short row without an image and one with, as far as there are such."""
        return probe_examples(self.loader)

    @cached_property
    def fillers(self) -> tuple[Example, Example | None]:
        """A short row, and one with an image where there is one. Raises: DataError."""
        if not self.examples:
            raise DataError("none of the first rows of the data can be used. Run: partwise check CONFIG.")
        image = next((example for example in self.examples if example.media), None)
        # One token is enough, and it comes before any image.
        return replace(truncate(self.examples[0], 1), media={}), image


class Told(NamedTuple):
    """What a rank tells the others of its share; `has_media` is of each micro-batch."""

    num_target_tokens: int
    num_input_tokens: int
    rows: tuple[str, ...]
    dropped: Counter[str]
    has_media: list[bool]
    others_have_media: list[bool]
    counts: Counter[str]


def tell(step_data: StepData) -> Told:
    return Told(
        step_data.num_target_tokens,
        step_data.num_input_tokens,
        step_data.rows,
        step_data.dropped,
        [bool(batch.media) for batch in step_data.batches],
        [bool(batch.media) for batch in step_data.others],
        step_data.counts,
    )
