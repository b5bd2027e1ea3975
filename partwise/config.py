"""The config: one YAML file, `key.path=value` overrides, strict types, every fault at once.

In: a path and overrides. Out: a frozen `Config` that knows the file:line of each of its keys.
Validators check; they never fill in or rewrite. The freeze flags are turned into `parts` by flags.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr

from partwise.records import Mode


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ModelConfig(Section):
    path: str = Field(description="Hugging Face model folder, or a hub name where a hub is reachable.")
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
    mode: Mode = Field(description="frozen, lora or full.")
    learning_rate: float | None = Field(None, gt=0, description="Instead of train.learning_rate.")
    weight_decay: float | None = Field(None, ge=0, description="Instead of train.weight_decay.")
    layers: str | None = Field(
        None, description='Range of layers that train, as a Python slice: "-12:" is the last twelve.'
    )
    lora_rank: int = Field(16, ge=1, description="Rank of the adapters.")
    lora_alpha: float | None = Field(None, gt=0, description="Scale is alpha / rank; default is 2 * rank.")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the adapters' input.")
    lora_targets: Literal["attention", "mlp", "all"] = Field(
        "all", description="Linear layers of the part that get an adapter."
    )
    use_rslora: bool = Field(False, description="Scale by alpha / sqrt(rank) (rsLoRA).")
    use_dora: bool = Field(False, description="Train a magnitude per output beside the adapter (DoRA).")


class PartsConfig(Section):
    """Modes per part: a mode alone, or its settings. A part that is not named stays frozen."""

    vision_tower: Mode | PartConfig | None = None
    audio_tower: Mode | PartConfig | None = None
    projector: Mode | PartConfig | None = None
    language_model: Mode | PartConfig | None = None

    def settings(self, part: str) -> PartConfig | None:
        """The part's settings in full; None when the config does not name the part."""
        value = getattr(self, part)
        return PartConfig(mode=value) if isinstance(value, str) else value


class DataConfig(Section):
    train: str | Annotated[list[str], Field(min_length=1)] = Field(
        description="One file or a list: .jsonl, .json or .parquet. Relative to the working directory."
    )
    eval: str | list[str] | None = Field(None, description="Held-out rows for the evaluation loss.")
    max_seq_len: int = Field(4096, ge=8, description="Longest example, in tokens, images included.")
    overlong: Literal["truncate", "drop", "error"] = Field(
        "truncate",
        description="What happens to longer rows. Rows that truncation would cut inside an image or leave "
        "without a target token are dropped and counted.",
    )
    num_workers: int = Field(2, ge=0, description="Processes that read and process rows ahead of the step.")

    @property
    def train_files(self) -> list[str]:
        return [self.train] if isinstance(self.train, str) else list(self.train)

    @property
    def eval_files(self) -> list[str]:
        return [self.eval] if isinstance(self.eval, str) else list(self.eval or ())


class TrainConfig(Section):
    epochs: float = Field(1.0, gt=0, description="Passes over the training rows; ignored when steps is set.")
    steps: int | None = Field(None, ge=1, description="Optimizer steps, instead of epochs.")
    global_batch_size: int = Field(32, ge=1, description="Rows per optimizer step.")
    micro_batch_size: int = Field(4, ge=1, description="Rows per forward and backward pass.")
    learning_rate: float = Field(2e-5, gt=0, description="Peak learning rate of parts without their own.")
    learning_rate_schedule: Literal["cosine", "linear", "constant"] = Field("cosine")
    warmup_steps: int = Field(0, ge=0, description="Steps of linear warm-up from zero.")
    min_learning_rate_fraction: float = Field(
        0.0, ge=0, le=1, description="Where the schedule ends, as a fraction of the peak."
    )
    weight_decay: float = Field(0.0, ge=0, description="Never applied to norms, biases and embeddings.")
    adam_betas: tuple[float, float] = Field((0.9, 0.999))
    adam_eps: float = Field(1e-8, gt=0)
    max_grad_norm: float = Field(1.0, gt=0, description="Clip by the global norm.")
    gradient_checkpointing: bool = Field(
        False, description="Recompute layers in the backward pass of the parts that need one."
    )
    seed: int = Field(0, ge=0)
    log_every: int = Field(1, ge=1, description="Steps between lines of metrics.jsonl.")
    eval_every: int | None = Field(None, ge=1, description="Steps between evaluations; also at the end.")
    save_every: int | None = Field(None, ge=1, description="Steps between checkpoints.")
    keep_last: int = Field(2, ge=1, description="Checkpoints that are kept; final/ always is.")


class Config(Section):
    model: ModelConfig
    parts: PartsConfig
    data: DataConfig
    train: TrainConfig = Field(default_factory=TrainConfig)
    engine: Literal["auto", "single"] = Field(
        "auto", description="Both train on one device: the GPU where there is one, else the CPU."
    )
    output: str = Field(description="The run folder. Relative to the working directory.")

    _origins: dict[str, str] = PrivateAttr(default_factory=dict)

    def where(self, key: str) -> str:
        """ "file:line" of a key such as "parts.projector.mode", or of its nearest parent that is written."""
        raise NotImplementedError


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    raise NotImplementedError


def config_schema() -> dict[str, Any]:
    raise NotImplementedError
