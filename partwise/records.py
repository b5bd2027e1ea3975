"""The types that flow: row -> Conversation -> Example -> Batch -> loss sum -> StepMetrics. No I/O.

Shapes: T tokens of one example, B rows of a batch. Tensors live on the CPU until the step moves them.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch
    from PIL import Image as PILImage

IGNORE_INDEX = -100
PART_NAMES = ("vision_tower", "audio_tower", "projector", "language_model")
MODES = ("frozen", "lora", "full")
Mode = Literal["frozen", "lora", "full"]
# Which answer of a preference row a document holds: "other" is one of another row, "" no such row's.
Side = Literal["", "chosen", "rejected", "other"]
Span = tuple[int, int]  # where something starts and where it ends, the end excluded


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Image:
    """An image as the row gives it; decoded only when the example is built.

    `source` is an absolute path, encoded bytes, or a PIL image. `where` names it in messages.
    """

    source: str | bytes | PILImage.Image
    where: str


@dataclass(frozen=True)
class Message:
    """One turn. `train` says whether an assistant turn's tokens are labels."""

    role: str
    contents: tuple[Text | Image, ...]
    train: bool = True


@dataclass(frozen=True)
class Conversation:
    """One row of a data file, or one answer of it. `source` is the file, `row` the zero-based row in it."""

    messages: tuple[Message, ...]
    source: str
    row: int
    side: Side = ""

    @property
    def images(self) -> tuple[Image, ...]:
        return tuple(c for m in self.messages for c in m.contents if isinstance(c, Image))

    @property
    def num_characters(self) -> int:
        """Of all texts; images count nothing."""
        return sum(len(c.text) for m in self.messages for c in m.contents if isinstance(c, Text))


@dataclass(frozen=True)
class PixelTable:
    """The number that a model is given for each 8-bit value, per channel; 0 in tiles that are padding."""

    values: tuple[tuple[float, ...], ...]
    has_padding: bool


@dataclass(frozen=True)
class Example:
    """One tokenised conversation.

    `labels` (T,) are unshifted: labels[t] is input_ids[t] or IGNORE_INDEX, and labels[0] is always
    IGNORE_INDEX. `token_fields` are other per-token inputs of the model, each (T,), such as Gemma-3's
    token_type_ids. `media` are the model's image inputs as its processor made them, first axis images or
    patches; with `pixels`, a table, its pixels are in 8 bits. Where they are kept features, an example that
    another process is asked about has its `image_inputs`, too: those of the whole model. `reference` is the
    log-probability of the labels under the reference, where it was computed before.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    token_fields: dict[str, torch.Tensor]
    media: dict[str, torch.Tensor]
    num_target_tokens: int
    source: str
    row: int
    pixels: PixelTable | None = None
    image_inputs: dict[str, torch.Tensor] | None = None
    side: Side = ""
    reference: float | None = None


@dataclass(frozen=True)
class Dropped:
    """A row that gives no example, and why: `reason` is one of data.chat.DROP_REASONS."""

    reason: str
    source: str
    row: int


@dataclass(frozen=True)
class Pack:
    """Where documents lie in a row that holds several, one after the other.

    `documents` fill the row; the last of them is its padding, where it has any. Tokens of an `image_run` see
    each other in both directions; each run lies in one document and has at least two tokens.
    """

    documents: tuple[Span, ...]
    image_runs: tuple[Span, ...] = ()


@dataclass(frozen=True)
class Batch:
    """A micro-batch: rows of one document each, right-padded to the longest, or one row that is a pack.

    `input_ids`, `labels`, `document_ids` and each of `token_fields` are (B, T). document_ids is the index
    of the document a token belongs to and -1 for padding. A pack has `position_ids`, too, which begin anew in
    every document: (1, T), or (axes, 1, T).
    `rows` names the examples as errors do: "file:line" or "file row N". `sides` and `references` are those of
    the documents, in the order of document_ids.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    document_ids: torch.Tensor
    token_fields: dict[str, torch.Tensor]
    media: dict[str, torch.Tensor]
    num_target_tokens: int
    num_input_tokens: int
    rows: tuple[str, ...]
    position_ids: torch.Tensor | None = None
    pack: Pack | None = None
    pixels: PixelTable | None = None
    sides: tuple[Side, ...] = ()
    references: tuple[float | None, ...] = ()

    @property
    def counts(self) -> Counter[str]:
        """Documents by side, and under "chosen tokens" the target tokens of the chosen ones."""
        counts = Counter[str](self.sides)
        if "chosen" in counts:
            chosen = [i for i, side in enumerate(self.sides) if side == "chosen"]
            of_targets = self.document_ids[self.labels != IGNORE_INDEX].tolist()
            counts["chosen tokens"] = sum(map(Counter(of_targets).__getitem__, chosen))
        return counts

    def pin_memory(self) -> Batch:
        """The same with its tensors in memory that a GPU copies from while it computes."""
        return replace(self, **{f.name: _pin(getattr(self, f.name)) for f in fields(self)})


def _pin(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _pin(one) for name, one in value.items()}
    return value.pin_memory() if hasattr(value, "pin_memory") else value


