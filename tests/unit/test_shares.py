"""What each rank holds: by hand for four tensors, and what is read off a tiny model."""

from __future__ import annotations

from dataclasses import replace

import pytest

from partwise.config import Config
from partwise.model.estimate import planned_model
from partwise.model.load import empty_model
from partwise.model.plan import resolve_plan
from partwise.model.shares import (
    Passing,
    Weight,
    Weights,
    moment_bytes,
    read_weights,
    share_of,
)

# Embeddings and two layers that train, in bfloat16, and a frozen tower.
EMBEDDINGS, SMALL, LARGE, TOWER = 1000, 300, 401, 500
WEIGHTS = Weights(
    tensors=(
        Weight(EMBEDDINGS, 2, 2 * EMBEDDINGS, trains=True),
        Weight(SMALL, 2, 2 * SMALL, trains=True, unit="layers.0"),
        Weight(LARGE, 2, 2 * LARGE, trains=True, unit="layers.1"),
        Weight(TOWER, 2, 2 * TOWER, trains=False, is_apart=True),
    ),
    itemsize=2,
    head_elements=EMBEDDINGS,
    sums_head=True,
    optimizer_states="float32",
)
TRAINED = EMBEDDINGS + SMALL + LARGE
SHARD = 250 + 75 + 101  # of four ranks, each tensor rounded up


def fixed(engine: str, num_ranks: int, **options) -> tuple[int, int, int, int]:
    share = share_of(WEIGHTS, engine, num_ranks, **options)
    return share.weights_bytes, share.masters_bytes, share.moments_bytes, share.gradients_bytes


def test_what_stays_by_hand() -> None:
    whole = 2 * (TRAINED + TOWER)
    assert fixed("single", 1) == fixed("ddp", 4) == (whole, 4 * TRAINED, 8 * TRAINED, 4 * TRAINED)
    assert fixed("fsdp", 4) == (2 * TOWER, 4 * SHARD, 8 * SHARD, 4 * SHARD)
    assert fixed("zero2", 4) == (whole, 4 * SHARD, 8 * SHARD, 4 * SHARD)
    assert fixed("zero3", 4) == (2 * SHARD + 2 * TOWER, 4 * SHARD, 8 * SHARD, 4 * SHARD)


def test_what_passes_by_hand() -> None:
    head = {"head_bytes": 4 * EMBEDDINGS, "head_copy_bytes": 2 * EMBEDDINGS}
    assert share_of(WEIGHTS, "ddp", 4).passing == Passing(**head)
    gathered = 2 * (EMBEDDINGS + 2 * LARGE)
    assert share_of(WEIGHTS, "fsdp", 4).passing == Passing(
        gathered_bytes=gathered,
        waiting_bytes=2 * EMBEDDINGS,
        layer_bytes=6 * LARGE,
        last_bytes=6 * EMBEDDINGS,
        **head,
    )
    buckets = Passing(layer_bytes=6 * TRAINED, last_bytes=6 * EMBEDDINGS, **head)
    assert share_of(WEIGHTS, "zero2", 4).passing == buckets
    assert share_of(WEIGHTS, "zero3", 4).passing == replace(
        buckets, gathered_bytes=gathered, head_bytes=2 * EMBEDDINGS, head_copy_bytes=0
    )


def test_a_heads_gradient_in_fp32_and_of_a_head_that_is_called_as_a_module() -> None:
    wide = replace(WEIGHTS, itemsize=4)
    assert share_of(wide, "ddp", 4).passing == Passing(head_bytes=4 * EMBEDDINGS)
    called = replace(WEIGHTS, sums_head=False)
    assert share_of(called, "ddp", 4).passing == Passing(head_bytes=2 * EMBEDDINGS)


def test_buckets_and_live_weights_are_bounded() -> None:
    tensors = tuple(Weight(30_000_000, 2, 60_000_000, True, unit=f"layers.{i}") for i in range(60))
    passing = share_of(replace(WEIGHTS, tensors=tensors), "zero3", 4).passing
    assert (passing.layer_bytes, passing.gathered_bytes) == (6 * 50_000_000, 2 * 1_000_000_000)


