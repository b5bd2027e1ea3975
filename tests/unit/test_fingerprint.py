"""Weights known by their content: per part, wherever the tensors lie, and no byte of them unseen."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from partwise.config import ModelConfig
from partwise.errors import CheckpointError
from partwise.lineage.fingerprint import Fingerprint, fingerprint_files, sample_blocks, weights_fingerprint
from partwise.model.folder import weight_files
from partwise.model.load import empty_model, load_model
from partwise.tiny import FAMILIES


def fingerprint(folder: Path, family: Path) -> Fingerprint:
    return weights_fingerprint(weight_files(folder), empty_model(family))


@pytest.mark.parametrize("family", FAMILIES)
def test_layout_of_files_and_names_does_not_count(tiny_folder, tmp_path, family):
    base = tiny_folder(family)
    found = fingerprint(base, base)
    text_only = family in ("gemma3-text", "llama")
    assert set(found.parts) == {"language_model"} | (set() if text_only else {"vision_tower", "projector"})
    model = load_model(ModelConfig(path=str(base), dtype="float32")).model
    model.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(weight_files(tmp_path / "shards")) > 1
    assert fingerprint(tmp_path / "shards", base) == found
    model.save_pretrained(tmp_path / "names", save_original_format=False)
    assert fingerprint(tmp_path / "names", base) == found


@pytest.mark.parametrize(
    ("word", "part"),
    [("vision_tower", "vision_tower"), ("projector", "projector"), ("layers.1.mlp", "language_model")],
)
def test_one_bit_changes_its_part_alone(tiny_folder, tmp_path, word, part):
    base = tiny_folder("gemma3")
    shutil.copytree(base, tmp_path / "changed")
    file = tmp_path / "changed/model.safetensors"
    tensors = load_file(file)
    name = max(name for name in tensors if word in name and part.removesuffix("_tower") in name)
    tensors[name].view(-1).view(torch.int32)[-1] ^= 1
    save_file(tensors, file, metadata={"format": "pt"})
    before, after = fingerprint(base, base), fingerprint(tmp_path / "changed", base)
    assert after.differing(before.parts) == [part] and after.whole != before.whole


def test_another_type_or_shape_of_the_same_bytes_is_another_tensor(tiny_folder, tmp_path):
    empty = empty_model(tiny_folder("llama"))
    seen = set()
    for i, tensor in enumerate((torch.zeros(4, 2), torch.zeros(2, 4), torch.zeros(8, dtype=torch.int32))):
        save_file({"model.norm.weight": tensor}, tmp_path / f"{i}.safetensors")
        seen.add(weights_fingerprint([tmp_path / f"{i}.safetensors"], empty).whole)
    assert len(seen) == 3


def test_a_cut_file_is_told(tiny_folder, tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes((tiny_folder("llama") / "model.safetensors").read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="is not a whole safetensors file"):
        fingerprint(tmp_path, tiny_folder("llama"))


def test_data_files_are_known_by_every_byte(tmp_path):
    path = tmp_path / "rows.jsonl"
    data = bytearray(3 << 20)
    path.write_bytes(data)
    before = fingerprint_files([path])
    for place in (0, 2_000_001, len(data) - 1):
        changed = data.copy()
        changed[place] = 1
        path.write_bytes(changed)
        assert fingerprint_files([path]) != before


def test_very_large_files_are_sampled_all_over(tmp_path):
    path = tmp_path / "rows.parquet"
    path.write_bytes(bytes(100_000) + b"x" * 5_000_000)
    first, *others = sample_blocks(path, whole=100_000, num_blocks=100)
    assert first == bytes(100_000)
    assert len(others) == 100 and set(b"".join(others)) == {ord("x")}
