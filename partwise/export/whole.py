"""Whole models as they are exported: an adapter merged into its base, several of them, or another dtype.

In: adapter folders, or the folder of a whole model. Out: a Hugging Face folder with processor, chat template,
a generation config that stops at the end of a turn, and partwise.json.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from partwise.config import ModelConfig
from partwise.data.template import end_of_turn
from partwise.errors import CheckpointError
from partwise.export.adapter import base_path, is_adapter
from partwise.export.merge import Rounding, merge_into, take_adapter
from partwise.export.question import answer_logits, question_probe
from partwise.lineage.fingerprint import base_fingerprint
from partwise.lineage.manifest import FORMAT, read_manifest
from partwise.lineage.publish import write_manifest
from partwise.model.folder import find_model_folder
from partwise.model.load import LoadedModel, empty_model, load_model, load_model_config, load_processor
from partwise.model.stops import stop_at

# Above this share of the update, the line that tells it also tells the way out.
LARGE_LOSS = 0.2


@dataclass(frozen=True)
class Written:
    """What is known of a written folder: `logits` of the merged model where no folder can give them.

    `dtype` is None where files were copied.
    """

    dtype: torch.dtype | None = None
    rounding: Rounding | None = None
    logits: tuple[Tensor, ...] = ()

    def rounding_text(self) -> str:
        assert self.rounding is not None
        merged = f"merged {len(self.rounding.moved)} weights in fp32"
        if self.rounding.dtype == torch.float32:
            return merged
        name, worst = self.rounding.worst
        return (
            f"{merged}; rounding to {str(self.rounding.dtype).removeprefix('torch.')} took "
            f"{self.rounding.fraction:.1%} of the update, at worst {worst:.1%} ({name})"
            + ("; --dtype float32 keeps all of it" if self.rounding.fraction > LARGE_LOSS else "")
        )


def write_merged(
    sources: Sequence[Path],
    weights: Sequence[float],
    out: Path,
    dtype_name: str | None,
    max_shard_size: str,
    trust_remote_code: bool,
    with_logits: bool = True,
) -> Written:
    """The base with the adapters in it, by their weights.

    `with_logits` computes the merged model's logits where no folder can give them.

    Raises:
        CheckpointError: the adapters have no base in common, or there is nothing to merge.
    """
    base = common_base(sources)
    dtype = dtype_of(base, dtype_name, trust_remote_code)
    loaded = load_for(base, dtype, trust_remote_code)
    processor = load_processor(sources[0], trust_remote_code)
    pairs = zip(sources, weights, strict=True)
    adapters = [take_adapter(loaded.model, source, weight) for source, weight in pairs]
    rounding = merge_into(loaded.model, adapters, dtype)
    logits: tuple[Tensor, ...] = ()
    if with_logits and (len(adapters) > 1 or adapters[0].weight != 1.0):
        # Computed with the rounded weights, in fp32 where the model is, before they take their final type.
        probe = question_probe(processor, 0, "cpu", trust_remote_code)
        set_dtype(loaded.model, dtype)
        logits = answer_logits(loaded.model.float(), probe)
    save_whole(loaded.model, processor, out, dtype, max_shard_size)
    write_manifest(out, merged_manifest(sources, weights, rounding))
    return Written(dtype, rounding, logits)


def write_whole(
    source: Path, out: Path, dtype_name: str | None, max_shard_size: str, trust_remote_code: bool
) -> Written:
    """The same model in another dtype, or in shards of another size."""
    dtype = dtype_of(str(source), dtype_name, trust_remote_code)
    loaded = load_for(str(source), dtype, trust_remote_code)
    save_whole(loaded.model, loaded.processor, out, dtype, max_shard_size)
    if manifest := read_manifest(source):
        write_manifest(out, manifest)
    return Written(dtype)


def save_whole(model: Any, processor: Any, out: Path, dtype: torch.dtype, max_shard_size: str) -> None:
    stop_at(model, end_of_turn(processor))
    set_dtype(model, dtype)
    model.save_pretrained(out, max_shard_size=max_shard_size)
    processor.save_pretrained(out)


def set_dtype(model: Any, dtype: torch.dtype) -> None:
    """Parameters in `dtype`, and all configs say so; buffers keep their own, as rotary angles need."""
    for config in (model.config, *(getattr(model.config, name, None) for name in model.config.sub_configs)):
        if config is not None:
            config.dtype = dtype
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def dtype_of(folder: str, name: str | None, trust_remote_code: bool) -> torch.dtype:
    if name:
        return getattr(torch, name)
    return load_model_config(folder, trust_remote_code).dtype or torch.float32


def load_for(folder: str, dtype: torch.dtype, trust_remote_code: bool) -> LoadedModel:
    """The model in a type that holds both its own weights and `dtype` exactly: bfloat16 where both are."""
    own = load_model_config(folder, trust_remote_code).dtype
    name = "bfloat16" if own == dtype == torch.bfloat16 else "float32"
    return load_model(
        ModelConfig(path=folder, dtype=name, trust_remote_code=trust_remote_code)  # type: ignore[arg-type]
    )


def num_weights_of(source: Path, trust_remote_code: bool) -> int:
    base = base_path(source) if is_adapter(source) else source
    return int(empty_model(base, trust_remote_code).num_parameters())


def common_base(sources: Sequence[Path]) -> str:
    """The base that all adapters were trained on. Raises: CheckpointError when they differ."""
    bases = [base_path(source) for source in sources]
    prints = [base_fingerprint(find_model_folder(base)) for base in bases]
    for source, base, found in zip(sources, bases, prints, strict=True):
        if found != prints[0]:
            raise CheckpointError(
                f"{source} was trained on {base}, {sources[0]} on {bases[0]}: adapters of different bases "
                "cannot be merged. Export them one by one."
            )
    return bases[0]


def merged_manifest(sources: Sequence[Path], weights: Sequence[float], rounding: Rounding) -> dict[str, Any]:
    """Of one run its own manifest; of several what the first says of base and versions."""
    first = read_manifest(sources[0]) or {"format": FORMAT}
    if len(sources) > 1:
        first = {key: first[key] for key in ("format", "base", "versions") if key in first}
    merged = [
        {"path": str(source.resolve()), "weight": weight}
        for source, weight in zip(sources, weights, strict=True)
    ]
    return {**first, "kind": "merged", "merged_from": merged, "rounding_fraction": rounding.fraction}
