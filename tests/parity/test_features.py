"""Training on kept features is training with the frozen tower: the same loss, the same gradients."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from partwise.config import load_config
from partwise.families import CACHED_TYPES
from partwise.model.load import empty_model, load_model
from partwise.model.tower import find_cut, lacks_tower, read_tower, replace_tower
from partwise.training.fill import fill_cache
from partwise.training.job import Job
from partwise.training.step import accumulate_loss

FAMILIES = ("gemma3", "llava", "llava-next")
PARTS = {
    "projector": {"projector": "full"},
    "lora": {"projector": "full", "language_model": {"mode": "lora", "lora_rank": 2}},
    "full": {"projector": "full", "language_model": "full"},
}
# The tower sees other tiles together than a step would: its products may round otherwise.
TOLERANCE = {"float32": 1e-6, "bfloat16": 1e-2}
MakeJob = Callable[..., Job]


@pytest.fixture
def make_job(tmp_path: Path, tiny_folder: Callable[[str], Path], make_image: Callable) -> MakeJob:
    """A job over rows with no, one and two images of unlike shapes; the same rows for each call."""
    sizes = [(56, 56), (28, 56), (56, 28), (80, 30)]
    for i, size in enumerate(sizes):
        make_image(size, color=("red", "blue", "green", "black")[i]).save(tmp_path / f"{i}.png")
    images = [[], [0], [1, 2], [3], [2, 0], [1]]
    rows = [
        {
            "prompt": "<image>" * len(some) + "what is it?",
            "completion": "a disc " * (1 + i),
            "images": [f"{n}.png" for n in some],
        }
        for i, some in enumerate(images)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def make(family: str, dtype: str, parts: Any, cached: bool, packing: bool | None = None) -> Job:
        config = {
            "model": {"path": str(tiny_folder(family)), "dtype": dtype},
            "parts": parts,
            "data": {
                "train": str(tmp_path / "rows.jsonl"),
                "max_seq_len": 256,
                "num_workers": 0,
                "packing": packing,
                "feature_cache": str(tmp_path / "cache") if cached else None,
            },
            "train": {"steps": 1, "global_batch_size": 6, "micro_batch_size": 2},
            "output": str(tmp_path / "run"),
        }
        (tmp_path / "config.yaml").write_text(json.dumps(config))
        return Job(load_config(tmp_path / "config.yaml"))

    return make


def loss_and_gradients(job: Job) -> tuple[float, dict[str, torch.Tensor]]:
    fill_cache(job, Console(quiet=True))
    model = job.open_model().model
    assert lacks_tower(model) == (job.config.data.feature_cache is not None)
    loss = accumulate_loss(model, job.loader.load_step(0), job.device)
    return loss.item(), {n: p.grad.float() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_with_the_tower(
    make_job: MakeJob, family: str, dtype: str, parts: str, packing: bool
) -> None:
    loss, gradients = loss_and_gradients(make_job(family, dtype, PARTS[parts], False, packing))
    kept_loss, kept = loss_and_gradients(make_job(family, dtype, PARTS[parts], True, packing))
    tolerance = TOLERANCE[dtype]
    assert kept_loss == pytest.approx(loss, rel=tolerance)
    assert kept.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert (kept[name] - gradient).norm() <= tolerance * gradient.norm(), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_projector_is_given_the_same_numbers(
    tiny_folder: Callable[[str], Path], make_job: MakeJob, family: str, dtype: str
) -> None:
    """Bit for bit, where the tower sees the same tiles together: averaging ahead changes nothing."""
    settings = make_job(family, dtype, PARTS["projector"], False).config.model
    model, empty = load_model(settings).model, empty_model(settings.path)
    cut = find_cut(empty)
    assert cut is not None
    tower = read_tower(tiny_folder(family), empty, cut, getattr(torch, dtype), "sdpa")
    side = model.config.vision_config.image_size
    torch.manual_seed(0)
    pixels = torch.randn(3, 3, side, side).to(model.dtype)
    options = {}
    if family == "llava-next":
        pixels, options = pixels[None], {"image_sizes": torch.tensor([[28, 56]])}
    with torch.no_grad():
        wanted = model.base_model.get_image_features(pixels, **options).pooler_output
        features = cut.features(tower(pixel_values=pixels.flatten(0, -4), output_hidden_states=True))
        replace_tower(model, cut)
        found = model.base_model.get_image_features(
            features.view(*pixels.shape[:-3], *features.shape[1:]), **options
        ).pooler_output
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert features.numel() < pixels.numel() or family != "gemma3"


@pytest.mark.parametrize("family", ("qwen2-vl", "qwen2.5-vl", "llama"))
def test_other_types_have_no_cut(tiny_folder: Callable[[str], Path], family: str) -> None:
    assert find_cut(empty_model(tiny_folder(family))) is None


def test_every_type_that_is_said_to_be_cached_is_tried(tiny_folder: Callable[[str], Path]) -> None:
    types = {empty_model(tiny_folder(family)).config.model_type for family in FAMILIES}
    assert types == CACHED_TYPES.keys()