@dataclass(frozen=True)
class Totals:
    """What all ranks have together in a step."""

    num_target_tokens: int
    num_input_tokens: int
    rows: tuple[str, ...] = ()
    counts: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class StepData:
    """A rank's micro-batches of one optimizer step, and its rows that gave none, counted by reason.

    `totals` are of all ranks; None where this is the only one. `others` are answers of other rows to the same
    prompts, which KTO compares with: they are looked at, not learned.
    """

    step: int
    batches: tuple[Batch, ...]
    dropped: Counter[str] = field(default_factory=Counter)
    totals: Totals | None = None
    others: tuple[Batch, ...] = ()

    @property
    def num_target_tokens(self) -> int:
        """Of all ranks."""
        return (
            self.totals.num_target_tokens if self.totals else sum(b.num_target_tokens for b in self.batches)
        )

    @property
    def num_input_tokens(self) -> int:
        """Of all ranks."""
        mine = sum(batch.num_input_tokens for batch in self.batches)
        return self.totals.num_input_tokens if self.totals else mine

    def pin_memory(self) -> StepData:
        """Called by torch's DataLoader, in a thread of its own, where it is told to pin."""
        batches, others = (tuple(b.pin_memory() for b in some) for some in (self.batches, self.others))
        return replace(self, batches=batches, others=others)

    @property
    def counts(self) -> Counter[str]:
        """Documents by side, and chosen target tokens, of all ranks."""
        if self.totals:
            return self.totals.counts
        return sum((batch.counts for batch in (*self.batches, *self.others)), Counter[str]())

    @property
    def rows(self) -> tuple[str, ...]:
        """Of all ranks, as errors name them."""
        mine = tuple(row for batch in self.batches for row in batch.rows)
        return self.totals.rows if self.totals else mine


@dataclass(frozen=True)
class LoraSettings:
    rank: int
    alpha: float
    dropout: float
    use_rslora: bool
    use_dora: bool


@dataclass(frozen=True)
class Quantization:
    """Linear layers whose weights are held in 4 bits, by full name. `is_double`: their scales in 8 bits."""

    kind: Literal["nf4"]
    is_double: bool
    modules: tuple[str, ...]


@dataclass(frozen=True)
class PartPlan:
    """What happens to one part in this run. Names are full dotted names in the loaded model.

    `trainable` are the names after adapters were added. `held` are parameters that the mode would open
    but that stay frozen, each with its reason. `lora_targets` are the modules that get an adapter.
    `rate_fractions` are those of the learning rate that a tensor trains at, where layers have unlike ones.
    """

    part: str
    mode: Mode
    module_paths: tuple[str, ...]
    num_parameters: int
    num_trainable: int
    num_layers: int
    trainable: tuple[str, ...]
    held: dict[str, str]
    learning_rate: float
    weight_decay: float
    lora: LoraSettings | None = None
    lora_targets: tuple[str, ...] = ()
    quantization: Quantization | None = None
    rate_fractions: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class PartsPlan:
    """One plan for all parts of a model, in the order of PART_NAMES."""

    parts: tuple[PartPlan, ...]

    def __getitem__(self, part: str) -> PartPlan:
        for plan in self.parts:
            if plan.part == part:
                return plan
        raise KeyError(part)

    def part_of(self, name: str) -> str:
        """The part that a module or parameter lies in; "" for none."""
        paths = (
            (len(path), part.part)
            for part in self.parts
            for path in part.module_paths
            if not path or f"{name}.".startswith(f"{path}.")
        )
        return max(paths, default=(0, ""))[1]

    def __contains__(self, part: str) -> bool:
        return any(plan.part == part for plan in self.parts)

    @property
    def has_adapters(self) -> bool:
        """Whether the run is saved as an adapter folder."""
        return any(plan.mode == "lora" for plan in self.parts)

    @property
    def trains_vision(self) -> bool:
        """Whether something beside the language model trains."""
        return any(part.trainable for part in self.parts if part.part != "language_model")

    @property
    def is_quantized(self) -> bool:
        return any(plan.quantization for plan in self.parts)

    @property
    def trainable(self) -> tuple[str, ...]:
        return tuple(name for plan in self.parts for name in plan.trainable)


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step. `loss` is the mean over the step's target tokens, in nats.

    `grad_norm` is the global norm before clipping, `grad_norms` the same per part. Of each part that this
    step reached, `update_ratios` is the norm of its update, without weight decay, over the norm of its
    weights, and `zero_gradient_fractions` the share of its elements whose gradient is exactly zero.
    `preference` has what a preference loss tells of the step's answers, by name; empty for other losses.
    """

    step: int
    epoch: float
    loss: float
    grad_norm: float
    grad_norms: dict[str, float]
    update_ratios: dict[str, float]
    zero_gradient_fractions: dict[str, float]
    learning_rates: dict[str, float]
    num_input_tokens: int
    num_target_tokens: int
    num_dropped: dict[str, int]
    step_seconds: float
    data_wait_seconds: float
    peak_memory_bytes: int
    preference: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Finding:
    """What one preflight check found. `level` is error, warning or info."""

    check: str
    level: Literal["error", "warning", "info"]
    message: str
    where: str = ""
    fix: str = ""
    values: dict[str, Any] = field(default_factory=dict)
