"""A config -> a trained run: checks, plan, training, final/.

`train` writes the run folder; `check` only looks. A run folder is never written over: the same output
again is an error, or goes on from its newest whole checkpoint with resume.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console

from partwise.config import Config, dump_config, load_config
from partwise.errors import CheckpointError, TrainingError, UserError
from partwise.model.load import LoadedModel
from partwise.model.parts import apply_plan
from partwise.preflight import CHECKS, SAMPLE_ROWS, check_step, collect_findings, error_finding
from partwise.records import Finding
from partwise.tables import findings_table, held_lines, plan_table
from partwise.train.engine import seed_everything
from partwise.train.job import Job

# Keys that may differ between a run and its resumption: none of them changes what is learned.
FREE_KEYS = (
    "data.num_workers",
    "train.log_every",
    "train.eval_every",
    "train.save_every",
    "train.keep_last",
)
SAMPLE_ROWS_BEFORE_TRAINING = 32


def check(config: Config, full: bool = False, console: Console | None = None) -> bool:
    """True when nothing speaks against the run. All findings are printed; nothing is written."""
    console = console or Console(quiet=True)
    job = Job(config)
    if config.expanded_flags:
        console.print(config.expanded_flags)
    findings = collect_findings(job, None if full else SAMPLE_ROWS)
    if not any(finding.level == "error" for finding in findings):
        console.print(plan_table(job.plan))
        try:
            findings += check_step(job, open_model(job))
        except UserError as error:
            findings.append(error_finding("step", error))
    console.print(findings_table(findings))
    return not any(finding.level == "error" for finding in findings)
