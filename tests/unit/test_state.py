"""Shards of an optimizer's state -> any other stretch of the same tensors, from the files of a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from partwise.engine.fsdp import mesh_shape
from partwise.engine.ranks import BUCKET_BYTES, buckets
from partwise.engine.single import Stretch
from partwise.training.adamw import PACKED_KINDS, packed_state, unpack
from partwise.training.state import SavedState, state_file, state_files, write_state

SHAPE = (7, 3)
WHOLE = {
    "master/w": torch.arange(21.0).view(SHAPE),
    "exp_avg/w": torch.arange(21.0).view(SHAPE) + 100,
    "exp_avg_sq/w": torch.arange(21.0).view(SHAPE) + 200,
    "step/w": torch.tensor(5.0),
}


def write_shards(folder: Path, cuts: list[tuple[int, int]]) -> SavedState:
    """A file for each (start, end) of the flattened tensor."""
    (folder / "training_state").mkdir()
    for rank, (start, end) in enumerate(cuts):
        is_whole = len(cuts) == 1
        state = {
            k: v if v.ndim == 0 or is_whole else v.flatten()[start:end].clone() for k, v in WHOLE.items()
        }
        path = folder / state_file(rank, len(cuts))
        write_state(path, state, {} if is_whole else {"w": Stretch(start, SHAPE)})
    return SavedState([folder / name for name in state_files(folder)])


@pytest.mark.parametrize(
    "cuts",
    [[(0, 21)], [(0, 12), (12, 21)], [(12, 21), (0, 12), (21, 21)], [(0, 12), (12, 21), (0, 12), (12, 21)]],
)
@pytest.mark.parametrize(("start", "end"), [(0, 21), (0, 6), (6, 15), (15, 21), (21, 21)])
def test_any_stretch_of_any_shards(tmp_path, cuts, start, end):
    saved = write_shards(tmp_path, cuts)
    assert saved.names == {"w"} and saved.shape("w") == SHAPE
    assert torch.equal(saved.master("w", start, end - start), WHOLE["master/w"].flatten()[start:end])
    state = saved.state("w", start, end - start)
    assert state["step"].ndim == 0 and state["step"] == 5
    for kind in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(state[kind].flatten(), WHOLE[f"{kind}/w"].flatten()[start:end])


def test_a_missing_shard_is_seen_by_its_length(tmp_path):
    saved = write_shards(tmp_path, [(0, 9), (12, 21)])
    assert saved.master("w", 0, 21).numel() == 18


def test_a_tensor_that_was_never_updated_has_no_state(tmp_path):
    write_state(tmp_path / "a", {"master/w": WHOLE["master/w"]}, {})
    saved = SavedState([tmp_path / "a"])
    assert saved.state("w", 0, 21) == {} and saved.state("w", 0, 5) == {}


def test_moments_in_8_bits_are_taken_over_as_they_are_or_decoded(tmp_path):
    torch.manual_seed(0)
    mean, square = torch.randn(8192), torch.rand(8192)
    packed = packed_state(mean.clone(), square.clone())
    state = {"master/w": torch.zeros(8192), "step/w": torch.tensor(2.0)}
    write_state(tmp_path / "a", state | {f"{kind}/w": value for kind, value in packed.items()}, {})
    saved = SavedState([tmp_path / "a"])
    same = saved.state("w", 0, 8192)
    assert all(torch.equal(same[kind], packed[kind]) for kind in PACKED_KINDS)
    part = saved.state("w", 1000, 3000)
    decoded = unpack(*(packed[kind] for kind in PACKED_KINDS))
    assert torch.equal(part["exp_avg"], decoded[0][1000:4000])
    assert torch.equal(part["exp_avg_sq"], decoded[1][1000:4000])


def test_files_are_those_of_as_many_ranks_as_their_names_say(tmp_path):
    (tmp_path / "training_state").mkdir()
    (tmp_path / state_file(2, 3)).touch()
    assert state_files(tmp_path) == [state_file(rank, 3) for rank in range(3)]
    assert state_file() == "training_state/optimizer.safetensors"


def test_small_tensors_travel_together_and_large_ones_alone():
    small, large = torch.zeros(5), torch.zeros(BUCKET_BYTES // 4 + 1)
    other = torch.zeros(5, dtype=torch.float64)
    shapes = [[len(t) for t in bucket] for bucket in buckets([small, small, large, small, other])]
    assert shapes == [[5, 5], [len(large)], [5], [5]]


@pytest.mark.parametrize(
    ("size", "local_size", "shape"), [(4, 2, (2, 2)), (4, 4, (4,)), (3, 1, (3,)), (3, 2, (3,)), (1, 1, (1,))]
)
def test_shards_within_a_node_and_copies_across(size, local_size, shape):
    assert mesh_shape(size, local_size) == shape
