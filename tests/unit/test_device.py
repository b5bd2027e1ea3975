"""How much memory the host has left, as its system and its control group say."""

from __future__ import annotations

import sys

import pytest

from partwise.engine.device import group_memory_bytes, host_memory_bytes


def write_group(folder, limit: str) -> None:
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text("700\n")
    (folder / "memory.stat").write_text("anon 500\nfile 200\n")


def test_a_container_has_what_its_limit_leaves(tmp_path) -> None:
    assert group_memory_bytes(tmp_path) == sys.maxsize
    write_group(tmp_path, "1000")
    assert group_memory_bytes(tmp_path) == 500  # file pages go first
    write_group(tmp_path, "max")
    assert group_memory_bytes(tmp_path) == sys.maxsize


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_host_has_some_and_not_more_than_all() -> None:
    assert 1 << 20 < host_memory_bytes() < 1 << 50
