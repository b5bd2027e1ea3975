"""Are rows there twice? Rows are copies when their tokens, labels and image inputs are all equal.

In: the scans of the context; rows that were not read are not compared. Out: findings.
"""

from __future__ import annotations

from collections import defaultdict

from partwise.data.scan import Scan
from partwise.preflight.context import Context
from partwise.preflight.rows import Source, sources
from partwise.records import Finding

# A row that comes again by chance does no harm; a share like this is a file read twice, or a faulty join.
COPIES_FRACTION = 0.01


def check_duplicates(context: Context) -> list[Finding]:
    """Training rows that are exact copies of another one: same tokens, labels and images."""
    source = next(sources(context))
    groups = [names for names in names_by_digest(source.scan).values() if len(names) > 1]
    number = sum(len(names) - 1 for names in groups)
    if not number:
        return [Finding("duplicates", "info", f"{source.key}: no row is a copy of another", source.where)]
    first, second = groups[0][:2]
    text = (
        f"{source.key}: {number} of {len(source.scan.rows)} rows are exact copies of an earlier one, "
        f"such as {second} of {first}"
    )
    values = {"num_copies": number, "first_pair": [first, second]}
    if number < COPIES_FRACTION * len(source.scan.rows):
        return [Finding("duplicates", "info", text, source.where, values=values)]
    fix = "Remove them, unless they are meant to weigh more."
    return [Finding("duplicates", "warning", text, source.where, fix, values)]


def check_overlap(context: Context) -> list[Finding]:
    """Evaluation rows that the model also trains on."""
    train, *evaluations = sources(context)
    known = names_by_digest(train.scan)
    return [overlap_finding(train, known, source) for source in evaluations]


def overlap_finding(train: Source, known: dict[bytes, list[str]], source: Source) -> Finding:
    seen = [row for row in source.scan.rows if row.digest in known]
    compared = f"{source.read} of {source.key} against {train.read} of {train.key}"
    if not seen:
        return Finding("overlap", "info", f"no evaluation row is a training row ({compared})", source.where)
    pair = [seen[0].name, known[seen[0].digest][0]]
    text = f"{len(seen)} evaluation rows are training rows, too, such as {pair[0]} and {pair[1]} ({compared})"
    fix = "Remove them from one side: the evaluation loss would be of rows that were learned by heart."
    values = {"num_shared": len(seen), "first_pair": pair}
    return Finding("overlap", "warning", text, source.where, fix, values)


def names_by_digest(scan: Scan) -> dict[bytes, list[str]]:
    """Row names by content, in the order of the rows."""
    names: dict[bytes, list[str]] = defaultdict(list)
    for row in scan.rows:
        names[row.digest].append(row.name)
    return dict(names)
