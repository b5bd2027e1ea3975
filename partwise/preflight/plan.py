"""Does the plan fit the model? Resolved on the meta device, before any weight is read."""

from __future__ import annotations

from partwise.preflight.context import Context
from partwise.records import Finding
from partwise.tables import describe_mode, format_count, held_lines


def check_plan(context: Context) -> list[Finding]:
    """The plan in one line, and why tensors of an open part stay frozen.

    Raises:
        CheckpointError: the model folder is incomplete.
        PlanError: the config's parts do not fit the model, or nothing would train.
    """
    plan = context.job.plan
    modes = ", ".join(f"{part.part} {describe_mode(part)}" for part in plan.parts)
    total = sum(part.num_parameters for part in plan.parts)
    trainable = sum(part.num_trainable for part in plan.parts)
    summary = f"{modes}: {format_count(trainable)} of {format_count(total)} parameters train"
    findings = [Finding("plan", "info", summary, context.config.where("parts"))]
    return findings + [Finding("plan", "info", line) for line in held_lines(plan)]
