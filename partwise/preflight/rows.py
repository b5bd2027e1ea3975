"""Can every row be read, does the chat template write it, and is anything left to learn in it?

In: the scans of the context, a sample of the rows or all. Out: findings. What this file shares with the other
checks of rows: the sources to go through, and the faults of one stage as findings.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from partwise.data.rows import count_images
from partwise.data.scan import Scan, Stage
from partwise.preflight.context import Context
from partwise.records import Finding

SHOWN_ERRORS = 3


@dataclass(frozen=True)
class Source:
    """The rows of one key of the config, as far as they were read."""

    key: str
    where: str
    scan: Scan
    num_rows: int
    noun: str = "row"

    @property
    def read(self) -> str:
        """How many were read: "160 rows" or "256 of 12,000 rows"; of pairs, their answers."""
        if self.scan.num_rows == self.num_rows:
            return f"1 {self.noun}" if self.num_rows == 1 else f"{self.num_rows:,} {self.noun}s"
        return f"{self.scan.num_rows:,} of {self.num_rows:,} {self.noun}s"


def sources(context: Context) -> Iterator[Source]:
    """The training rows, and the evaluation rows when there are any.

    Raises:
        DataError: a file is missing, empty or of an unknown format.
        ConfigError: the model's template or tokenizer cannot make examples.
    """
    config, job = context.config, context.job
    noun = "answer" if config.objective.shape == "pairs" else "row"
    yield Source("data.train", config.where("data.train"), context.train_scan, len(job.rows), noun)
    if context.eval_scan is not None and job.eval_rows is not None:
        yield Source("data.eval", config.where("data.eval"), context.eval_scan, len(job.eval_rows), noun)


def fault_findings(check: str, source: Source, stage: Stage) -> list[Finding]:
    """An error for each of the first rows that failed at this stage, and one for the number of the others."""
    texts = source.scan.faults_at(stage)
    findings = [Finding(check, "error", text) for text in texts[:SHOWN_ERRORS]]
    if len(texts) > SHOWN_ERRORS:
        more = f"{len(texts) - SHOWN_ERRORS} more of the {source.scan.num_rows} rows read cannot be used"
        findings.append(Finding(check, "error", f"{source.key}: {more}", source.where))
    return findings


def check_rows(context: Context) -> list[Finding]:
    """Rows have a known format, as many images as placeholders, and make steps.

    Raises:
        ConfigError: the warm-up takes all steps.
    """
    findings: list[Finding] = []
    for source in sources(context):
        faults = fault_findings("rows", source, "format") + fault_findings("rows", source, "tokens")
        text = f"{source.key}: {source.read} read, {count_images(source.scan.num_images)}"
        values = {"num_rows": source.scan.num_rows, "num_images": source.scan.num_images}
        findings += faults or [Finding("rows", "info", text, source.where, values=values)]
    job = context.job
    text = f"{job.num_steps:,} optimizer steps, {job.loader.steps_per_epoch:,} in an epoch"
    return [*findings, Finding("rows", "info", text)]


def check_template(context: Context) -> list[Finding]:
    """The chat template writes each row, and no text of a row holds a control token."""
    findings: list[Finding] = []
    for source in sources(context):
        findings += fault_findings("template", source, "template")
    return findings or [Finding("template", "info", "the chat template writes every row that was read")]


def check_targets(context: Context) -> list[Finding]:
    """At least one token is trained on; its share of all tokens."""
    findings: list[Finding] = []
    for source in sources(context):
        scan = source.scan
        if not scan.rows:
            continue  # every row has a fault, which another check says
        if not scan.num_target_tokens:
            text = f"{source.key}: no row has a target token ({source.read} read): {describe_dropped(scan)}"
            fix = "Raise data.max_seq_len, or give answers that are not train: false."
            findings.append(Finding("targets", "error", text, source.where, fix))
            continue
        kept = sum(
            min(row.num_tokens, context.config.data.max_seq_len) for row in scan.rows if not row.dropped
        )
        share = scan.num_target_tokens / kept
        text = f"{source.key}: {share:.1%} of {kept:,} tokens are targets"
        values = {"num_target_tokens": scan.num_target_tokens, "target_fraction": share}
        findings.append(Finding("targets", "info", text, source.where, values=values))
    return findings


def describe_dropped(scan: Scan) -> str:
    return ", ".join(f"{reason} ({count})" for reason, count in scan.dropped.items())
