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
from transformers import PreTrainedModel

from partwise.config import ModelConfig
from partwise.data.template import end_of_turn
from partwise.errors import CheckpointError
from partwise.export.adapter import Base, base_path, find_base, quantize_again, trained_quantization
from partwise.export.merge import Rounding, merge_into, take_adapter
from partwise.export.question import answer_logits, question_probe
from partwise.lineage.manifest import FORMAT, library_versions, now, read_manifest
from partwise.lineage.origin import adapter_record
from partwise.lineage.publish import write_manifest
from partwise.model.folder import is_adapter
from partwise.model.load import LoadedModel, empty_model, load_model, load_model_config, load_processor
from partwise.model.quantize import dequantize_linears
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
    accept_base: bool = False,
    with_logits: bool = True,
) -> Written:
    """The base with the adapters in it, by their weights.

    `with_logits` computes the merged model's logits where no folder can give them.

    Raises:
        CheckpointError: the adapters have no base in common, or there is nothing to merge.
    """
    bases = common_base(sources, trust_remote_code, accept_base)
    dtype = dtype_of(bases[0].path, dtype_name, trust_remote_code)
    loaded = load_base(sources[0], bases[0].path, dtype, trust_remote_code)
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
    manifest = merged_manifest(sources, weights, bases, loaded.model, rounding)
    save_whole(loaded.model, processor, out, dtype, max_shard_size)
    write_manifest(out, manifest)
    return Written(dtype, rounding, logits)


def load_base(source: Path, base: str, dtype: torch.dtype, trust_remote_code: bool) -> LoadedModel:
    """The base of an adapter to merge into; one that was quantised with the weights that training met."""
    if not (manifest := read_manifest(source) or {}) or not trained_quantization(manifest):
        return load_for(base, dtype, trust_remote_code)
    settings = ModelConfig(path=base, dtype=manifest["dtype"], trust_remote_code=trust_remote_code)
    loaded = load_model(settings)
    quantize_again(loaded.model, source, torch.float32, "cpu")
    dequantize_linears(loaded.model, torch.float32)
    loaded.model.float()
    return loaded


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


def trained_model(source: Path, trust_remote_code: bool) -> PreTrainedModel:
    """The model, or an adapter's base, without weights."""
    return empty_model(base_path(source) if is_adapter(source) else source, trust_remote_code)


def common_base(sources: Sequence[Path], trust_remote_code: bool, accept_base: bool) -> list[Base]:
    """The base of each adapter. Raises: CheckpointError when they differ, or were quantised otherwise."""
    bases = [find_base(source, trust_remote_code, accept_base) for source in sources]
    kinds = [trained_quantization(read_manifest(source) or {}) for source in sources]
    for source, base, kind in zip(sources, bases, kinds, strict=True):
        if base.record["fingerprint"] != bases[0].record["fingerprint"]:
            raise CheckpointError(
                f"{source} was trained on {base.path}, {sources[0]} on {bases[0].path}: adapters of "
                "different bases cannot be merged. Export them one by one."
            )
        if kind != kinds[0]:
            raise CheckpointError(
                f"{source} was trained on a base that was quantised as {kind or 'nothing'}, {sources[0]} on "
                f"{kinds[0] or 'nothing'}: these are different weights. Export them one by one."
            )
    return bases


def merged_manifest(
    sources: Sequence[Path],
    weights: Sequence[float],
    bases: Sequence[Base],
    model: PreTrainedModel,
    rounding: Rounding,
) -> dict[str, Any]:
    """A merged model comes from its adapters, each with its share; what one run says of itself stays."""
    only = read_manifest(sources[0]) if len(sources) == 1 else None
    kept = {key: value for key, value in (only or {}).items() if key in ("step", "plan", "data")}
    accepted = [base.accepted for base in bases if base.accepted]
    return {
        **kept,
        "format": FORMAT,
        "kind": "merged",
        "base": {key: bases[0].record[key] for key in ("path", "fingerprint", "parts")},
        "parents": [
            {**adapter_record(source, model, base.record), "weight": weight}
            for source, base, weight in zip(sources, bases, weights, strict=True)
        ],
        "rounding_fraction": rounding.fraction,
        "versions": library_versions(),
        "created": now(),
        **({"accepted_base": accepted[0]} if accepted else {}),
    }
