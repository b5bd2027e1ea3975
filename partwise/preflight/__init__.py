"""Will this run learn what its config says? One file per kind of check, cheap ones first.

A check takes the Context and returns Findings; a UserError that it meets is a finding, too. CHECKS need no
weights; MODEL_CHECKS run on the loaded model and leave everything as it was. A check's id is its name
without "check_".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches

from partwise.errors import ConfigError, UserError
from partwise.preflight.context import Context
from partwise.preflight.copies import check_duplicates, check_overlap
from partwise.preflight.evaluate import check_evaluate
from partwise.preflight.features import check_features
from partwise.preflight.images import check_image_tokens, check_images
from partwise.preflight.lineage import check_lineage
from partwise.preflight.loss import check_loss
from partwise.preflight.memory import check_memory
from partwise.preflight.model import check_model
from partwise.preflight.objective import check_first_answers, check_objective
from partwise.preflight.output import check_config, check_disk, check_output
from partwise.preflight.packages import check_packages
from partwise.preflight.packing import check_packing
from partwise.preflight.plan import check_plan
from partwise.preflight.precision import check_precision
from partwise.preflight.rates import check_rates
from partwise.preflight.resume import check_resume
from partwise.preflight.rows import check_rows, check_targets, check_template
from partwise.preflight.stages import find_all
from partwise.preflight.step import check_step
from partwise.preflight.text import check_bos, check_end_of_turn, check_lengths, check_overlong
from partwise.preflight.time import check_time
from partwise.records import Finding

Check = Callable[[Context], list[Finding]]
ROW_CHECKS: list[Check] = [
    check_rows,
    check_template,
    check_images,
    check_image_tokens,
    check_targets,
    check_lengths,
    check_overlong,
    check_bos,
    check_end_of_turn,
    check_duplicates,
    check_overlap,
]
CHECKS: list[Check] = [
    check_config,
    check_packages,
    check_output,
    check_model,
    check_plan,
    check_rates,
    check_resume,
    check_lineage,
    check_disk,
    *ROW_CHECKS,
    check_evaluate,
    check_objective,
    check_packing,
    check_features,
    check_memory,
]
# Of what is the same in all stages of a run.
RUN_CHECKS: list[Check] = [
    check_config,
    check_packages,
    check_output,
    check_model,
    check_resume,
    check_lineage,
    check_disk,
    check_evaluate,
]
MODEL_CHECKS: list[Check] = [check_precision, check_step, check_loss, check_first_answers, check_time]

__all__ = [
    "CHECKS",
    "MODEL_CHECKS",
    "Context",
    "check_id",
    "collect_findings",
    "find",
    "has_errors",
    "select_checks",
]


def check_id(check: Check) -> str:
    return check.__name__.removeprefix("check_").replace("_", "-")


def select_checks(only: Iterable[str] = (), skip: Iterable[str] = ()) -> tuple[list[Check], list[Check]]:
    """The checks without and with weights that `only` names, or all, less those that `skip` names.

    Raises:
        ConfigError: an id is unknown.
    """
    known = [check_id(check) for check in (*CHECKS, *MODEL_CHECKS)]
    only, skip = list(only), list(skip)
    for name in (*only, *skip):
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ConfigError(f"{name!r} is not the id of a check.{hint} Known: {', '.join(known)}.")
    wanted = set(only or known) - set(skip)
    cheap, dear = (
        [check for check in group if check_id(check) in wanted] for group in (CHECKS, MODEL_CHECKS)
    )
    return cheap, dear


def collect_findings(context: Context, checks: Sequence[Check]) -> list[Finding]:
    """Findings of the checks in their order; what several cannot open is said once."""
    findings: list[Finding] = []
    for check in checks:
        try:
            findings += find(check, context)
        except UserError as error:
            if all(finding.message != str(error) for finding in findings):
                findings.append(Finding(check_id(check), "error", str(error)))
    return findings


def find(check: Check, context: Context) -> list[Finding]:
    """What the check says of the run, or of each of its stages. Raises: UserError: as the check."""
    return find_all(check, context, of_stage=check not in RUN_CHECKS, of_rows=check in ROW_CHECKS)


def has_errors(findings: Iterable[Finding]) -> bool:
    return any(finding.level == "error" for finding in findings)
