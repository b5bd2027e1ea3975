"""A rank's micro-batches made like those of the other ranks: as many, and with an image where one has one.

In: the micro-batches, and which of those that the ranks run together have media. Out: micro-batches that give
the same loss and the same gradients, but run through the same modules on every rank. Sharded weights need
that: ranks gather them together, so that a rank which leaves out its vision tower would hang the others.
"""

from __future__ import annotations

from collections.abc import Sequence

from partwise.data.collate import filler_batch, join_batches
from partwise.data.packing import PackFormat
from partwise.errors import DataError
from partwise.records import Batch, Example


def align_batches(
    batches: Sequence[Batch],
    has_media: Sequence[bool],
    text_filler: Example,
    image_filler: Example | None,
    pad_token_id: int,
    packs: PackFormat | None = None,
) -> tuple[Batch, ...]:
    """As many micro-batches as `has_media` has entries, with media where these say so.

    `has_media` has an entry for each micro-batch of the rank that has most. One that is missing here is a
    filler; one without media gets an image as a row, or in a pack a document, more.

    Raises:
        DataError: another rank's rows have images, and there is no filler that has one.
    """
    aligned = []
    for position, wants_media in enumerate(has_media):
        batch = batches[position] if position < len(batches) else None
        if wants_media and not (batch and batch.media):
            filler = filler_batch(require_image(image_filler), pad_token_id, packs)
            batch = join_batches(batch, filler, pad_token_id, packs) if batch else filler
        aligned.append(batch or filler_batch(text_filler, pad_token_id, packs))
    return tuple(aligned)


def require_image(filler: Example | None) -> Example:
    """The filler. Raises: DataError where there is none."""
    if filler is None:
        raise DataError(
            "a row with images came up, but none was found among the first rows, and each rank needs one to "
            "stand in where its own rows have none. Move a short row with an image to the head of the data."
        )
    return filler
