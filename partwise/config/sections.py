"""The sections of a config and their keys: types, bounds, defaults, units.

In: values as YAML gives them. Out: frozen sections; a wrong value is a pydantic error. Validators check; they
never fill in or rewrite. What several keys must satisfy together is in rules.py, loading in config.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator

from partwise.records import Mode

Steps = Annotated[int, Field(json_schema_extra={"unit": "steps"})]
Tokens = Annotated[int, Field(json_schema_extra={"unit": "tokens"})]
Rows = Annotated[int, Field(json_schema_extra={"unit": "rows"})]
Beta = Annotated[float, Field(ge=0, lt=1)]
Files = Annotated[
    Annotated[str, Field(min_length=1), Tag("one file")]
    | Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1), Tag("files")],
    Discriminator(lambda value: "files" if isinstance(value, list) else "one file"),
]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ModelConfig(Section):
    path: str = Field(
        min_length=1, description="Hugging Face model folder, or a hub name where a hub is reachable."
    )
    adapter: str | None = Field(
        None, min_length=1, description="Adapter folder that training goes on with; path is its base."
    )
    accept_base: bool = Field(
        False, description="Go on although the base is not the one that the adapter was trained on."
    )
    dtype: Literal["bfloat16", "float32"] = Field(
        "bfloat16", description="Type of the weights in memory. Trained bfloat16 weights keep fp32 masters."
    )
    attention: Literal["sdpa", "eager"] = Field(
        "sdpa", description="Attention implementation; both keep the model's own masks exactly."
    )
    chat_template: str | None = Field(
        None, description="File with a Jinja chat template, for base models that have none."
    )
    trust_remote_code: bool = Field(False, description="Run model code that ships in the model folder.")


class PartConfig(Section):
    mode: Mode = Field(
        description="What happens to the part: nothing, adapters on it train, or its weights train."
    )
    learning_rate: float | None = Field(None, gt=0, description="Instead of train.learning_rate.")
    weight_decay: float | None = Field(None, ge=0, description="Instead of train.weight_decay.")
    layers: str | None = Field(
        None, description='Range of layers that train, as a Python slice: "-12:" is the last twelve.'
    )
    layer_decay: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Each layer trains at this fraction of the rate of the layer above it; what lies below "
        "all layers at that of the lowest, times this once more.",
    )
    lora_rank: int = Field(16, ge=1, description="Rank of the adapters.")
    lora_alpha: float | None = Field(None, gt=0, description="Scale is alpha / rank; default is 2 * rank.")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the adapters' input.")
    lora_targets: Literal["attention", "mlp", "all"] = Field(
        "all", description="Linear layers of the part that get an adapter."
    )
    use_rslora: bool = Field(False, description="Scale by alpha / sqrt(rank) (rsLoRA).")
    use_dora: bool = Field(False, description="Train a magnitude per output beside the adapter (DoRA).")
    quantization: Literal["nf4"] | None = Field(
        None,
        description="Hold the linear layers of the part's blocks in 4 bits; for the modes lora (QLoRA) and "
        "frozen. Needs bitsandbytes.",
    )
    double_quantization: bool = Field(
        True, description="Hold the scales of nf4 in 8 bits, too: 0.37 bits less for each weight."
    )

    @field_validator("layers", mode="before")
    @classmethod
    def _check_layers(cls, value: Any) -> Any:
        return layer_range(value)


def layer_range(value: Any) -> Any:
    """The value, if it is a range of layers. Raises: ValueError."""
    if value is None or (isinstance(value, str) and re.fullmatch(r"-?\d+:(-?\d+)?|:-?\d+", value)):
        return value
    raise ValueError(
        'is not a range of layers. Write a slice in quotes: "-12:" (the last twelve), ":4", "2:8".'
    )


PartSettings = Annotated[
    Annotated[Mode, Tag("a mode")] | Annotated[PartConfig, Tag("settings")],
    Discriminator(lambda value: "settings" if isinstance(value, Mapping | PartConfig) else "a mode"),
]
# The names of union members: pydantic puts them into an error's location.
TAGS = (
    *("one file", "files", "a mode", "settings", "parts by name", "names", "a word", "[key]"),
    *("trackers", "track settings"),
)


class PartsConfig(Section):
    """Modes per part: a mode alone, or its settings. A part that is not named stays frozen."""

    vision_tower: PartSettings | None = Field(None, description="The image encoder.")
    audio_tower: PartSettings | None = Field(None, description="The audio encoder.")
    projector: PartSettings | None = Field(
        None, description="What maps the towers' outputs into the language model."
    )
    language_model: PartSettings | None = Field(
        None, description="The decoder, with its embeddings and output head."
    )

    def settings(self, part: str) -> PartConfig | None:
        """The part's settings in full; None when the config does not name the part."""
        value: Mode | PartConfig | None = getattr(self, part)
        return PartConfig(mode=value) if isinstance(value, str) else value


