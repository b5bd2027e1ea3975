"""Do the rows make examples? A sample of them, or all, through the same door as training."""

from __future__ import annotations

import numpy as np

from partwise.data.scan import Scan
from partwise.preflight.context import Context
from partwise.records import Finding

SHOWN_ERRORS = 3


def check_rows(context: Context) -> list[Finding]:
    """The training rows: how many can be used, their lengths, what is dropped and why.

    Raises:
        DataError: a file is missing, empty or of an unknown format.
        ConfigError: the model's template or tokenizer cannot make examples, or the warm-up takes all steps.
    """
    job = context.job
    findings = scan_findings(context, context.train_scan, len(job.rows), "data.train")
    text = f"{job.num_steps:,} optimizer steps, {job.loader.steps_per_epoch:,} in an epoch"
    return [*findings, Finding("steps", "info", text)]


def check_eval_rows(context: Context) -> list[Finding]:
    """The same for the evaluation rows, when there are any."""
    scan, rows = context.eval_scan, context.job.eval_rows
    return [] if scan is None or rows is None else scan_findings(context, scan, len(rows), "data.eval")


def scan_findings(context: Context, scan: Scan, num_rows: int, key: str) -> list[Finding]:
    where = context.config.where(key)
    name = key.replace(".", " ")
    findings = [Finding(name, "error", text) for text in scan.errors[:SHOWN_ERRORS]]
    if len(scan.errors) > SHOWN_ERRORS:
        more = f"{len(scan.errors) - SHOWN_ERRORS} more of the {scan.num_rows} rows read cannot be used"
        findings.append(Finding(name, "error", more, where))
    if not scan.num_target_tokens:
        if not findings:
            text = f"none of the {scan.num_rows} rows read has a target token: {describe_dropped(scan)}"
            findings.append(Finding(name, "error", text, where, "Raise data.max_seq_len."))
        return findings
    if scan.dropped:
        text = f"{scan.dropped.total()} of {scan.num_rows} rows read are dropped: {describe_dropped(scan)}"
        fix = "Raise data.max_seq_len, or set data.overlong to error to stop at the first."
        findings.append(Finding(name, "warning", text, where, fix))
    if scan.num_open_answers:
        text = f"{scan.num_open_answers} of {scan.num_rows} rows read end without a trained end-of-turn token"
        fix = "The model would not learn to stop; use a chat template that closes the assistant's turn."
        findings.append(Finding(name, "warning", text, where, fix))
    read = "all rows" if scan.num_rows == num_rows else f"{scan.num_rows} of {num_rows:,} rows read"
    middle, longest = np.percentile(scan.lengths, [50, 100])
    text = (
        f"{read}: {scan.num_images} images, {middle:.0f} tokens in the middle and {longest:.0f} at most, "
        f"{scan.num_target_tokens / scan.lengths.sum():.0%} of them targets"
    )
    return [*findings, Finding(name, "info", text, where)]


def describe_dropped(scan: Scan) -> str:
    return ", ".join(f"{reason} ({count})" for reason, count in scan.dropped.items())
