"""A bench for all cases, and what each of them observed: every case runs once."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from bench import Bench, Row

# Before they are imported: a failed assert in a case then shows its values.
CASES = ("folders", "gradients", "losses", "models", "numbers", "parts", "pictures", "rows", "runs")
pytest.register_assert_rewrite("bench", *(f"cases_{name}" for name in CASES))


@pytest.fixture(scope="session")
def observe(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Callable[[Bench], Row]], Row]:
    from bench import Bench
    from write_comparison import run_case

    bench = Bench(tmp_path_factory.mktemp("bench"))
    return cache(lambda case: run_case(case, bench))
