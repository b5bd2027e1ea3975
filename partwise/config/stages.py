"""Stages of a run: the keys that say which parts train when, and what is wrong with them.

In: sections as YAML gives them. Out: frozen sections, and a fault for each stage that contradicts another key
or would have no effect. `parts` says how each part trains, stages say when. How they become the configs of
single stages is in expand.py; layer ranges are judged there too, since only a model knows its layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag, field_validator

from partwise.config.document import Fault
from partwise.config.sections import Files, PartConfig, Section, Steps, Tokens, layer_range
from partwise.records import PART_NAMES, Mode

if TYPE_CHECKING:
    from partwise.config.tree import Config

Part = Literal["vision_tower", "audio_tower", "projector", "language_model"]


class StagePartConfig(Section):
    """What is different for a part in this stage; how its adapters look is said once, under `parts`."""

    mode: Mode | None = Field(None, description="As under parts, or frozen; may be left out.")
    learning_rate: float | None = Field(None, gt=0, description="Of the part in this stage.")
    weight_decay: float | None = Field(None, ge=0, description="Of the part in this stage.")
    layers: str | None = Field(None, description="Range of layers that train in this stage.")
    layer_decay: float | None = Field(None, gt=0, le=1, description="Of the part in this stage.")

    @field_validator("layers", mode="before")
    @classmethod
    def _check_layers(cls, value: Any) -> Any:
        return layer_range(value)


StagePart = Annotated[
    Annotated[Mode, Tag("a mode")] | Annotated[StagePartConfig, Tag("settings")],
    Discriminator(lambda value: "settings" if isinstance(value, Mapping | StagePartConfig) else "a mode"),
]
StageParts = Annotated[
    Annotated[dict[Part, StagePart], Tag("parts by name")] | Annotated[list[Part], Tag("names")],
    Discriminator(lambda value: "names" if isinstance(value, list) else "parts by name"),
]


class StableConfig(Section):
    """When a stage's loss has come to rest."""

    window: Steps = Field(50, ge=4, description="How many of the last logged steps are looked at.")
    slope: float = Field(
        0.02,
        gt=0,
        description="The line through the losses of the window rises or falls by at most this fraction of "
        "their mean.",
    )
    spread: float = Field(
        0.5,
        gt=0,
        description="The middle half of the gradient norms of the window spans at most this fraction of "
        "their median.",
    )
    min_steps: Steps = Field(1, ge=1, description="The stage has at least so many steps.")
    max_steps: Steps | None = Field(
        None, ge=1, description="And at most so many. Default: an epoch of the stage's rows."
    )


Until = Annotated[
    Annotated[Literal["stable"], Tag("a word")] | Annotated[StableConfig, Tag("settings")],
    Discriminator(lambda value: "settings" if isinstance(value, Mapping | StableConfig) else "a word"),
]


class StageDataConfig(Section):
    train: Files | None = Field(None, description="Rows of this stage, from their first on.")
    max_seq_len: Tokens | None = Field(None, ge=8, description="Longest example of this stage.")


class StageConfig(Section):
    name: str | None = Field(
        None, min_length=1, description="How messages and plots call it. Default: its parts."
    )
    parts: StageParts = Field(
        description="What trains: names of parts, or each with its layers and rates in this stage."
    )
    steps: Steps | None = Field(None, ge=1, description="Length of the stage.")
    epochs: float | None = Field(
        None, gt=0, description="Length of the stage.", json_schema_extra={"unit": "epochs"}
    )
    until: Until | None = Field(
        None, description="stable, or its settings: the stage ends when the loss has come to rest."
    )
    learning_rate: float | None = Field(
        None, gt=0, description="Peak rate of all parts of the stage that have none of their own in it."
    )
    learning_rate_schedule: Literal["cosine", "linear", "constant"] | None = Field(
        None, description="Instead of train's. Default with until: constant."
    )
    warmup_steps: Steps | None = Field(None, ge=0, description="Instead of train's.")
    min_learning_rate_fraction: float | None = Field(None, ge=0, le=1, description="Instead of train's.")
    data: StageDataConfig = Field(
        default_factory=StageDataConfig, description="Instead of the run's, as far as it is given."
    )

    def settings(self, part: str) -> StagePartConfig | None:
        """What the stage says of the part; None where it does not train in it."""
        if isinstance(self.parts, list):
            return StagePartConfig() if part in self.parts else None
        value = next((value for name, value in self.parts.items() if name == part), None)
        settings = StagePartConfig(mode=value) if isinstance(value, str) else value
        return None if settings is None or settings.mode == "frozen" else settings

    @property
    def named(self) -> list[str]:
        """The parts that the stage speaks of, open or frozen."""
        return list(self.parts)

    @property
    def opened(self) -> list[str]:
        """The parts that train, in the order of the model."""
        return [part for part in PART_NAMES if self.settings(part)]

    @property
    def title(self) -> str:
        return self.name or " + ".join(self.opened)

    @property
    def stable(self) -> StableConfig | None:
        """The settings of `until` in full."""
        return StableConfig() if self.until == "stable" else self.until


