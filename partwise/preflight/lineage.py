"""Is the run built on what it should be: a base that is whole, and an adapter that belongs to it?"""

from __future__ import annotations

from typing import Any

from partwise.lineage.origin import require_whole
from partwise.model.adapter import check_adapter
from partwise.model.estimate import planned_model
from partwise.model.folder import find_model_folder
from partwise.preflight.context import Context
from partwise.records import Finding


def check_lineage(context: Context) -> list[Finding]:
    """Where base and adapter come from; they are whole, and the adapter fits the plan and this base.

    Raises:
        CheckpointError: it does not, or was not.
    """
    job, model = context.job, context.config.model
    for folder in filter(None, (find_model_folder(model.path, with_weights=True), job.adapter)):
        require_whole(folder)
    if job.adapter is not None:
        check_adapter(planned_model(model, job.plan), job.plan, job.adapter)
    values = {"base": job.base_record["fingerprint"]}
    text = f"the run starts from {describe(job.manifest['parents'][0])}"
    findings = [Finding("lineage", "info", text, context.config.where("model.path"), values=values)]
    if accepted := job.manifest.get("accepted_base"):
        differing = ", ".join(accepted["differing"])
        text = f"the adapter was trained on another base, which model.accept_base allows: {differing} differ"
        where = context.config.where("model.accept_base")
        findings.append(Finding("lineage", "warning", text, where, values=accepted))
    return findings


def describe(record: dict[str, Any]) -> str:
    """A record and its ancestors in one line, the youngest first."""
    told = f"{record['kind']} {record['path']} ({record['fingerprint'][:12]})"
    return " <- ".join([told, *(describe(parent) for parent in record.get("parents", ()))])
