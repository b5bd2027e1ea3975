"""Tables for the terminal: a plan, findings. In: records. Out: rich renderables. Nothing is printed here."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from partwise.records import Finding, PartPlan, PartsPlan

LEVEL_STYLES = {"error": "bold red", "warning": "yellow", "info": "dim"}
MODE_STYLES = {"frozen": "blue", "lora": "green", "full": "bold green"}


def format_count(count: int) -> str:
    """A parameter count for reading: 340288 -> "340 K", 4_300_079_472 -> "4.30 B"."""
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if count >= size:
            value = count / size
            return f"{value:.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"
    return str(count)


def format_bytes(num_bytes: float) -> str:
    """A size for reading, in powers of 1024: 8_600_159_000 -> "8.0 GiB"."""
    for size, unit in ((2**30, "GiB"), (2**20, "MiB")):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes / 2**10:.0f} KiB"


def format_seconds(seconds: float) -> str:
    """A time for reading, in its two largest units: 4_800 -> "1 h 20 min", 0.0123 -> "12 ms"."""
    if seconds < 0.1:
        return f"{1000 * seconds:.2g} ms"
    if seconds < 10:
        return f"{seconds:.2g} s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes} min"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h"


def plan_table(plan: PartsPlan) -> Table:
    """What each part does in this run: mode, parameters, learning rate, adapters, tensors held back.

    Where 80 columns are too few, the mode's words wrap; names and numbers stay whole.
    """
    table = Table()
    table.add_column("part", no_wrap=True)
    table.add_column("mode", min_width=8)
    for name in ("layers", "parameters", "trainable", "learning\nrate"):
        table.add_column(name, justify="right", no_wrap=True)
    for part in plan.parts:
        table.add_row(
            part.part,
            Text(describe_mode(part), style=MODE_STYLES[part.mode]),
            str(part.num_layers or "-"),
            format_count(part.num_parameters),
            format_count(part.num_trainable),
            "-" if part.mode == "frozen" else f"{part.learning_rate:g}",
        )
    return table


def describe_mode(part: PartPlan) -> str:
    """A mode in a few words: "lora r16 on 28 modules in nf4"."""
    weights = f" in {part.quantization.kind}" if part.quantization else ""
    if part.lora is None:
        return part.mode + weights
    kind = "dora" if part.lora.use_dora else "lora"
    return f"{kind} r{part.lora.rank} on {len(part.lora_targets)} modules{weights}"


def held_lines(plan: PartsPlan) -> list[str]:
    """One line per reason why tensors stay frozen although their part is open."""
    lines = []
    for part in plan.parts:
        for reason in dict.fromkeys(part.held.values()):
            names = [name for name, why in part.held.items() if why == reason]
            shown = ", ".join(names[:2]) + (", ..." if len(names) > 2 else "")
            stay = "1 tensor stays" if len(names) == 1 else f"{len(names)} tensors stay"
            lines.append(f"{part.part}: {stay} frozen: {reason} ({shown})")
    return lines


def findings_text(findings: Sequence[Finding]) -> Text:
    """One paragraph per finding, errors first; paths stay whole, so that they can be copied."""
    order = list(LEVEL_STYLES)
    text = Text()
    for finding in sorted(findings, key=lambda f: order.index(f.level)):
        level = "ok" if finding.level == "info" else finding.level
        text.append(f"{level:<8}", style=LEVEL_STYLES[finding.level])
        text.append(f"{finding.check}: ", style="bold").append(finding.message)
        if finding.where:
            text.append(f"  [{finding.where}]", style="dim")
        if finding.fix:
            text.append(f"\n        -> {finding.fix}", style="cyan")
        text.append("\n")
    return text
