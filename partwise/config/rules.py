"""What keys of a config must satisfy together.

In: valid sections. Out: a fault for each setting that contradicts another, or that would have no effect.
Whether a plan fits the model is not known here.
"""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches

from partwise.config.document import Fault
from partwise.config.faults import show_value
from partwise.config.objective import ObjectiveConfig
from partwise.config.sections import (
    DataConfig,
    EvaluateConfig,
    ModelConfig,
    PartConfig,
    PartsConfig,
    TrainConfig,
)
from partwise.records import PART_NAMES


def check_train(train: TrainConfig) -> Iterator[Fault]:
    if train.micro_batch_size > train.global_batch_size:
        key = "train.micro_batch_size"
        if "micro_batch_size" not in train.model_fields_set:
            key = "train.global_batch_size"
        yield Fault(
            key,
            f"train.micro_batch_size: {train.micro_batch_size} is more than train.global_batch_size "
            f"({train.global_batch_size}). Lower the first or raise the second.",
        )
    if train.steps is not None and train.warmup_steps >= train.steps:
        yield Fault(
            "train.warmup_steps",
            f"train.warmup_steps: {train.warmup_steps} leaves nothing of train.steps ({train.steps}). "
            "Warm up for fewer steps.",
        )
    if train.learning_rate_schedule == "constant" and train.min_learning_rate_fraction > 0:
        yield Fault(
            "train.min_learning_rate_fraction",
            f"train.min_learning_rate_fraction: {train.min_learning_rate_fraction} has no effect: "
            "train.learning_rate_schedule is constant. Remove it, or choose cosine or linear.",
        )


def check_adapter(model: ModelConfig, parts: PartsConfig) -> Iterator[Fault]:
    modes = [settings.mode for part in PART_NAMES if (settings := parts.settings(part)) is not None]
    if model.adapter is not None and "lora" not in modes:
        yield Fault(
            "model.adapter",
            f"model.adapter: {model.adapter} has no effect: no part is in mode lora. Set the parts as they "
            "were when it was trained, or export it with --to hf and give that folder as model.path.",
        )


def check_engine(engine: str, parts: PartsConfig, train: TrainConfig) -> Iterator[Fault]:
    if train.offload_optimizer and engine != "fsdp":
        yield Fault(
            "train.offload_optimizer",
            f"train.offload_optimizer: true beside engine: {engine}, which keeps everything on the GPU. "
            "Write engine: fsdp, which also works on one GPU, or remove this.",
        )
    quantized = [part for part in PART_NAMES if (s := parts.settings(part)) and s.quantization]
    if quantized and engine in ("fsdp", "zero2", "zero3"):
        yield Fault(
            "engine",
            f"engine: {engine} beside parts.{quantized[0]}.quantization: weights in 4 bits cannot be "
            "cut into shards. Write engine: ddp, which copies them to each GPU, or remove the quantization.",
        )


def check_features(data: DataConfig, parts: PartsConfig) -> Iterator[Fault]:
    tower = parts.settings("vision_tower")
    if data.feature_cache is None or tower is None:
        return
    if tower.mode != "frozen":
        yield Fault(
            "data.feature_cache",
            f"data.feature_cache: {data.feature_cache} beside parts.vision_tower.mode: {tower.mode}: what a "
            "tower makes of an image changes while it trains, so it cannot be kept. Freeze the tower, or "
            "remove this.",
        )
    elif tower.quantization:
        yield Fault(
            "parts.vision_tower.quantization",
            f"parts.vision_tower.quantization: {tower.quantization} beside data.feature_cache: the tower as "
            "its folder has it makes the features, and no step holds it. Remove the quantization.",
        )


def check_evaluation(train: TrainConfig, data: DataConfig) -> Iterator[Fault]:
    if train.eval_every is not None and data.eval is None:
        yield Fault(
            "train.eval_every",
            f"train.eval_every: {train.eval_every} has no effect: there is no data.eval. "
            "Add it, or remove this.",
        )
    missing = {"data.eval": data.eval, "train.save_every": train.save_every}
    for key in (key for key, value in missing.items() if train.keep_best and value is None):
        yield Fault(
            "train.keep_best",
            f"train.keep_best: {train.keep_best} has no effect: there is no {key}. Add it, or remove this.",
        )


def metric_name(metric: str) -> str:
    """How a metric is called where its scores are shown: "scores.py:is_polite" -> "is_polite"."""
    return metric.rpartition(":")[2]