class DataConfig(Section):
    train: Files = Field(
        description="One file or a list: .jsonl, .json or .parquet. Relative to the working directory."
    )
    eval: Files | None = Field(None, description="Held-out rows for the evaluation loss.")
    max_seq_len: Tokens = Field(4096, ge=8, description="Longest example, images included.")
    overlong: Literal["truncate", "drop", "error"] = Field(
        "truncate",
        description="What happens to longer rows. Rows that truncation would cut inside an image or leave "
        "without a target token are dropped and counted.",
    )
    packing: bool | None = Field(
        None,
        description="A micro-batch is rows one after the other, at most micro_batch_size * max_seq_len "
        "tokens, instead of padded rows. Default: wherever the model's attention mask is known exactly and "
        "no vision tower trains; true is an error where it is not known.",
    )
    feature_cache: str | None = Field(
        None,
        min_length=1,
        description="Folder that keeps what a frozen vision tower makes of each image, so that it runs once "
        "for each and no step holds it.",
    )
    num_workers: int = Field(
        2,
        ge=0,
        description="Processes that prepare rows ahead of the step; 0 does it in the training process.",
    )

    @property
    def train_files(self) -> list[str]:
        return [self.train] if isinstance(self.train, str) else list(self.train)

    @property
    def eval_files(self) -> list[str]:
        return [self.eval] if isinstance(self.eval, str) else list(self.eval or ())


class TrainConfig(Section):
    epochs: float = Field(
        1.0,
        gt=0,
        description="Passes over the training rows; ignored when steps is set.",
        json_schema_extra={"unit": "epochs"},
    )
    steps: Steps | None = Field(None, ge=1, description="Optimizer steps, instead of epochs.")
    global_batch_size: Rows = Field(32, ge=1, description="Rows per optimizer step.")
    micro_batch_size: Rows = Field(4, ge=1, description="Rows per forward and backward pass.")
    learning_rate: float = Field(2e-5, gt=0, description="Peak learning rate of parts without their own.")
    learning_rate_schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="How the rate falls after the warm-up."
    )
    warmup_steps: Steps = Field(0, ge=0, description="Linear warm-up from zero.")
    min_learning_rate_fraction: float = Field(
        0.0, ge=0, le=1, description="Where the schedule ends, as a fraction of the peak."
    )
    weight_decay: float = Field(0.0, ge=0, description="Never applied to norms, biases and embeddings.")
    adam_betas: Annotated[tuple[Beta, Beta], Field(strict=False)] = Field(
        (0.9, 0.999), description="Decay of AdamW's two running means."
    )
    adam_eps: float = Field(1e-8, gt=0, description="Added to AdamW's denominator.")
    optimizer_states: Literal["float32", "8bit"] = Field(
        "float32",
        description="Type of AdamW's two running means; 8bit takes a quarter of their memory.",
    )
    offload_optimizer: bool = Field(
        False,
        description="Keep weight shards, masters and moments in the host's memory, and update them there: "
        "less GPU memory, slower steps. For engine: fsdp.",
    )
    max_grad_norm: float = Field(1.0, gt=0, description="Clip by the global norm.")
    gradient_checkpointing: bool | None = Field(
        None,
        description="Recompute layers in the backward pass of the parts that need one: all of them, or none. "
        "Default: on a GPU as many as it takes to fit into its memory, on a CPU none.",
    )
    memory_limit: float | None = Field(
        None,
        gt=0,
        description="GPU memory that the run may take, instead of all that a GPU has.",
        json_schema_extra={"unit": "GiB"},
    )
    compile: bool | None = Field(
        None,
        description="Compile the layers: faster steps on a GPU, about a minute before the first. Default: on "
        "one GPU or with engine ddp, where rows are packed, in runs of at least 100 steps.",
    )
    seed: int = Field(0, ge=0, description="Seed of the row order, new weights and dropout.")
    log_every: Steps = Field(1, ge=1, description="Distance of the lines in metrics.jsonl.")
    eval_every: Steps | None = Field(
        None, ge=1, description="Distance of evaluations of the loss; also at the end."
    )
    save_every: Steps | None = Field(None, ge=1, description="Distance of checkpoints.")
    keep_last: int = Field(2, ge=1, description="Newest checkpoints that are kept; final/ always is.")
    keep_best: int = Field(
        0,
        ge=0,
        description="Checkpoints with the best evaluation that are kept besides, by evaluate.best_by or the "
        "lowest loss; each is evaluated.",
    )
    verify: Literal["sample", "off"] = Field(
        "sample",
        description="Load what was saved in a fresh process, with plain transformers and PEFT, and compare "
        "its logits on two rows with the trained model's. Needs memory for the model once more.",
    )