class UnfreezeConfig(Section):
    model_config = ConfigDict(populate_by_name=True)

    part: Part = Field("language_model", description="The part whose layers open one group after another.")
    layers_per_stage: int = Field(ge=1, description="How many more layers each stage opens.")
    start: Literal["top", "bottom"] = Field(
        "top", alias="from", description="Where the first stage is: at the output, or at the input."
    )


def check_stages(config: Config) -> Iterator[Fault]:
    """What is wrong with the stages, as far as it is known without model and rows."""
    given = [key for key in ("stages", "schedule", "unfreeze") if getattr(config, key) is not None]
    if len(given) > 1:
        yield Fault(
            given[1],
            f"{given[1]} beside {given[0]}: each says which parts train when. Keep one of them.",
        )
    if not given:
        return
    if config.schedule is not None and len(progressive_parts(config)) < 2:
        opened = ", ".join(part for group in progressive_parts(config) for part in group)
        yield Fault(
            "schedule",
            f"schedule: progressive has one stage only, because nothing but {opened or 'nothing'} trains. "
            "Open another part, or remove it.",
        )
    if config.unfreeze is not None:
        yield from _check_unfreeze(config)
    if config.stages is not None:
        yield from _check_list(config, config.stages)
    if config.data.feature_cache is not None and any(stage.data.train for stage in config.stages or ()):
        yield Fault(
            "data.feature_cache",
            f"data.feature_cache: {config.data.feature_cache} beside a stage with rows of its own: only "
            "images of data.train are kept. Remove one of them.",
        )


def progressive_parts(config: Config) -> list[list[str]]:
    """What each stage of `schedule: progressive` opens: parts that `parts` leaves frozen are passed over."""
    order = (("language_model",), ("projector",), ("vision_tower", "audio_tower"))
    groups = [[part for part in group if is_open(config, part)] for group in order]
    return [group for group in groups if group]


def is_open(config: Config, part: str) -> bool:
    settings = config.parts.settings(part)
    return settings is not None and settings.mode != "frozen"


def _check_unfreeze(config: Config) -> Iterator[Fault]:
    assert config.unfreeze is not None
    part = config.unfreeze.part
    settings = config.parts.settings(part) or PartConfig(mode="frozen")
    if settings.mode == "frozen":
        yield Fault(
            "unfreeze.part",
            f"unfreeze.part: {part} is frozen under parts, so that none of its layers ever train. "
            f"Set parts.{part}: lora or full.",
        )
    if settings.layers is not None:
        yield Fault(
            "unfreeze.part",
            f'unfreeze.part: {part} beside parts.{part}.layers: "{settings.layers}": unfreeze decides which '
            "layers train. Remove the range.",
        )


