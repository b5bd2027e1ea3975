"""Are rows packed, and how full are the packs?

In: the scan of the training rows. Out: one finding, for rows from everywhere as a step has them.
"""

from __future__ import annotations

from partwise.data.collate import group_rows
from partwise.preflight.context import Context
from partwise.preflight.probe import kept_lengths, typical_groups
from partwise.records import Finding


def check_packing(context: Context) -> list[Finding]:
    """Whether rows are packed, how full packs are, and how full padded rows would be.

    Raises:
        ConfigError: data.packing is true and the model's rows cannot be packed.
    """
    job, where = context.job, context.config.where("data.packing")
    packs = job.packs
    if packs is None:
        return [Finding("packing", "info", f"rows are padded: {job.padding_reason}", where)]
    groups = typical_groups(context)
    if not groups:
        return []  # no row can be used, which another check says
    lengths = kept_lengths(context)
    loads = [sum(lengths[place] for place in group) for group in groups]
    packed = sum(loads) / sum(packs.padded_length(load) for load in loads)
    padded = padded_fraction(context, [lengths[place] for group in groups for place in group])
    number = "1 pack" if len(groups) == 1 else f"{len(groups)} packs"
    text = (
        f"rows are packed: {sum(map(len, groups))} rows make {number} of up to {max(loads):,} tokens, "
        f"{1 - packed:.1%} of it padding; of padded rows it would be {1 - padded:.0%}"
    )
    values = {"num_packs": len(groups), "packed_fraction": packed, "padded_fraction": padded}
    return [Finding("packing", "info", text, where, values=values)]


def padded_fraction(context: Context, lengths: list[int]) -> float:
    """Which share of the positions of padded micro-batches are tokens."""
    groups = group_rows(lengths, context.job.answers_per_batch)
    num_positions = sum(len(group) * max(lengths[i] for i in group) for group in groups)
    return sum(lengths) / num_positions
