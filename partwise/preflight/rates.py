"""Is a learning rate of the size that its mode is trained with? A hint from published recipes, no proof.

In: the plan. Out: findings. What a rate does to the weights at hand is said by precision.py.
"""

from __future__ import annotations

from partwise.preflight.context import Context
from partwise.records import Finding, PartPlan

# Adapters train at about ten times the rate of full weights: 1e-4 to 2e-4 where those take 1e-5 to 2e-5.
# Source: docs/learning-rate.md.
LEAST_LORA_RATE = 5e-5
USUAL_LORA_RATE = 2e-4


def check_rates(context: Context) -> list[Finding]:
    """LoRA at a learning rate that is usual for full fine-tuning; losses of preferences take less."""
    if context.config.objective.is_preference:
        return []
    return [
        low_rate(context, part)
        for part in context.job.plan.parts
        if part.mode == "lora" and part.learning_rate < LEAST_LORA_RATE
    ]


def low_rate(context: Context, part: PartPlan) -> Finding:
    key = f"parts.{part.part}.learning_rate"
    settings = context.config.parts.settings(part.part)
    source = "train.learning_rate" if settings is None or settings.learning_rate is None else key
    text = (
        f"{source}: {part.part} trains with LoRA at {part.learning_rate:g}, a rate for full fine-tuning: "
        "adapters usually take ten times as much, and learn slowly with this"
    )
    fix = f"Set {key}: {USUAL_LORA_RATE:g}, or try it out: partwise find-lr CONFIG."
    values = {"part": part.part, "learning_rate": part.learning_rate}
    return Finding("rates", "warning", text, context.config.where(source), fix, values)
