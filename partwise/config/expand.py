"""Stages -> an ordinary config for each of them.

In: a run's config, and what is known of its model and rows. Out: named configs, in which `parts`, rates,
steps and rows are those of one stage and nothing says stages any more: whatever trains a config trains a
stage. A part that does not train in a stage is frozen in its config, its weights held as in all others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

from partwise.config.sections import DataConfig, PartConfig, PartsConfig, TrainConfig
from partwise.config.stages import (
    StableConfig,
    StageConfig,
    is_open,
    progressive_parts,
    warmup_faults,
    warmup_of,
)
from partwise.config.tree import Config
from partwise.errors import ConfigError
from partwise.records import PART_NAMES

# Where a schedule makes the stages: the share of a stage that warms up, which is LLaVA's, and how much slower
# a tower trains that has no rate of its own, which is LLaVA-OneVision's (2e-6 beside 1e-5).
WARMUP_FRACTION = 0.03
TOWER_DIVISOR = 5
TOWERS = ("vision_tower", "audio_tower")

S = TypeVar("S", Config, PartConfig, TrainConfig, DataConfig)


@dataclass(frozen=True)
class Stage:
    """`config.train.steps` is the stage's length, or the most that it can be where it has an `until`."""

    name: str
    config: Config
    until: StableConfig | None = None

    @property
    def opened(self) -> list[str]:
        return [part for part in PART_NAMES if is_open(self.config, part)]


def has_stages(config: Config) -> bool:
    return config.stages is not None or config.schedule is not None or config.unfreeze is not None