def _check_list(config: Config, stages: list[StageConfig]) -> Iterator[Fault]:
    if not stages:
        yield Fault("stages", "stages: the list is empty. Name at least one stage, or remove it.")
        return
    train = config.train
    if train.steps is not None or train.epochs != 1.0:
        key = "steps" if train.steps is not None else "epochs"
        yield Fault(
            f"train.{key}",
            f"train.{key}: {getattr(train, key):g} has no effect: each of the stages says how long it is. "
            "Remove it.",
        )
    for index, stage in enumerate(stages):
        yield from _check_stage(config, stage, index)
    titles = [stage.title for stage in stages]
    for index, title in enumerate(titles):
        if title in titles[:index]:
            yield Fault(
                f"stages.{index}",
                f'stages.{index}: a stage before has the name "{title}" too. Give each a name of its own.',
            )
    for index, (before, stage) in enumerate(pairwise(stages), start=1):
        if _same(before, stage):
            yield Fault(
                f"stages.{index}",
                f'stages.{index} "{stage.title}" is the stage before once more: the same parts, rates and '
                "rows. Change what trains, or make the stage before longer.",
            )
    for part in PART_NAMES:
        if is_open(config, part) and not any(stage.settings(part) for stage in stages):
            yield Fault(
                f"parts.{part}",
                f"parts.{part}: it is open, but none of the stages trains it. Freeze it, or name it in one.",
            )


def _check_stage(config: Config, stage: StageConfig, index: int) -> Iterator[Fault]:
    key, told = f"stages.{index}", f'stages.{index} "{stage.title}"'
    lengths = [name for name in ("steps", "epochs", "until") if getattr(stage, name) is not None]
    if len(lengths) > 1:
        yield Fault(
            f"{key}.{lengths[1]}", f"{told}: {' and '.join(lengths)} are both given. Keep one of them."
        )
    elif not lengths:
        yield Fault(key, f"{told} does not say how long it is. Give steps, epochs, or until: stable.")
    if not stage.opened:
        yield Fault(key, f"stages.{index} trains nothing. Name a part under its parts: [language_model].")
    for part in stage.named:
        settings, general = stage.settings(part), config.parts.settings(part)
        mode = "frozen" if general is None else general.mode
        if settings is None:
            continue
        if mode == "frozen":
            wanted = settings.mode or "full"
            yield Fault(
                f"{key}.parts.{part}",
                f"{told} trains {part}, but parts does not say how. Write parts.{part}: {wanted}.",
            )
        elif settings.mode not in (None, mode):
            yield Fault(
                f"{key}.parts.{part}",
                f"{told}: {part} is {settings.mode} here and {mode} under parts: what one stage trained, the "
                "next could not go on with. Write the same, or make two runs, with partwise export between.",
            )
    yield from _check_steps(config, stage, index)


def _check_steps(config: Config, stage: StageConfig, index: int) -> Iterator[Fault]:
    key, told, stable = f"stages.{index}", f'stages.{index} "{stage.title}"', stage.stable
    limit = stage.steps if stable is None else stable.max_steps
    if stable is not None and stable.max_steps is not None and stable.min_steps > stable.max_steps:
        yield Fault(
            f"{key}.until",
            f"{told}: until.min_steps: {stable.min_steps} is more than max_steps ({stable.max_steps}). "
            "Lower the first or raise the second.",
        )
    if limit is not None:
        yield from warmup_faults(key, told, warmup_of(config, stage), limit)


def warmup_of(config: Config, stage: StageConfig) -> int:
    return config.train.warmup_steps if stage.warmup_steps is None else stage.warmup_steps


def warmup_faults(key: str, told: str, warmup_steps: int, num_steps: int) -> Iterator[Fault]:
    if warmup_steps >= num_steps:
        yield Fault(
            f"{key}.warmup_steps",
            f"{told}: warmup_steps: {warmup_steps} leaves nothing of its {num_steps} steps. Warm up for "
            "fewer steps.",
        )


def _same(before: StageConfig, stage: StageConfig) -> bool:
    """Whether two stages differ in nothing but their names, lengths and warm-ups."""
    unlike = {"name", "steps", "epochs", "until", "parts", "warmup_steps"}
    return before.model_dump(exclude=unlike) == stage.model_dump(exclude=unlike) and all(
        _plain(before, part) == _plain(stage, part) for part in PART_NAMES
    )


def _plain(stage: StageConfig, part: str) -> dict[str, Any] | None:
    """What the stage says of a part, whether or not it repeats the mode."""
    settings = stage.settings(part)
    return None if settings is None else settings.model_dump(exclude={"mode"})
