"""Will this run learn what its config says? One file per kind of check, cheap ones first.

A check takes the Job and returns Findings; a UserError that it meets is a finding, too. CHECKS need no
weights; check_step runs one real step on the loaded model and leaves everything as it was.
"""

from __future__ import annotations

from collections.abc import Callable

from partwise.errors import UserError
from partwise.preflight.output import check_disk, check_output
from partwise.preflight.plan import check_plan
from partwise.preflight.rows import check_eval_rows, check_rows
from partwise.preflight.step import check_step
from partwise.records import Finding
from partwise.training.job import Job

SAMPLE_ROWS = 256

Check = Callable[[Job, int | None], list[Finding]]
CHECKS: list[Check] = [check_output, check_plan, check_disk, check_rows, check_eval_rows]

__all__ = ["CHECKS", "SAMPLE_ROWS", "check_step", "collect_findings", "error_finding"]


def collect_findings(job: Job, max_rows: int | None = SAMPLE_ROWS) -> list[Finding]:
    """Findings of all checks that need no weights; `max_rows` None reads every row."""
    findings: list[Finding] = []
    for check in CHECKS:
        try:
            findings += check(job, max_rows)
        except UserError as error:
            # What one check could not open, the next ones cannot either: said once.
            if all(finding.message != str(error) for finding in findings):
                findings.append(error_finding(check.__name__, error))
    return findings


def error_finding(check: str, error: UserError) -> Finding:
    return Finding(check=check.removeprefix("check_"), level="error", message=str(error))