def check_judging(
    evaluate: EvaluateConfig | None, data: DataConfig, objective: ObjectiveConfig, engine: str
) -> Iterator[Fault]:
    if evaluate is None:
        return
    if evaluate.metrics and objective.shape != "chats":
        yield Fault(
            "evaluate.metrics",
            f"evaluate.metrics: {show_value(evaluate.metrics)} beside objective.loss: {objective.loss}: rows "
            "of data.eval are no questions with one answer. Write metrics: [] for the loss alone, and judge "
            "the answers afterwards with partwise eval on rows of chats.",
        )
    if data.eval is None:
        yield Fault("evaluate", "evaluate: has no effect: there is no data.eval. Add it, or remove this.")
    if evaluate.metrics and engine in ("fsdp", "zero3"):
        yield Fault(
            "evaluate.metrics",
            f"evaluate.metrics: {show_value(evaluate.metrics)} beside engine: {engine}: no process has the "
            "whole model, so it would gather all weights for each token of an answer. Write metrics: [] for "
            "the loss alone and judge the answers afterwards with partwise eval, or choose another engine.",
        )
    for key in () if evaluate.metrics else ("control", "group_by", "budget_seconds"):
        if getattr(evaluate, key):
            yield Fault(
                f"evaluate.{key}",
                f"evaluate.{key}: {show_value(getattr(evaluate, key))} has no effect: evaluate.metrics is "
                "empty, so nothing is asked. Name a metric, or remove this.",
            )
    if evaluate.control and data.feature_cache is not None:
        yield Fault(
            "evaluate.control",
            "evaluate.control: true beside data.feature_cache: no features are kept of a blank image. Remove "
            "this, and ask afterwards with partwise eval --control.",
        )
    known = ["loss", *map(metric_name, evaluate.metrics)]
    if evaluate.best_by not in known:
        close = get_close_matches(evaluate.best_by, known, n=1)
        hint = f' Did you mean "{close[0]}"?' if close else ""
        yield Fault(
            "evaluate.best_by",
            f"evaluate.best_by: {show_value(evaluate.best_by)} is not measured; there is "
            f"{', '.join(known)}.{hint} Choose one, or add it to evaluate.metrics.",
        )
    if evaluate.patience is not None and evaluate.every is None:
        yield Fault(
            "evaluate.patience",
            f"evaluate.patience: {evaluate.patience} has no effect: evaluations have no distance. Set "
            "evaluate.every, or remove this.",
        )


_NEEDS_LORA = tuple(name for name in PartConfig.model_fields if name.startswith(("lora_", "use_")))
_NEEDS_TRAINING = ("learning_rate", "weight_decay", "layers", "layer_decay")
# PEFT's adapter format holds one value of each for all adapters of a model.
_ONE_PER_ADAPTER = ("lora_dropout", "use_rslora", "use_dora")


def check_parts(parts: PartsConfig) -> Iterator[Fault]:
    named = {part: settings for part in PART_NAMES if (settings := parts.settings(part)) is not None}
    for part, settings in named.items():
        idle = (*_NEEDS_TRAINING, *_NEEDS_LORA) if settings.mode == "frozen" else _NEEDS_LORA
        for name in () if settings.mode == "lora" else idle:
            value = getattr(settings, name)
            if name in settings.model_fields_set and value is not None:
                state = {"frozen": "frozen", "full": "trained in full, without adapters"}[settings.mode]
                yield Fault(
                    f"parts.{part}.{name}",
                    f"parts.{part}.{name}: {show_value(value)} has no effect: {part} is {state}. "
                    "Remove it, or change the mode.",
                )
        yield from _check_quantization(part, settings)
    doubles = {part: s.double_quantization for part, s in named.items() if s.quantization}
    if len(set(doubles.values())) > 1:
        part = next(iter(doubles))
        yield Fault(
            f"parts.{part}.double_quantization",
            f"parts.{part}.double_quantization: {show_value(doubles[part])} here and not in all parts: "
            "transformers opens a model with one value for all. Write the same for each.",
        )
    adapted = {part: settings for part, settings in named.items() if settings.mode == "lora"}
    for name in _ONE_PER_ADAPTER:
        given = {part: getattr(settings, name) for part, settings in adapted.items()}
        if len(set(given.values())) > 1:
            shown = ", ".join(f"{show_value(value)} for {part}" for part, value in given.items())
            part = next(part for part in given if name in adapted[part].model_fields_set)
            yield Fault(
                f"parts.{part}.{name}",
                f"parts.{part}.{name}: {shown}; an adapter folder holds one value for all parts. "
                "Write the same for each.",
            )


def _check_quantization(part: str, settings: PartConfig) -> Iterator[Fault]:
    key = f"parts.{part}.quantization"
    if settings.quantization is None:
        if "double_quantization" in settings.model_fields_set:
            yield Fault(
                f"parts.{part}.double_quantization",
                f"parts.{part}.double_quantization: {show_value(settings.double_quantization)} has no "
                f"effect: {part} is not quantised. Remove it, or set {key}: nf4.",
            )
    elif part == "projector":
        yield Fault(
            key,
            f"{key}: {settings.quantization}: a projector is too small to gain anything, and everything the "
            "model sees passes through it. Remove it.",
        )
    elif settings.mode == "full":
        yield Fault(
            key,
            f"{key}: {settings.quantization} beside mode full: an update is far smaller than the steps "
            f"between 4-bit weights, so they cannot train. Set parts.{part}.mode: lora, or remove {key}.",
        )
