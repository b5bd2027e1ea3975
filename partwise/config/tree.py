"""The config tree and its loader: one YAML file, overrides, strict types, every fault at once.

In: a path and overrides. Out: a frozen `Config` that knows the file:line of each of its keys. The keys are
in sections.py, the rules between them in rules.py; flags.py turns the freeze flags into `parts`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PrivateAttr, ValidationError

from partwise.config.document import (
    Document,
    Fault,
    find_origin,
    join_faults,
    join_origins,
    read_document,
    write_yaml,
)
from partwise.config.faults import ANY_ITEM, explain_errors, key_names, split_unknown
from partwise.config.flags import (
    FLAGS,
    USUAL_FLAGS,
    USUAL_PARTS,
    check_flags,
    compare_flags,
    deciding_flag,
    expand_flags,
)
from partwise.config.objective import ObjectiveConfig, check_objective
from partwise.config.rules import (
    check_adapter,
    check_engine,
    check_evaluation,
    check_features,
    check_judging,
    check_parts,
    check_train,
)
from partwise.config.sections import (
    TAGS,
    DataConfig,
    EvaluateConfig,
    ModelConfig,
    PartConfig,
    PartsConfig,
    Section,
    Track,
    TrackConfig,
    TrainConfig,
)
from partwise.config.stages import (
    StableConfig,
    StageConfig,
    StageDataConfig,
    StagePartConfig,
    UnfreezeConfig,
    check_stages,
)
from partwise.errors import ConfigError, PlanError
from partwise.records import PART_NAMES


class Config(Section):
    model: ModelConfig = Field(description="The model that is trained.")
    parts: PartsConfig = Field(description="What happens to each part of the model.")
    data: DataConfig = Field(description="The rows, and how long an example may be.")
    train: TrainConfig = Field(default_factory=TrainConfig, description="Steps, rates and what is saved.")
    evaluate: EvaluateConfig | None = Field(None, description="How the model is judged by what it answers.")
    objective: ObjectiveConfig = Field(
        default_factory=ObjectiveConfig, description="What is learned from a row."
    )
    engine: Literal["auto", "single", "ddp", "fsdp", "zero2", "zero3"] = Field(
        "auto",
        description="How several processes share the work: ddp copies the model, zero2 shards masters, "
        "moments and gradients, fsdp and zero3 also the weights; auto is ddp, or single for one process.",
    )
    schedule: Literal["progressive"] | None = Field(
        None,
        description="progressive: the language model first, then the projector with it, then the towers, as "
        "far as parts opens them; each stage has its share of the run's steps.",
    )
    stages: list[StageConfig] | None = Field(None, description="The stages of the run, one after another.")
    unfreeze: UnfreezeConfig | None = Field(
        None, description="Stages that open a part's layers one group after another."
    )
    track: Track | None = Field(
        None, description="Where else the numbers of metrics.jsonl go; a list of trackers, or a section."
    )
    output: str = Field(min_length=1, description="The run folder. Relative to the working directory.")

    _origins: dict[str, str] = PrivateAttr(default_factory=dict)
    _expanded_flags: str | None = PrivateAttr(None)

    def __eq__(self, other: object) -> bool:
        """Equal settings; where they were written does not count."""
        return isinstance(other, Config) and self.model_dump() == other.model_dump()

    @property
    def best_by(self) -> str:
        """What keep_best and patience go by: "loss", or a metric of `evaluate`."""
        return self.evaluate.best_by if self.evaluate else "loss"

    @property
    def tracking(self) -> TrackConfig | None:
        """The trackers in full; None without any."""
        return TrackConfig(to=self.track) if isinstance(self.track, list) else self.track

    @property
    def expanded_flags(self) -> str | None:
        """The `parts` that the config's freeze flags stand for, as text to print; None without flags."""
        return self._expanded_flags

    def where(self, key: str) -> str:
        """ "file:line" of a key such as "parts.projector.mode", or of its nearest parent that is written."""
        return find_origin(self._origins, key)


SECTIONS: dict[str, type[Section]] = {
    "": Config,
    "model": ModelConfig,
    "data": DataConfig,
    "train": TrainConfig,
    "track": TrackConfig,
    "evaluate": EvaluateConfig,
    "objective": ObjectiveConfig,
    "parts": PartsConfig,
    **{f"parts.{part}": PartConfig for part in reversed(PART_NAMES)},
    "unfreeze": UnfreezeConfig,
    f"stages.{ANY_ITEM}": StageConfig,
    **{f"stages.{ANY_ITEM}.parts.{part}": StagePartConfig for part in PART_NAMES},
    f"stages.{ANY_ITEM}.until": StableConfig,
    f"stages.{ANY_ITEM}.data": StageDataConfig,
}


