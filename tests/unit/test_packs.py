"""Which rows share a pack: as few packs as hold them, about equally long, and always the same."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch

from partwise.data.collate import collate, group_rows, micro_batches
from partwise.data.packing import PACK_MULTIPLE, PackFormat, find_pack, plan_packs, runs_of
from partwise.records import IGNORE_INDEX, Example, Pack

PACK_TOKENS = 16_384


def text_lengths(rng: np.random.Generator, size: int) -> list[int]:
    return np.clip(rng.lognormal(math.log(420), 0.85, size), 32, 2048).astype(int).tolist()


def question_lengths(rng: np.random.Generator, size: int) -> list[int]:
    images = 264 * rng.choice([1, 2], size, p=[0.8, 0.2])
    return (images + rng.lognormal(math.log(120), 0.8, size)).astype(int).tolist()


def mixed_lengths(rng: np.random.Generator, size: int) -> list[int]:
    images = 264 * rng.choice([0, 1, 1, 2, 4], size)
    return np.minimum(images + rng.lognormal(math.log(900), 1.0, size), 8192).astype(int).tolist()


MIXES = {"text": text_lengths, "questions": question_lengths, "mixed": mixed_lengths}


@pytest.mark.parametrize("num_rows", [32, 256])
@pytest.mark.parametrize("mix", MIXES)
def test_packs_are_full_few_and_alike(mix, num_rows):
    packs, rng = PackFormat(PACK_TOKENS), np.random.default_rng(0)
    for _ in range(20):
        lengths = MIXES[mix](rng, num_rows)
        groups = plan_packs(lengths, PACK_TOKENS)
        assert sorted(place for group in groups for place in group) == list(range(num_rows))
        loads = [sum(lengths[place] for place in group) for group in groups]
        assert loads == sorted(loads, reverse=True) and loads[0] <= PACK_TOKENS
        least = math.ceil(sum(lengths) / PACK_TOKENS)
        assert len(groups) <= least + (sum(lengths) > 0.98 * least * PACK_TOKENS)
        assert sum(loads) / sum(packs.padded_length(load) for load in loads) > 0.97
        assert loads[-1] > 0.6 * loads[0]


def test_the_worked_examples():
    assert plan_packs((5, 4, 3, 2), 8) == [[0, 3], [1, 2]]
    assert plan_packs((), 8) == []
    assert runs_of(torch.tensor([4, 4, 1])) == [(0, 2), (2, 3)]


def test_rows_that_cannot_be_spread_stay_where_they_fit():
    """Spread, 6 and 6 take half of the room of each, and 4 4 4 no longer fits; best-fit finds 6 6 | 4 4 4."""
    assert plan_packs((6, 6, 4, 4, 4), 12) == [[0, 1], [2, 3, 4]]


def test_a_plan_depends_on_the_lengths_alone():
    draw = random.Random(0)
    lengths = [draw.randint(1, 50) for _ in range(40)]
    assert plan_packs(lengths, 100) == plan_packs(tuple(lengths), 100)
    assert plan_packs([100] * 3, 100) == [[0], [1], [2]]


def test_lengths_are_round_within_the_limit():
    packs = PackFormat(100)
    assert [packs.padded_length(n) for n in (1, 64, 65, 100)] == [64, 64, 100, 100]
    assert packs.padded_length(130) == 130  # a filler may come on top


def test_padded_groups_are_of_like_length():
    assert group_rows((1, 9, 5, 7), 2) == [[1, 3], [2, 0]]


def example(length: int, row: int, **fields: list[int]) -> Example:
    ids = torch.arange(10, 10 + length)
    labels = ids.clone()
    labels[0] = IGNORE_INDEX
    token_fields = {name: torch.tensor(values) for name, values in fields.items()}
    media = {"pixel_values": torch.full((1, 3, 2, 2), float(row))} if fields else {}
    return Example(ids, labels, token_fields, media, length - 1, "a.jsonl", row)


def test_a_pack_lays_documents_one_after_the_other():
    packs = PackFormat(100, image_field="token_type_ids")
    rows = [
        example(4, 0, token_type_ids=[0, 1, 1, 1]),
        example(2, 1),
        example(3, 2, token_type_ids=[1, 1, 0]),
    ]
    batch = collate(rows, 7, packs)
    assert batch.input_ids.shape == (1, PACK_MULTIPLE)
    num_missing = PACK_MULTIPLE - 9
    assert batch.input_ids[0].tolist() == [10, 11, 12, 13, 10, 11, 10, 11, 12] + [7] * num_missing
    assert batch.labels[0].tolist() == [-100, 11, 12, 13, -100, 11, -100, 11, 12] + [-100] * num_missing
    assert batch.document_ids[0].tolist() == [0, 0, 0, 0, 1, 1, 2, 2, 2] + [-1] * num_missing
    assert batch.position_ids[0].tolist() == [0, 1, 2, 3, 0, 1, 0, 1, 2] + [0] * num_missing
    assert batch.token_fields["token_type_ids"][0, :9].tolist() == [0, 1, 1, 1, 0, 0, 1, 1, 0]
    assert batch.media["pixel_values"][:, 0, 0, 0].tolist() == [0, 2]
    assert batch.pack == Pack(((0, 4), (4, 6), (6, 9), (9, 64)), ((1, 4), (6, 8)))
    assert (batch.num_target_tokens, batch.num_input_tokens) == (6, 9)
    assert batch.rows == ("a.jsonl:1", "a.jsonl:2", "a.jsonl:3")


def test_images_at_a_border_are_two_runs_and_one_token_is_none():
    ids, images = torch.tensor([0, 0, 0, 1, 1, 1, 1]), torch.tensor([1, 0, 1, 1, 1, 0, 1]).bool()
    assert find_pack(ids, images) == Pack(((0, 3), (3, 7)), ((3, 5),))
    assert find_pack(ids) == Pack(((0, 3), (3, 7)))


def test_a_step_has_the_same_rows_packed_and_padded():
    rows = [example(length, row) for row, length in enumerate((5, 30, 12, 44, 8))]
    padded, packed = micro_batches(rows, 7, 2), micro_batches(rows, 7, 2, PackFormat(64))
    assert sorted(r for b in padded for r in b.rows) == sorted(r for b in packed for r in b.rows)
    assert [sum(b.num_target_tokens for b in step) for step in (padded, packed)] == [94, 94]
    assert len(padded) == 3 and len(packed) == 2
