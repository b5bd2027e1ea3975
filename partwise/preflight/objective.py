"""Do the rows say which answer is better, and is the model its own reference before the first step?

In: a Context. Out: findings for preference losses; none for others, of whose rows the other checks know all.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from partwise.data.scan import ScannedRow
from partwise.engine.single import Engine
from partwise.preflight.context import Context
from partwise.preflight.rows import Source, sources
from partwise.records import Finding
from partwise.tables import format_bytes
from partwise.training.preference import METRICS, Preference
from partwise.training.probe import untouched
from partwise.training.reference import reference_source

# Good answers that are so many times as long as bad ones, or the reverse, teach length.
LENGTH_FACTOR = 2.0
# A model and its reference are two forward passes of the same weights: rewards of more than this are none.
LEAST_REWARD = 0.05
SOURCES = {
    "adapter_off": "the model with its adapters switched off, which takes a forward pass more and no memory",
    "precomputed": "computed once before the first step and kept on disk: a forward pass over all rows",
}


def check_objective(context: Context) -> list[Finding]:
    """The reference of a preference loss, pairs that do not differ, and lengths that give the good one away.

    Raises:
        ConfigError: the reference that the config names would be another model.
    """
    objective = context.config.objective
    if not objective.is_preference:
        return []
    name = f"dpo ({objective.variant})" if objective.loss == "dpo" else objective.loss
    text = f"{name} with beta {objective.strength:g}"
    source = reference_source(context.job, context.engine)
    if source == "copy":
        held = sum(p.numel() for p in context.job.empty_model.parameters())
        size = held * (2 if context.config.model.dtype == "bfloat16" else 4)
        text += f"; the reference is a frozen copy, {format_bytes(size)} in memory"
    elif source != "none":
        text += f"; the reference is {SOURCES[source]}"
    finding = Finding("objective", "info", text, context.config.where("objective"), values={"source": source})
    return [finding, *(f for source in sources(context) for f in answer_findings(context, source))]


def answer_findings(context: Context, source: Source) -> Iterator[Finding]:
    """How many answers are good, how long both kinds are, and which pairs say nothing."""
    rows = [row for row in source.scan.rows if not row.dropped]
    lengths = {side: [r.num_target_tokens for r in rows if r.side == side] for side in ("chosen", "rejected")}
    if missing := [side for side, found in lengths.items() if not found]:
        if rows:
            kind = {"chosen": "good", "rejected": "bad"}[missing[0]]
            text = f"{source.key}: none of the {source.read} read is {kind}"
            fix = f"Give rows of {kind} answers, too: there is nothing to tell apart."
            yield Finding("objective", "warning", text, source.where, fix)
        return
    yield length_finding(source, lengths)
    if context.config.objective.shape == "pairs" and (same := same_answers(rows)):
        text = (
            f"{source.key}: {len(same)} pairs have the same answer twice, such as {same[0]}: nothing is "
            "learned from them"
        )
        yield Finding("objective", "warning", text, source.where, "Remove them.", {"num_same": len(same)})


def length_finding(source: Source, lengths: dict[str, list[int]]) -> Finding:
    good, bad = (float(np.mean(lengths[side])) for side in ("chosen", "rejected"))
    text = (
        f"{source.key}: {len(lengths['chosen']):,} good answers of {good:.1f} tokens on average, "
        f"{len(lengths['rejected']):,} bad ones of {bad:.1f}"
    )
    values: dict[str, Any] = {"chosen_tokens": good, "rejected_tokens": bad}
    if max(good, bad) < LENGTH_FACTOR * min(good, bad):
        return Finding("objective", "info", text, source.where, values=values)
    longer = "longer" if good > bad else "shorter"
    fix = f"The model may learn that {longer} is better: balance them, or use objective.loss: simpo."
    return Finding("objective", "warning", text, source.where, fix, values)


def same_answers(rows: list[ScannedRow]) -> list[str]:
    """The names of rows whose answers are equal in tokens and images."""
    chosen = {row.name: row.digest for row in rows if row.side == "chosen"}
    return [row.name for row in rows if row.side == "rejected" and chosen.get(row.name) == row.digest]


def check_first_answers(context: Context) -> list[Finding]:
    """The preference loss of the first step, which for a model that is its own reference is known before.

    Raises:
        DataError: a row of the first step cannot be used.
    """
    job, objective = context.job, context.config.objective
    if not objective.is_preference:
        return []
    model, engine = context.loaded.model, Engine()
    source = reference_source(job, context.engine)
    if source in ("copy", "precomputed"):  # the model is its own reference now
        preference = Preference(objective, "copy", model)
    else:
        preference = Preference(objective, source)
    step_data = job.loader.load_step(0)
    with untouched(model):
        told = preference.accumulate(model, step_data, job.device, engine).tolist()
    loss, values = told[0], dict(zip(METRICS, told[1:], strict=True))
    text = (
        f"the first loss is {loss:.4f}; good answers have log-probability {values['chosen_log_prob']:.2f}, "
        f"bad ones {values['rejected_log_prob']:.2f}"
    )
    where, values = step_data.rows[0], values | {"loss": loss}
    rewards = max(abs(values["chosen_reward"]), abs(values["rejected_reward"]))
    if source == "adapter_off" and rewards > LEAST_REWARD:
        text += (
            f"; but the model differs from its reference before it was trained: its rewards are {rewards:.3f}"
        )
        fix = "Write objective.reference: precomputed; adapters that start otherwise than at zero need it."
        return [Finding("first-answers", "warning", text, where, fix, values)]
    return [Finding("first-answers", "info", text, where, values=values)]