_KEYS = {name: [*key_names(section), *(() if name else FLAGS)] for name, section in SECTIONS.items()}


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """
    Raises:
        ConfigError: the file is no config; the text has one line for each fault in it.
        PlanError: no part would train.
    """
    document = read_document(path, overrides)
    values, unknown = split_unknown(document.values, _KEYS)
    faults = [*document.faults, *unknown]
    flags = {name: values.pop(name) for name in FLAGS if name in values}
    expansion = None
    if flags:
        expansion = _expand(flags, values, document, faults)
    elif "parts" not in values:
        faults.append(
            Fault("", f"parts: missing, so nothing says what trains. The usual recipe is {USUAL_PARTS}.")
        )
    config = _validate(values, faults, skip_parts="parts" not in values)
    if faults or config is None:
        raise ConfigError(join_faults(document.origins, faults))
    config._origins = document.origins
    config._expanded_flags = expansion
    _require_training(config, USUAL_FLAGS if expansion else USUAL_PARTS)
    return config


def dump_config(config: Config) -> str:
    """YAML that `load_config` reads back to an equal Config, defaults written out."""
    values = config.model_dump(mode="json", exclude_none=True, by_alias=True)
    # A default that is written out would be a setting, and not every mode or loss has every setting.
    for name in ("parts", "objective"):
        values[name] = getattr(config, name).model_dump(mode="json", exclude_unset=True, exclude_none=True)
    if config.stages is not None:
        stages = [stage.model_dump(mode="json", exclude_unset=True) for stage in config.stages]
        values["stages"] = stages
    return write_yaml(values)


def config_schema() -> dict[str, Any]:
    """JSON schema of a config file, the freeze flags included."""
    schema = Config.model_json_schema()
    schema["properties"] |= FLAGS
    schema["required"].remove("parts")
    schema["anyOf"] = [{"required": [name]} for name in ("parts", *FLAGS)]
    return schema


def _expand(
    flags: dict[str, Any], values: dict[str, Any], document: Document, faults: list[Fault]
) -> str | None:
    """The flags' expansion as text, also put into `values`; None where they are wrong or `parts` says it."""

    def where(key: str) -> str:
        return find_origin(document.origins, key)

    if wrong := check_flags(flags, where):
        faults += wrong
        return None
    if "parts" in values:
        parts = values["parts"]
        faults += compare_flags(flags, parts if isinstance(parts, Mapping) else {}, where)
        return None
    values["parts"] = expand_flags(flags)
    document.origins["parts"] = where(next(iter(flags)))
    for part in values["parts"]:
        document.origins[f"parts.{part}"] = where(deciding_flag(flags, part))
    places = join_origins([where(flag) for flag in flags])
    return f"The freeze flags ({places}) stand for\n" + write_yaml({"parts": values["parts"]}).rstrip()


def _validate(values: dict[str, Any], faults: list[Fault], skip_parts: bool) -> Config | None:
    """The config, or None; adds a fault for each wrong value, and for each broken rule between right ones."""
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        found = list(explain_errors(error, SECTIONS, TAGS))
        found = [fault for fault in found if not (skip_parts and fault.key == "parts")]
        faults += found
        faults += _check_sound_sections(values, {fault.key for fault in found})
        return None
    faults += [
        *check_train(config.train),
        *check_parts(config.parts),
        *check_adapter(config.model, config.parts),
        *check_engine(config.engine, config.parts, config.train),
        *check_evaluation(config.train, config.data),
        *check_judging(config.evaluate, config.data, config.objective, config.engine),
        *check_features(config.data, config.parts),
        *check_stages(config),
        *check_objective(config.objective),
    ]
    return config


def _check_sound_sections(values: Mapping[str, Any], faulty: set[str]) -> Iterator[Fault]:
    def is_sound(section: str) -> bool:
        return not any(key == section or key.startswith(f"{section}.") for key in faulty)

    if is_sound("train"):
        yield from check_train(TrainConfig.model_validate(values.get("train", {})))
    parts = values.get("parts")
    if isinstance(parts, Mapping):
        sound = {part: value for part, value in parts.items() if is_sound(f"parts.{part}")}
        yield from check_parts(PartsConfig.model_validate(sound))


def _require_training(config: Config, recipe: str) -> None:
    """
    Raises:
        PlanError: no part would train.
    """
    named = {part: settings for part in PART_NAMES if (settings := config.parts.settings(part)) is not None}
    if any(settings.mode != "frozen" for settings in named.values()):
        return
    parts = [part for part in PART_NAMES if part in named or part != "audio_tower"]
    places = join_origins([config.where(f"parts.{part}") for part in named] or [config.where("parts")])
    raise PlanError(
        f"nothing would train: {', '.join(parts[:-1])} and {parts[-1]} are all frozen ({places}). "
        f"The usual recipe keeps the vision tower frozen and opens the other two: {recipe}."
    )
