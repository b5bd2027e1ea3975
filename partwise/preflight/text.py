"""How long are the rows, what does data.max_seq_len cost, and do begin and end of each row stand right?

In: the scans of the context. Out: findings, with the numbers in their values.
"""

from __future__ import annotations

import numpy as np

from partwise.preflight.context import Context
from partwise.preflight.rows import Source, describe_dropped, sources
from partwise.records import Finding

# Rows that are cut lose the end of their last answer. A few very long rows are usual, this share is not.
CUT_FRACTION = 0.1


def check_lengths(context: Context) -> list[Finding]:
    """Tokens per row, and the data.max_seq_len that keeps 99 % and all of the rows whole."""
    return [length_finding(source) for source in sources(context) if source.scan.rows]


def length_finding(source: Source) -> Finding:
    lengths = source.scan.lengths
    middle, high = (int(n) for n in np.percentile(lengths, [50, 90], method="inverted_cdf"))
    most, longest = (int(n) for n in np.percentile(lengths, [99, 100], method="inverted_cdf"))
    text = (
        f"{source.key}: tokens per row: p50 {middle}, p90 {high}, p99 {most}, max {longest}; "
        f"data.max_seq_len {max(most, 8)} keeps 99 % of the rows whole, {max(longest, 8)} all"
    )
    values = {"p50": middle, "p90": high, "p99": most, "max": longest}
    return Finding("lengths", "info", text, source.where, values=values)


def check_overlong(context: Context) -> list[Finding]:
    """Rows that data.max_seq_len cuts or drops, by reason, and the least limit that keeps all images."""
    return [overlong_finding(context, source) for source in sources(context) if source.scan.rows]


def overlong_finding(context: Context, source: Source) -> Finding:
    scan, limit = source.scan, context.config.data.max_seq_len
    num_cut = sum(row.is_cut for row in scan.rows)
    needed = max(int(scan.images_ends.max()), 8)
    values = {"num_cut": num_cut, "dropped": dict(scan.dropped), "least_max_seq_len_for_images": needed}
    if not num_cut and not scan.dropped:
        text = f"{source.key}: no row is cut or dropped at data.max_seq_len {limit}"
        return Finding("overlong", "info", text, source.where, values=values)
    share = num_cut / len(scan.rows)
    text = (
        f"{source.key}: {num_cut} of {len(scan.rows)} rows ({share:.1%}) are cut at data.max_seq_len {limit}"
    )
    if scan.dropped:
        text += f", {scan.dropped.total()} dropped: {describe_dropped(scan)}"
    if needed > limit:
        text += f"; {needed} is the least that keeps all images"
    if not scan.dropped and share <= CUT_FRACTION:
        return Finding("overlong", "info", text, source.where, values=values)
    fix = f"data.max_seq_len {int(scan.lengths.max())} keeps every row whole; shorten the rows, or drop them."
    return Finding("overlong", "warning", text, source.where, fix, values)


def check_bos(context: Context) -> list[Finding]:
    """The begin-of-sequence token stands in each row once, where the model has one."""
    tokenizer = getattr(context.job.processor, "tokenizer", context.job.processor)
    bos = tokenizer.bos_token
    if not bos or bos == tokenizer.eos_token:
        return [Finding("bos", "info", "the model has no begin-of-sequence token of its own")]
    findings: list[Finding] = []
    for source in sources(context):
        counts = {row.num_bos for row in source.scan.rows}
        if not counts:
            continue
        if max(counts) > 1:
            findings.append(repeated_bos(context, source, bos))
        else:
            times = "once" if counts == {1} else "not at all" if counts == {0} else "once or not at all"
            text = f"{source.key}: {bos} stands {times} in each row"
            findings.append(Finding("bos", "warning" if len(counts) > 1 else "info", text, source.where))
    return findings


def repeated_bos(context: Context, source: Source, bos: str) -> Finding:
    """Some models' own templates begin every turn with it; a template from elsewhere should not."""
    first = next(row for row in source.scan.rows if row.num_bos > 1)
    number = sum(row.num_bos > 1 for row in source.scan.rows)
    text = (
        f"{source.key}: {number} of {len(source.scan.rows)} rows hold {bos} more than once "
        f"({first.num_bos} times in {first.name})"
    )
    if context.config.model.chat_template is None:
        return Finding("bos", "info", f"{text}, as the model's own chat template writes it", source.where)
    fix = f"Write {bos} once, at the start of model.chat_template, unless the model was trained otherwise."
    return Finding("bos", "warning", text, source.where, fix)


def check_end_of_turn(context: Context) -> list[Finding]:
    """The token that ends an answer is trained, so that the model learns to stop."""
    findings: list[Finding] = []
    for source in sources(context):
        scan = source.scan
        whole = sum(not row.is_cut and not row.dropped for row in scan.rows)
        if not whole:
            continue
        if scan.num_open_answers:
            text = (
                f"{source.key}: {scan.num_open_answers} of {whole} uncut rows end without a trained "
                "end-of-turn token"
            )
            fix = "The model would not learn to stop; use a chat template that closes the assistant's turn."
            findings.append(Finding("end-of-turn", "warning", text, source.where, fix))
        else:
            text = f"{source.key}: the last answer of each uncut row ends in a trained special token"
            findings.append(Finding("end-of-turn", "info", text, source.where))
    return findings
