"""Micro-batches to probe the model with.

In: a Context. Out: examples and batches of the scanned rows, made as training makes them. Nothing is judged
here, and nothing is computed on the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate

import numpy as np

from partwise.data.collate import collate, group_rows
from partwise.data.rows import row_name
from partwise.data.scan import ScannedRow, scanned_indices
from partwise.errors import DataError
from partwise.preflight.context import Context
from partwise.records import Batch, Conversation, Example, PartPlan
from partwise.training.job import Job

# How many rows of text alone may come before the first image, where a part learns from images only.
SEARCHED_ROWS = 10_000


def probe_batches(context: Context) -> list[Batch]:
    """The longest micro-batch, and where rows are mixed one of text alone and one with images.

    Where only images reach a part that trains, one with images is among the first steps of the run, or none
    has any: an image that the run never comes to proves nothing.

    Raises:
        DataError: no row can be used.
    """
    job = context.job
    longest = [make_batch(context, longest_rows(context, lambda row: True)) or first_batch(job)]
    text = make_batch(context, longest_rows(context, lambda row: not row.image_sizes))
    if any(reached_by_images(part) for part in job.plan.parts):
        met = next(image_batches(job, num_searched_steps(job)), None)
        if met is None:
            return [text or first_batch(job)]
        images = None if longest[0].media else met
    else:
        images = make_batch(context, longest_rows(context, lambda row: bool(row.image_sizes)))
    others = [text] if longest[0].media else [images]
    return longest + [batch for batch in others if batch is not None]


def first_batch(job: Job) -> Batch:
    return job.loader.load_step(0).batches[0]


def first_examples(job: Job) -> list[Example]:
    """Those of the first step."""
    results = [job.chat_format(job.rows[row]) for row in job.loader.rank_rows(0)]
    return [result for result in results if isinstance(result, Example)]


def make_batch(context: Context, positions: Sequence[int]) -> Batch | None:
    examples = examples_at(context, positions)
    return collate(examples, context.job.pad_token_id, context.job.packs) if examples else None


def longest_rows(context: Context, wanted: Callable[[ScannedRow], bool]) -> list[int]:
    """Places in the scan of the longest usable rows that are wanted, one micro-batch of them."""
    rows, job = context.train_scan.rows, context.job
    lengths = kept_lengths(context)
    places = [i for i in usable_rows(context) if wanted(rows[i])]
    places.sort(key=lambda i: -lengths[i])
    if job.packs is None:
        return places[: job.answers_per_batch]
    places = places[: job.answers_per_step]
    num_tokens = accumulate(lengths[i] for i in places)
    return [i for i, total in zip(places, num_tokens, strict=True) if total <= job.packs.max_tokens]


def kept_lengths(context: Context) -> list[int]:
    """Tokens of each row of the scan, as far as max_seq_len keeps them."""
    limit = context.config.data.max_seq_len
    return [min(row.num_tokens, limit) for row in context.train_scan.rows]


def typical_groups(context: Context) -> list[list[int]]:
    """Places in the scan of rows from everywhere, as a step's micro-batches on one rank."""
    job, lengths = context.job, kept_lengths(context)
    places = spread(usable_rows(context), job.answers_per_step)
    groups = group_rows([lengths[place] for place in places], job.answers_per_batch, job.packs)
    return [[places[i] for i in group] for group in groups]


def usable_rows(context: Context) -> list[int]:
    """Places in the scan of the rows that give an example."""
    return [i for i, row in enumerate(context.train_scan.rows) if row.dropped is None]


def spread(items: list[int], count: int) -> list[int]:
    """At most `count` of the items, evenly."""
    return [items[i] for i in np.linspace(0, len(items) - 1, min(count, len(items))).astype(int)]


def examples_at(context: Context, places: Sequence[int]) -> list[Example]:
    """The examples of these places of the scan, made anew."""
    results = [context.job.chat_format(conversation_at(context, place)) for place in places]
    return [result for result in results if isinstance(result, Example)]


def conversation_at(context: Context, place: int) -> Conversation:
    """The row at a place of the scan. Rows with faults have none, so it may stand further back."""
    scan, rows = context.train_scan, context.job.rows
    indices = scanned_indices(len(rows), context.max_rows, rows.per_row)
    for index in indices[place : place + len(scan.faults) + 1]:
        try:
            conversation = rows[index]
        except DataError:
            continue
        if row_name(conversation.source, conversation.row) == scan.rows[place].name:
            return conversation
    raise DataError(f"{scan.rows[place].name} has changed since it was read. Run the check again.")


def image_batches(job: Job, num_steps: int) -> Iterator[Batch]:
    """The micro-batches with images in the first steps; steps of text rows are read, but not prepared."""
    for step in range(num_steps):
        if any(job.rows[row].images for row in job.loader.step_rows(step)):
            yield from (batch for batch in job.loader.load_step(step).batches if batch.media)


def num_searched_steps(job: Job) -> int:
    """How many steps are searched for an image: at most the run, one epoch, or SEARCHED_ROWS."""
    steps = math.ceil(SEARCHED_ROWS / job.config.train.global_batch_size)
    return min(steps, job.num_steps, job.loader.steps_per_epoch)


def reached_by_images(part: PartPlan) -> bool:
    """Whether the part trains, and text alone gives it no gradient."""
    return bool(part.trainable) and part.part != "language_model"
