"""What all tests share: one thread, no hub, tiny models written once per session, and images."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

# The files that take longest begin first: two processes then end at about the same time.
LONGEST = (
    *("test_readme", "test_engines", "test_faults", "test_families", "test_chains", "test_ranks"),
    *("test_processes", "test_comparison", "test_zero", "test_stories", "test_verify", "test_speed"),
    *("test_benchmarks", "test_compile", "test_fuzz"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny model, by family; written on first use and shared, so copy it to change it."""
    folders: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in folders:
            from partwise.tiny import write_tiny

            folders[family] = write_tiny(family, tmp_path_factory.mktemp("tiny") / family)
        return folders[family]

    return folder


@pytest.fixture(scope="session")
def make_image() -> Callable[..., Image.Image]:
    """An RGB image with a coloured disc; the same arguments give the same pixels."""

    def make(size: tuple[int, int] = (56, 56), color: str = "red", background: str = "white") -> Image.Image:
        image = Image.new("RGB", size, background)
        width, height = size
        ImageDraw.Draw(image).ellipse((width // 4, height // 4, 3 * width // 4, 3 * height // 4), fill=color)
        return image

    return make
