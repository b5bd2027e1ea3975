"""Are weight types and learning rates such that an update arrives, and does not wreck the weights?

In: the model with the plan applied, and the types that its files name. Trained bfloat16 weights have fp32
masters, so they are safe and no finding. Quantised weights are refused when the folder is opened.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch

from partwise.model.folder import read_header
from partwise.preflight.context import Context
from partwise.records import Finding, PartPlan

# AdamW moves each weight by about its learning rate. As a fraction of the part's weights: above, one step
# replaces much of what was learned; below, it is less than an fp32 number can take.
HIGHEST_UPDATE = 0.1
LOWEST_UPDATE = 1e-7

SAMPLED_TENSORS = 16
SAMPLED_ROWS = 64
FILE_TYPES = {"BF16": "bfloat16", "F32": "float32", "F16": "float16", "F64": "float64"}


def check_precision(context: Context) -> list[Finding]:
    """The types of the files beside model.dtype, and each part's largest update beside its weights."""
    findings = type_findings(context)
    weights = dict(context.loaded.model.named_parameters())
    for part in context.job.plan.parts:
        sampled = [weights[name] for name in part.trainable if weights[name].ndim > 1]
        if sampled:
            findings.append(rate_finding(context, part, sampled))
    return findings


def rate_finding(context: Context, part: PartPlan, weights: list[torch.Tensor]) -> Finding:
    """The part's peak rate beside the middle size of its matrices, new adapters' zeros aside."""
    size = typical_size(weights)
    update = part.learning_rate / size if size else 0.0
    key = f"parts.{part.part}.learning_rate"
    settings = context.config.parts.settings(part.part)
    if settings is None or settings.learning_rate is None:
        key = "train.learning_rate"
    text = (
        f"{key}: {part.learning_rate:g} moves a weight of {part.part} by about {update:.1g} of its size "
        f"({size:.2g}) in a step at the peak"
    )
    values = {"part": part.part, "update_fraction": update, "typical_weight": size}
    if size and update > HIGHEST_UPDATE:
        fix = f"{HIGHEST_UPDATE * size:.1g} is the highest that is usual here: lower it."
    elif size and update < LOWEST_UPDATE:
        fix = f"The part would hardly learn; {LOWEST_UPDATE * size:.1g} is the least that arrives: raise it."
    else:
        return Finding("precision", "info", text, context.config.where(key), values=values)
    return Finding("precision", "warning", text, context.config.where(key), fix, values)


@torch.no_grad()
def typical_size(weights: list[torch.Tensor]) -> float:
    """Median over some of the matrices, evenly chosen, of the root mean square of their first rows."""
    chosen = weights[:: max(1, len(weights) // SAMPLED_TENSORS)]
    sizes = [weight[:SAMPLED_ROWS].float().pow(2).mean().sqrt().item() for weight in chosen]
    sizes = sorted(size for size in sizes if size > 0)
    return sizes[len(sizes) // 2] if sizes else 0.0


def type_findings(context: Context) -> list[Finding]:
    """Several floating types in the files, or one that is not model.dtype: info, as nothing is lost by it."""
    wanted, where = context.config.model.dtype, context.config.where("model.dtype")
    counts = file_types(Path(context.loaded.path))
    if not counts or set(counts) == {wanted}:
        return []
    held = ", ".join(f"{number} {name}" for name, number in counts.most_common())
    text = f"model.dtype: the files hold {held} tensors, and all become {wanted}"
    if wanted == "float32" and set(counts) <= {"bfloat16", "float16"}:
        text += "; bfloat16 trains through fp32 masters, too, with half the memory for frozen weights"
    elif wanted == "bfloat16":
        text += "; float32 keeps their digits, at twice the memory for frozen weights"
    return [Finding("precision", "info", text, where, values={"num_tensors": dict(counts)})]


def file_types(folder: Path) -> Counter[str]:
    """Floating type -> number of tensors, from the headers of the folder's safetensors files."""
    counts: Counter[str] = Counter()
    for path in sorted(folder.glob("*.safetensors")):
        types = (tensor["dtype"] for tensor in read_header(path)[0].values())
        counts.update(FILE_TYPES[name] for name in types if name in FILE_TYPES)
    return counts