def stage_configs(
    config: Config, num_layers: Callable[[str], int], steps_per_epoch: Callable[[DataConfig], int]
) -> list[Stage]:
    """The stages of a config that has some, in their order.

    Raises:
        ConfigError: a stage does not fit the model's layers, or its warm-up the rows.
    """
    if config.stages is not None:
        return [explicit_stage(config, stage, i, steps_per_epoch) for i, stage in enumerate(config.stages)]
    if config.unfreeze is not None:
        plans = unfreeze_plans(config, num_layers(config.unfreeze.part))
    else:
        plans = progressive_plans(config)
    total = config.train.steps or math.ceil(config.train.epochs * steps_per_epoch(config.data))
    if total < len(plans):
        raise ConfigError(
            f"{config.where('train')}: train: {total} steps are too few for {len(plans)} stages "
            f"({', '.join(plans)}). Train for more steps or epochs."
        )
    bounds = [total * number // len(plans) for number in range(len(plans) + 1)]
    lengths = [end - start for start, end in pairwise(bounds)]
    return [
        Stage(name, with_parts(config, parts, scheduled_train(config, name, num_steps)))
        for (name, parts), num_steps in zip(plans.items(), lengths, strict=True)
    ]


def progressive_plans(config: Config) -> dict[str, dict[str, PartConfig]]:
    """Stage name -> the parts that train in it: those of the stages before, and what is new."""
    plans: dict[str, dict[str, PartConfig]] = {}
    opened: dict[str, PartConfig] = {}
    for group in progressive_parts(config):
        opened = opened | {part: scheduled_part(config, part) for part in group}
        plans[("+ " if plans else "") + " + ".join(group)] = opened
    return plans


def scheduled_part(config: Config, part: str) -> PartConfig:
    settings = config.parts.settings(part)
    assert settings is not None
    if part in TOWERS and settings.learning_rate is None:
        return changed(settings, {"learning_rate": config.train.learning_rate / TOWER_DIVISOR})
    return settings


def scheduled_train(config: Config, name: str, num_steps: int) -> TrainConfig:
    """With the config's warm-up in each stage, or a small share of the stage where it has none."""
    warmup_steps = config.train.warmup_steps or min(math.ceil(WARMUP_FRACTION * num_steps), num_steps - 1)
    refuse_warmup(config, "train", f'stage "{name}"', warmup_steps, num_steps)
    return changed(config.train, {"steps": num_steps, "warmup_steps": warmup_steps})


def unfreeze_plans(config: Config, num_layers: int) -> dict[str, dict[str, PartConfig]]:
    """Stage name -> the parts that train in it; the last opens the part as `parts` says, all of it."""
    assert config.unfreeze is not None
    part, size = config.unfreeze.part, config.unfreeze.layers_per_stage
    if size >= num_layers:
        raise ConfigError(
            f"{config.where('unfreeze')}: unfreeze.layers_per_stage: {size} opens all {num_layers} layers of "
            f"{part} in one stage. Write fewer, or remove unfreeze."
        )
    others = {
        name: settings
        for name in PART_NAMES
        if is_open(config, name) and (settings := config.parts.settings(name))
    }
    plans = {}
    for count in range(size, num_layers, size):
        text = f"-{count}:" if config.unfreeze.start == "top" else f":{count}"
        plans[f"{part} {text}"] = {**others, part: changed(others[part], {"layers": text})}
    return plans | {f"all of {part}": others}


def explicit_stage(
    config: Config, stage: StageConfig, index: int, steps_per_epoch: Callable[[DataConfig], int]
) -> Stage:
    key, name = f"stages.{index}", stage.title
    data = changed(config.data, given(stage.data, ("train", "max_seq_len")))
    stable = stage.stable
    if stage.steps is not None:
        num_steps = stage.steps
    elif stage.epochs is not None:
        num_steps = math.ceil(stage.epochs * steps_per_epoch(data))
    else:
        num_steps = (stable and stable.max_steps) or steps_per_epoch(data)
    refuse_warmup(config, key, f'{key} "{name}"', warmup_of(config, stage), num_steps)
    if stable is not None:
        refuse_until(config, key, f'{key} "{name}"', stable, num_steps)
    keys = ("learning_rate", "learning_rate_schedule", "warmup_steps", "min_learning_rate_fraction")
    changes = given(stage, keys) | {"steps": num_steps}
    if stable is not None and stage.learning_rate_schedule is None:
        # Nobody knows where the end is that another schedule would fall towards.
        changes |= {"learning_rate_schedule": "constant", "min_learning_rate_fraction": 0.0}
    parts = {part: stage_part(config, stage, part) for part in stage.opened}
    return Stage(name, with_parts(config, parts, changed(config.train, changes), data), stable)


def stage_part(config: Config, stage: StageConfig, part: str) -> PartConfig:
    """The part's settings in the stage: what the stage says of it, of all its parts, or what `parts` says."""
    own, general = stage.settings(part), config.parts.settings(part)
    assert own is not None and general is not None
    rate = {} if stage.learning_rate is None else {"learning_rate": stage.learning_rate}
    return changed(general, rate | given(own, ("learning_rate", "weight_decay", "layers", "layer_decay")))


def refuse_warmup(config: Config, key: str, told: str, warmup_steps: int, num_steps: int) -> None:
    """Raises: ConfigError where the warm-up would take the whole stage."""
    for fault in warmup_faults(key, told, warmup_steps, num_steps):
        raise ConfigError(f"{config.where(fault.key)}: {fault.text}")


def refuse_until(config: Config, key: str, told: str, stable: StableConfig, num_steps: int) -> None:
    """Raises: ConfigError where the stage is over before it could be stable."""
    where, log_every = config.where(f"{key}.until"), config.train.log_every
    if stable.min_steps > num_steps:
        raise ConfigError(
            f"{where}: {told}: until.min_steps: {stable.min_steps} is more than the {num_steps} steps of an "
            "epoch, the most that it has. Lower it, or give max_steps."
        )
    if stable.window * log_every > num_steps:
        raise ConfigError(
            f"{where}: {told}: until.window: {stable.window} logged steps, one in {log_every}, are more than "
            f"the {num_steps} steps that it has at most, so it could never be stable. Lower the window or "
            "train.log_every, or raise max_steps."
        )


def with_parts(
    config: Config, opened: Mapping[str, PartConfig], train: TrainConfig, data: DataConfig | None = None
) -> Config:
    """The config of one stage: all other parts are frozen."""
    named = {part: settings for part in PART_NAMES if (settings := config.parts.settings(part))}
    parts = PartsConfig(**{part: opened.get(part) or frozen(general) for part, general in named.items()})
    none = dict.fromkeys(("stages", "schedule", "unfreeze"))
    return changed(config, {"parts": parts, "train": train, "data": data or config.data, **none})


def whole_config(config: Config, stages: Sequence[Stage]) -> Config:
    """The config whose plan has everything that trains in some stage, and whose rows are those of all."""
    parts = {}
    for part in PART_NAMES:
        general = config.parts.settings(part)
        if general is not None:
            given_in = [
                s for stage in stages if part in stage.opened and (s := stage.config.parts.settings(part))
            ]
            ranges = [settings.layers for settings in given_in]
            layers = None if None in ranges or not ranges else ",".join(unique(ranges))
            parts[part] = changed(general, {"layers": layers})
    files = unique(file for stage in stages for file in stage.config.data.train_files)
    none = dict.fromkeys(("stages", "schedule", "unfreeze"))
    data = changed(config.data, {"train": files})
    return changed(config, {"parts": PartsConfig(**parts), "data": data, **none})


def frozen(settings: PartConfig) -> PartConfig:
    """The part at rest, its weights held as they are while it trains."""
    kept = given(settings, ("quantization", "double_quantization"))
    return PartConfig(mode="frozen", **kept)


def given(section: Any, keys: Iterable[str]) -> dict[str, Any]:
    """The values of the keys that are written in the section."""
    return {
        key: value
        for key in keys
        if key in section.model_fields_set and (value := getattr(section, key)) is not None
    }


def changed(section: S, changes: Mapping[str, Any]) -> S:
    return section.model_copy(update=dict(changes))


def unique(items: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(items))
