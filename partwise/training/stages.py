"""A run in stages: a Job for each stage, which is an ordinary one but for what the stages share.

In: a config with stages. Out: a RunJob, whose plan has all that trains in some stage: so the model is built
and saved, whichever stage runs. A StageJob trains its own part of that, and opens the model with the weights
of the checkpoint that the stage before, or a run that was stopped, left: one door for both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from partwise.config import Config, DataConfig
from partwise.config.expand import Stage, has_stages, stage_configs, whole_config
from partwise.data.features import FeatureStore
from partwise.data.loader import StepLoader
from partwise.data.sources import Rows, open_rows
from partwise.engine.ranks import Ranks
from partwise.errors import PlanError
from partwise.model.find import find_parts
from partwise.model.load import LoadedModel, load_model, loaded_model
from partwise.model.plan import resolve_plan
from partwise.records import PartsPlan
from partwise.training.job import Job
from partwise.training.span import Finished, StageSpan

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def open_job(config: Config, ranks: Ranks | None = None, only_looks: bool = False) -> Job:
    """The job of a config, with stages or without."""
    return (RunJob if has_stages(config) else Job)(config, ranks, only_looks)


class RunJob(Job):
    """What the stages have in common. Nothing trains by its own config."""

    @cached_property
    def configs(self) -> list[Stage]:
        """Raises: ConfigError where a stage does not fit the model or the rows."""
        return stage_configs(self.config, self._num_layers, self._steps_per_epoch)

    def _num_layers(self, part: str) -> int:
        found = find_parts(self.empty_model)
        if part not in found:
            raise PlanError(f"{self.config.where('unfreeze')}: unfreeze.part: the model has no {part}.")
        return len(found[part].layers)

    def _steps_per_epoch(self, data: DataConfig) -> int:
        return math.ceil(self.rows_of(data).num_rows / self.config.train.global_batch_size)

    def rows_of(self, data: DataConfig) -> Rows:
        if data.train == self.config.data.train:
            return self.rows
        return open_rows(data.train_files, self.config.objective.shape)

    @cached_property
    def stages(self) -> Sequence[Job]:
        return [StageJob(self, index) for index in range(len(self.configs))]

    def stage_after(self, finished: Sequence[Finished], checkpoint: Path | None) -> Job:
        return StageJob(self, len(finished), finished, checkpoint)

    @cached_property
    def plan(self) -> PartsPlan:
        """Raises: PlanError that names the stage which does not fit the model."""
        for stage in self.configs:
            try:
                resolve_plan(self.empty_model, stage.config)
            except PlanError as error:
                raise PlanError(f'stage "{stage.name}": {error}') from error
        return resolve_plan(self.empty_model, whole_config(self.config, self.configs))

    @property
    def train_files(self) -> list[str]:
        return whole_config(self.config, self.configs).data.train_files

    @property
    def num_steps(self) -> int:
        return sum(stage.num_steps for stage in self.stages)


class StageJob(Job):
    """One stage of a run, after those that have finished, or to be looked at where these are not known.

    `checkpoint` has the weights that it begins with or goes on with; None is the run's base.
    """

    def __init__(
        self, run: RunJob, index: int, finished: Sequence[Finished] = (), checkpoint: Path | None = None
    ) -> None:
        # A checkpoint after the last step of all has that stage among the finished ones.
        index = min(index, len(run.configs) - 1)
        self.stage = run.configs[index]
        super().__init__(self.stage.config, run.ranks, run.only_looks)
        self.run = run
        self.index = index
        self.finished = tuple(finished)[:index]
        self.ended = tuple(finished)[index:]
        self.checkpoint = checkpoint

    @property
    def name(self) -> str:
        return self.stage.name

    @property
    def span(self) -> StageSpan:
        lengths = [stage.num_steps for stage in self.run.stages[self.index :]]
        lengths[:1] = [stage.steps for stage in self.ended] or lengths[:1]
        return StageSpan(
            num_steps=lengths[0],
            name=self.name,
            finished=self.finished,
            run_steps=sum(stage.steps for stage in self.finished) + sum(lengths),
            is_last=len(lengths) == 1,
            until=self.stage.until,
        )

    @cached_property
    def device(self) -> torch.device:
        return self.run.device

    @cached_property
    def empty_model(self) -> PreTrainedModel:
        return self.run.empty_model

    @cached_property
    def processor(self) -> Any:
        return self.run.processor

    @cached_property
    def store(self) -> FeatureStore | None:
        return self.run.store

    @cached_property
    def plan(self) -> PartsPlan:
        return resolve_plan(self.empty_model, self.config, self.whole_plan)

    @property
    def whole_plan(self) -> PartsPlan:
        return self.run.plan

    @cached_property
    def manifest(self) -> dict[str, Any]:
        return self.run.manifest

    @cached_property
    def rows(self) -> Rows:
        return self.run.rows_of(self.config.data)

    @cached_property
    def loader(self) -> StepLoader:
        """It goes on where the stages before left the same rows."""
        before = zip(self.finished, self.run.configs, strict=False)
        train = self.config.data.train
        seen = sum(stage.steps for stage, known in before if known.config.data.train == train)
        return self.make_loader(self.rows, shuffle=True, start=self.span.first_step - seen)

    @property
    def adapter(self) -> Path | None:
        return self.checkpoint if self.checkpoint and self.whole_plan.has_adapters else self.run.adapter

    @property
    def base_adapter(self) -> Path | None:
        return self.run.adapter

    @property
    def is_as_begun(self) -> bool:
        return self.checkpoint is None

    @property
    def has_own_rows(self) -> bool:
        return self.config.data != self.run.config.data

    def _load(self) -> LoadedModel:
        if self.checkpoint is None or self.whole_plan.has_adapters:
            return super()._load()
        settings = self.config.model
        trained = load_model(settings.model_copy(update={"path": str(self.checkpoint)}))
        # What does not train is saved as the base has it: the checkpoint will be gone by then.
        return loaded_model(trained.model, trained.processor, self.model_folder, settings)
