"""What a config stands for, opened piece by piece: processor, plan, rows, model. Nothing is trained here.

Each piece is opened when it is first asked for, cheap ones without the dear ones: the plan is resolved on
the meta device, before any weight is read.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from partwise.config import Config
from partwise.data.chat import ChatFormat
from partwise.data.features import FeatureStore
from partwise.data.loader import StepLoader
from partwise.data.packing import PackFormat
from partwise.data.sources import OtherAnswers, Rows, open_rows
from partwise.data.template import end_of_turn
from partwise.data.texts import TextFormat
from partwise.engine.device import limit_memory, pick_device, seed_everything
from partwise.engine.ranks import Ranks
from partwise.errors import ConfigError, PlanError
from partwise.families import CACHED_TYPES, IMAGE_RUN_FIELDS
from partwise.lineage.fingerprint import fingerprint_files, weights_fingerprint
from partwise.lineage.manifest import make_manifest
from partwise.lineage.origin import adapter_record, match_base, model_record
from partwise.model.adapter import load_adapter
from partwise.model.attention import packing_obstacle, use_packed_attention
from partwise.model.compile import can_compile
from partwise.model.folder import find_model_folder, model_name, weight_files
from partwise.model.load import (
    LoadedModel,
    empty_model,
    load_model,
    load_processor,
    load_skeleton,
    media_token_ids,
)
from partwise.model.memory import enable_gradient_checkpointing
from partwise.model.parts import apply_plan
from partwise.model.plan import resolve_plan
from partwise.model.positions import grid_positions
from partwise.model.quantize import quantize_parts
from partwise.model.stops import stop_at
from partwise.model.tower import Cut, find_cut, replace_tower
from partwise.records import PartsPlan
from partwise.training.span import Finished, StageSpan

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from transformers import PreTrainedModel

# What a config says of where it was written, not of what its model computes.
PROVENANCE = frozenset({"architectures", "dtype", "transformers_version", "_name_or_path"})


# Steps that a run must have for what compiling takes, about a minute, to come back.
COMPILE_PAYS_FROM = 100


class Job:
    """One config's pieces. Errors of the user surface where the piece is first asked for.

    `only_looks`: nobody fills the feature cache before the model is opened.
    """

    def __init__(self, config: Config, ranks: Ranks | None = None, only_looks: bool = False) -> None:
        self.config = config
        self.ranks = ranks or Ranks()
        self.only_looks = only_looks
        self.index = 0  # among the stages

    @cached_property
    def device(self) -> torch.device:
        limit_memory(self.config.train.memory_limit)
        return pick_device()

    @cached_property
    def empty_model(self) -> PreTrainedModel:
        return empty_model(self.config.model.path, self.config.model.trust_remote_code)

    @cached_property
    def plan(self) -> PartsPlan:
        return resolve_plan(self.empty_model, self.config)

    @property
    def whole_plan(self) -> PartsPlan:
        """How the model is built and what of it is saved: where there are stages, the plan of all."""
        return self.plan

    @cached_property
    def base_record(self) -> dict[str, Any]:
        """What the run starts from. Its weights are read once, to know them by their content."""
        return model_record(self.model_folder, model_name(self.config.model.path), self.empty_model)

    @cached_property
    def model_folder(self) -> Path:
        """With its weights."""
        return find_model_folder(self.config.model.path, with_weights=True)

    @property
    def adapter(self) -> Path | None:
        """The adapter folder that the run goes on with."""
        adapter = self.config.model.adapter
        return None if adapter is None else Path(adapter).expanduser()

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """What the run's checkpoints are and come from. Raises: CheckpointError for a foreign adapter."""
        told = (self.plan, self.base_record, self.train_files, self.config.model.dtype)
        if self.adapter is None:
            return make_manifest(*told)
        accepted = match_base(self.adapter, self.base_record, self.config.model.accept_base)
        record = adapter_record(self.adapter, self.empty_model, self.base_record)
        manifest = make_manifest(*told, record)
        return manifest | ({"accepted_base": accepted} if accepted else {})

    @cached_property
    def processor(self) -> Any:
        model = self.config.model
        return load_processor(model.path, model.trust_remote_code, model.chat_template)

    @property
    def pad_token_id(self) -> int:
        """Padding is masked by document_ids, never by this id: any valid id serves."""
        tokenizer = getattr(self.processor, "tokenizer", self.processor)
        return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0

    @cached_property
    def chat_format(self) -> ChatFormat:
        """Of the examples that the run's model takes."""
        return self._format(self.features)

    @cached_property
    def pixel_format(self) -> ChatFormat:
        """Of the examples that the model takes with its vision tower."""
        return self._format(None)

    def _format(self, features: FeatureStore | None) -> ChatFormat:
        data = self.config.data
        ids = media_token_ids(self.empty_model.config, self.processor)
        make = TextFormat if self.config.objective.loss == "text" else ChatFormat
        return make(self.processor, ids, data.max_seq_len, data.overlong, features)

    @cached_property
    def cut(self) -> Cut | None:
        """Where the vision tower is cut off; None without a feature cache.

        Raises:
            ConfigError: the tower of this model type is not apart from its projector.
        """
        if self.config.data.feature_cache is None:
            return None
        cut = find_cut(self.empty_model)
        if cut is None:
            where, kind = self.config.where("data.feature_cache"), self.empty_model.config.model_type
            raise ConfigError(
                f"{where}: data.feature_cache: features of {kind} cannot be kept: its vision tower is not "
                f"known to end before its projector, as those of {', '.join(CACHED_TYPES)} do. Remove this."
            )
        return cut

    @cached_property
    def store(self) -> FeatureStore | None:
        """The run's feature cache, which may lack images; None without one. Raises: ConfigError."""
        root, cut, model = self.config.data.feature_cache, self.cut, self.empty_model
        if root is None or cut is None:
            return None
        weights = weights_fingerprint(weight_files(self.model_folder), model, {"vision_tower"})
        vision_config = model.get_submodule(cut.path).config.to_dict()
        made_by = {
            **weights.parts,
            "vision_config": {k: v for k, v in vision_config.items() if k not in PROVENANCE},
            "cut": asdict(cut),
            "processor": type(self.processor).__name__,
            "image_processor": self.processor.image_processor.to_dict(),
            "dtype": self.config.model.dtype,
            "transformers": version("transformers"),
        }
        return FeatureStore(Path(root).expanduser(), made_by)

    @cached_property
    def features(self) -> FeatureStore | None:
        """The cache that stands for the vision tower; None where the tower runs."""
        if self.store is None or (self.only_looks and not self.store.has_all(self.data_fingerprint)):
            return None
        return self.store

    @cached_property
    def data_fingerprint(self) -> str:
        """Of all data files."""
        data = self.config.data
        return fingerprint_files(Path(file) for file in (*data.train_files, *data.eval_files))

    @property
    def train_files(self) -> list[str]:
        """All that the run trains on."""
        return self.config.data.train_files

    @cached_property
    def rows(self) -> Rows:
        return open_rows(self.config.data.train_files, self.config.objective.shape)

    @cached_property
    def eval_rows(self) -> Rows | None:
        files = self.config.data.eval_files
        return open_rows(files, self.config.objective.shape) if files else None

    @cached_property
    def loader(self) -> StepLoader:
        return self.make_loader(self.rows, shuffle=True)

    @cached_property
    def eval_loader(self) -> StepLoader | None:
        return None if self.eval_rows is None else self.make_loader(self.eval_rows, shuffle=False)

    @cached_property
    def packs(self) -> PackFormat | None:
        """How micro-batches are packed; None where their rows are padded.

        Raises:
            ConfigError: data.packing is true and the model's rows cannot be packed.
        """
        data, model = self.config.data, self.empty_model
        if reason := self.padding_reason:
            if data.packing:
                where = self.config.where("data.packing")
                raise ConfigError(f"{where}: data.packing: true: {reason}. Remove it, or set it to false.")
            return None
        has_axes = hasattr(model.base_model, "get_rope_index")
        return PackFormat(
            max_tokens=self.answers_per_batch * data.max_seq_len,
            image_field=IMAGE_RUN_FIELDS.get(model.config.model_type),
            positions=partial(grid_positions, model) if has_axes else None,
        )

    @property
    def padding_reason(self) -> str:
        """Why rows are padded; "" where they are packed."""
        if self.config.data.packing is False:
            return "data.packing is false"
        if obstacle := packing_obstacle(self.empty_model.config, self.config.model.attention):
            return obstacle
        tower = self.config.parts.settings("vision_tower")
        if self.config.data.packing is None and tower is not None and tower.mode != "frozen":
            # A pack of short rows holds several times the images that as many padded rows could have.
            return "the vision tower trains, which keeps much for each image; data.packing: true packs anyhow"
        return ""

    @property
    def compiles(self) -> bool:
        """Whether layers are compiled, where the engine can.

        Raises:
            ConfigError: train.compile is true and torch cannot compile here.
        """
        wanted = self.config.train.compile
        if wanted and not can_compile():
            where = self.config.where("train.compile")
            raise ConfigError(
                f"{where}: train.compile: true needs a CUDA GPU and the package triton. Remove it, or set it "
                "to false."
            )
        pays = self.packs is not None and self.num_steps >= COMPILE_PAYS_FROM
        return can_compile() and (pays if wanted is None else wanted)

    def make_loader(self, rows: Rows, shuffle: bool, start: int = 0) -> StepLoader:
        """A loader of the run's batches over these rows."""
        train = self.config.train
        return StepLoader(
            rows,
            self.chat_format,
            self.pad_token_id,
            global_batch_size=train.global_batch_size,
            micro_batch_size=train.micro_batch_size,
            seed=train.seed,
            num_workers=self.config.data.num_workers,
            shuffle=shuffle,
            rank=self.ranks.rank,
            num_ranks=self.ranks.size,
            packs=self.packs,
            start=start,
            per_row=rows.per_row,
            others=OtherAnswers(rows) if self.config.objective.loss == "kto" else None,
        )

    @property
    def base_adapter(self) -> Path | None:
        """The adapter that the run began with."""
        return self.adapter

    @property
    def is_as_begun(self) -> bool:
        """Whether the model is opened as it was before the run's first step."""
        return True

    @property
    def has_own_rows(self) -> bool:
        """Whether this is a stage with other rows, or other limits of them, than the run's."""
        return False

    @property
    def stages(self) -> Sequence[Job]:
        """The jobs that the run is made of, one after another: this one, where there are no stages."""
        return [self]

    @property
    def name(self) -> str:
        """Of the stage; "" where there are none."""
        return ""

    @property
    def span(self) -> StageSpan:
        """Which steps of the run these are."""
        return StageSpan(self.num_steps)

    def stage_after(self, finished: Sequence[Finished], checkpoint: Path | None) -> Job:
        """The stage that is next, with the weights of the checkpoint; the checkpoint may be in the midst of
        it."""
        return self

    @property
    def answers_per_step(self) -> int:
        """Conversations of an optimizer step: of pairs there are two for each row."""
        return self.config.train.global_batch_size * self.config.objective.per_row

    @property
    def answers_per_batch(self) -> int:
        """Conversations of a padded micro-batch; of packs, how often they hold max_seq_len tokens."""
        return self.config.train.micro_batch_size * self.config.objective.per_row

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the run. Raises: ConfigError when the warm-up would take all of them."""
        train = self.config.train
        if train.steps is not None:
            return train.steps
        num_steps = math.ceil(train.epochs * self.loader.steps_per_epoch)
        if train.warmup_steps >= num_steps:
            where = self.config.where("train.warmup_steps")
            raise ConfigError(
                f"{where}: train.warmup_steps: {train.warmup_steps} leaves nothing of the {num_steps} steps "
                f"that {self.loader.num_rows} rows make in train.epochs {train.epochs:g}. Warm up for "
                "fewer steps."
            )
        return num_steps

    def open_model(self, device: torch.device | None = None) -> LoadedModel:
        """The model with the plan applied, on its device or another. Adapters start from the run's seed."""
        loaded, device = self._load(), device or self.device
        self._cut_off(loaded.model)
        stop_at(loaded.model, end_of_turn(loaded.processor))
        # Before the rest moves, so that the device never holds the quantised layers at full width.
        quantize_parts(loaded.model, self.plan, device)
        loaded.model.to(device)
        seed_everything(self.config.train.seed)
        self._set_up(loaded.model)
        if self.adapter is not None:
            load_adapter(loaded.model, self.whole_plan, self.adapter)
        return loaded

    def _load(self) -> LoadedModel:
        return load_model(self.config.model)

    def open_skeleton(self) -> LoadedModel:
        """The same on the meta device, without weights, for a rank that is given its share of them."""
        loaded = load_skeleton(self.config.model)
        self._cut_off(loaded.model)
        self._set_up(loaded.model)
        return loaded

    def _cut_off(self, model: PreTrainedModel) -> None:
        """Let go of a tower whose features are kept: no device ever holds it."""
        if self.features is not None and self.cut is not None:
            replace_tower(model, self.cut)

    def _set_up(self, model: PreTrainedModel) -> None:
        """What the config says of a model that was just opened: attention, plan, recomputed layers.

        All of them, also where it will be some in training: checks then need no more memory than that.
        """
        if self.packs is not None:
            use_packed_attention(model)
        apply_plan(model, self.plan, self.whole_plan)
        checkpointing = self.config.train.gradient_checkpointing
        if checkpointing or (checkpointing is None and self.device.type == "cuda"):
            try:
                enable_gradient_checkpointing(model, self.plan)
            except PlanError:
                if checkpointing:
                    raise  # nobody asked for it else: a model that cannot recompute keeps all