TrackerNames = Annotated[
    list[Literal["tensorboard", "wandb", "mlflow", "trackio"]],
    Field(min_length=1, description="The trackers."),
]


class TrackConfig(Section):
    """A list of trackers alone, or these keys. What they get is what metrics.jsonl gets."""

    to: TrackerNames
    project: str = Field("partwise", min_length=1, description="The project, or MLflow's experiment.")
    name: str | None = Field(
        None, min_length=1, description="The run's name; default is that of the output folder."
    )
    samples: Rows = Field(
        8, ge=0, description="Training rows whose images, prompt and answer are logged at the start."
    )


Track = Annotated[
    Annotated[TrackerNames, Tag("trackers")] | Annotated[TrackConfig, Tag("track settings")],
    Discriminator(lambda value: "trackers" if isinstance(value, list) else "track settings"),
]


class EvaluateConfig(Section):
    """How the model is judged while it trains and at its end: by its loss on the rows of data.eval, and by
    what it answers to them."""

    every: Steps | None = Field(
        None, ge=1, description="Distance of evaluations; also at the end, and of checkpoints with keep_best."
    )
    metrics: list[Annotated[str, Field(min_length=1)]] = Field(
        default=["exact_match"],
        description="What answers are judged by: exact_match, contains, token_f1, rouge_l, anls, "
        "relaxed_accuracy, or a function of yours as path/to/file.py:function. Empty: the loss alone.",
    )
    rows: Rows = Field(
        256, ge=1, description="Most rows of data.eval that are asked: a sample by train.seed."
    )
    max_new_tokens: Tokens = Field(64, ge=1, description="Longest answer.")
    batch_size: Rows = Field(16, ge=1, description="Rows that are answered at once, by each process.")
    budget_seconds: float | None = Field(
        None,
        gt=0,
        description="No batch of rows is begun later than this; how many were judged is told.",
        json_schema_extra={"unit": "seconds"},
    )
    group_by: str | None = Field(
        None, min_length=1, description="Key of the rows whose values get a mean each."
    )
    control: bool = Field(
        False, description="Ask about another row's images and blank ones, too: does the model look?"
    )
    best_by: str = Field(
        "loss", min_length=1, description="loss, or a metric: what keep_best and patience go by."
    )
    patience: int | None = Field(
        None,
        ge=1,
        description="Training ends after so many evaluations in a row without a better best_by.",
        json_schema_extra={"unit": "evaluations"},
    )
