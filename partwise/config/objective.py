"""What is learned from a row: the loss, and the shape of row that it takes.

In: values as YAML gives them. Out: the frozen section `objective`, which knows the defaults of each loss, and
the faults of keys that its loss does not read. The formulas are in training/preference.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from partwise.config.document import Fault
from partwise.config.faults import show_value
from partwise.config.sections import Section

Loss = Literal["sft", "text", "dpo", "orpo", "simpo", "kto"]
Shape = Literal["chats", "texts", "pairs", "labels"]
Reference = Literal["auto", "adapter_off", "copy", "precomputed"]

# The shape of row that each loss takes, and which of the keys below it reads.
SHAPES: dict[Loss, Shape] = {
    "sft": "chats",
    "text": "texts",
    "dpo": "pairs",
    "orpo": "pairs",
    "simpo": "pairs",
    "kto": "labels",
}
READ_BY: dict[str, tuple[Loss, ...]] = {
    "variant": ("dpo",),
    "beta": ("dpo", "orpo", "simpo", "kto"),
    "label_smoothing": ("dpo", "simpo"),
    "gamma": ("simpo",),
    "desirable_weight": ("kto",),
    "undesirable_weight": ("kto",),
    "sft_weight": ("dpo", "simpo"),
    "reference": ("dpo", "kto"),
    "reference_cache": ("dpo", "kto"),
}
BETAS: dict[Loss, float] = {"dpo": 0.1, "orpo": 0.1, "simpo": 2.0, "kto": 0.1}


class ObjectiveConfig(Section):
    loss: Loss = Field(
        "sft",
        description="What is learned: the answers of chats (sft), every token of raw text (text), which of "
        "two answers is better (dpo, orpo, simpo), or whether one is good (kto).",
    )
    variant: Literal["sigmoid", "hinge", "ipo"] = Field(
        "sigmoid", description="How dpo weighs a pair's margin: the DPO paper's, SLiC's or IPO's."
    )
    beta: float | None = Field(
        None,
        gt=0,
        description="How strongly answers are told apart; in dpo and kto how near to the reference the model "
        "stays. Default: 0.1, for simpo 2.0. In orpo the weight of the odds ratio.",
    )
    label_smoothing: float = Field(
        0.0,
        ge=0,
        lt=0.5,
        description="The share of pairs that are believed to be the wrong way round (cDPO).",
    )
    gamma: float = Field(1.0, ge=0, description="The margin that simpo asks for.")
    desirable_weight: float = Field(1.0, gt=0, description="What good answers weigh in kto.")
    undesirable_weight: float = Field(1.0, gt=0, description="What bad answers weigh in kto.")
    sft_weight: float = Field(
        0.0, ge=0, description="What the chosen answers' token loss weighs beside dpo or simpo."
    )
    reference: Reference = Field(
        "auto",
        description="Where the reference's log-probabilities come from: the model with its adapters switched "
        "off, a frozen copy in memory, or computed once before the first step and kept on disk. auto: "
        "adapter_off where only fresh adapters train, else precomputed.",
    )
    reference_cache: str | None = Field(
        None,
        min_length=1,
        description="Folder that keeps precomputed log-probabilities; default is OUTPUT/references.",
    )

    @property
    def shape(self) -> Shape:
        """What the rows must look like."""
        return SHAPES[self.loss]

    @property
    def per_row(self) -> int:
        """How many answers a row holds."""
        return 2 if self.shape == "pairs" else 1

    @property
    def is_preference(self) -> bool:
        return self.shape in ("pairs", "labels")

    @property
    def has_reference(self) -> bool:
        return self.loss in READ_BY["reference"]

    @property
    def strength(self) -> float:
        """beta, or its default for this loss."""
        return BETAS[self.loss] if self.beta is None else self.beta


def check_objective(objective: ObjectiveConfig) -> Iterator[Fault]:
    for name in sorted(objective.model_fields_set - {"loss"}):
        value = getattr(objective, name)
        if value is not None and objective.loss not in READ_BY[name]:
            yield Fault(
                f"objective.{name}",
                f"objective.{name}: {show_value(value)} has no effect: objective.loss {objective.loss} does "
                f"not read it, but {', '.join(READ_BY[name])}. Remove it, or change the loss.",
            )
    if objective.variant != "sigmoid" and objective.label_smoothing:
        yield Fault(
            "objective.label_smoothing",
            f"objective.label_smoothing: {objective.label_smoothing:g} has no effect: it is defined for "
            f"the sigmoid, not for objective.variant {objective.variant}. Remove it, or the variant.",
        )
    if objective.reference_cache is not None and objective.reference in ("adapter_off", "copy"):
        yield Fault(
            "objective.reference_cache",
            f"objective.reference_cache: {objective.reference_cache} has no effect: objective.reference "
            f"is {objective.reference}, which keeps nothing on disk. Remove it, or write reference: "
            "precomputed.",
        )