def test_what_is_offloaded_by_hand() -> None:
    """What no engine shards stays; masters and gradients are pinned in powers of two, moments are not."""
    assert fixed("fsdp", 4, offload_optimizer=True) == (2 * TOWER, 0, 0, 0)
    share = share_of(WEIGHTS, "fsdp", 4, offload_optimizer=True)
    assert share.host_bytes == 2 * (1024 + 512 + 512) + 8 * SHARD
    passing = share_of(WEIGHTS, "fsdp", 4).passing
    assert share.passing == replace(
        passing,
        layer_bytes=passing.layer_bytes + 4 * -(-2 * LARGE // 4),
        last_bytes=passing.last_bytes + 4 * EMBEDDINGS // 4,
    )
    frozen = Weight(400, 2, 800, trains=False, unit="layers.0")
    alone = share_of(replace(WEIGHTS, tensors=(frozen,)), "fsdp", 4, offload_optimizer=True)
    assert (alone.host_bytes, alone.fixed_bytes) == (256, 0)


def test_fp32_weights_are_their_own_masters_everywhere() -> None:
    wide = replace(WEIGHTS, tensors=(Weight(SMALL, 4, 4 * SMALL, trains=True),))
    for engine, count in (("ddp", SMALL), ("zero2", SMALL), ("fsdp", 75), ("zero3", 75)):
        share = share_of(wide, engine, 4)
        assert (share.weights_bytes, share.masters_bytes) == (4 * count, 0), engine


def test_moments_are_coded_by_the_size_of_the_shard() -> None:
    coded = replace(WEIGHTS, tensors=(Weight(8192, 2, 2 * 8192, trains=True),), optimizer_states="8bit")
    assert share_of(coded, "fsdp", 2).moments_bytes == moment_bytes(4096, "8bit") < 8 * 4096
    assert share_of(coded, "fsdp", 4).moments_bytes == 8 * 2048


def read(tiny_folder, family: str, **parts) -> Weights:
    """Of the planned tiny model in bfloat16; `parts` by name, the others frozen."""
    keys = {"model": {"path": str(tiny_folder(family))}, "parts": parts, "output": "run"}
    config = Config.model_validate(keys | {"data": {"train": "rows.jsonl"}})
    plan = resolve_plan(empty_model(config.model.path), config)
    return read_weights(planned_model(config.model, plan), plan, "float32")


@pytest.mark.parametrize(("family", "num_bare"), [("gemma3", 0), ("llava-next", 1), ("qwen2.5-vl", 0)])
def test_a_frozen_vision_side_is_apart_and_layers_are_units(tiny_folder, family, num_bare) -> None:
    """But for a bare parameter, LLaVA-NeXT's image_newline, which is the root's."""
    weights = read(tiny_folder, family, language_model="full")
    apart = [tensor for tensor in weights.tensors if tensor.is_apart]
    assert apart and not any(tensor.trains for tensor in apart)
    assert sum(not tensor.trains for tensor in weights.shardable) == num_bare
    units = {tensor.unit for tensor in weights.shardable}
    assert len(units) == 3 and "" in units  # two layers and the root


def test_a_vision_side_that_trains_is_sharded_by_its_blocks(tiny_folder) -> None:
    weights = read(tiny_folder, "gemma3", vision_tower="full", language_model="lora")
    assert weights.shardable == list(weights.tensors)
    trained = {tensor.unit for tensor in weights.trained}
    assert sum("vision" in unit for unit in trained) == 2 and len(trained) == 5


def test_quantized_weights_are_apart(tiny_folder) -> None:
    weights = read(tiny_folder, "gemma3", language_model={"mode": "lora", "quantization": "nf4"})
    packed = [tensor for tensor in weights.tensors if tensor.rest_bytes < 2 * tensor.num_elements]
    assert packed and all(tensor.is_apart and not tensor.trains for tensor in packed)
