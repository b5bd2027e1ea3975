"""Each line of the comparison happens as it says, plain and in Partwise, and the page is current."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from write_comparison import CASES, SHORT, page, short_table

ROOT = Path(__file__).parents[2]
FINGERPRINT = re.compile(r"\b[0-9a-f]{12}\b")
# A measured number. Not a version, which has more points.
NUMBER = re.compile(r"(?<![\w.])-?\d+\.\d+(?![\w.]*\d)")


def test_numbers_are_told_from_versions_and_counts():
    assert NUMBER.findall("6.32, not 6.29. With 5.23.0: 18 of 55, 86.9 % at lr 1e-5, train.jsonl:7 1.") == [
        "6.32",
        "6.29",
        "86.9",
    ]


def test_another_number_or_word_is_seen():
    assert_same("a loss of 6.30 (fingerprint 5e224e3bec10)", "a loss of 6.31 (fingerprint aaae8d17d22e)")
    for other in ("a loss of 5.30 (fingerprint 5e224e3bec10)", "a gain of 6.30 (fingerprint 5e224e3bec10)"):
        with pytest.raises(AssertionError):
            assert_same("a loss of 6.30 (fingerprint 5e224e3bec10)", other)


@pytest.mark.parametrize("case", CASES, ids=[case.__name__ for case in CASES])
def test_it_happens(case, observe):
    """The case itself asserts what happens; what it tells must be fit for a table."""
    row = observe(case)
    for cell in (row.situation, row.plain, row.partwise):
        assert cell.strip() == cell and cell.endswith(".") and "\n" not in cell
        assert cell.count("`") % 2 == 0
    assert "`" not in row.message and "\n" not in row.message and "/tmp" not in row.message


def assert_same(written: str, now: str) -> None:
    """Equal but for measured numbers and fingerprints, which may differ from machine to machine."""
    written, now = (FINGERPRINT.sub("fingerprint", text) for text in (written, now))
    assert NUMBER.sub("#", written) == NUMBER.sub("#", now)
    old, new = ([float(number) for number in NUMBER.findall(text)] for text in (written, now))
    assert new == pytest.approx(old, rel=0.05, abs=0.02)


def test_the_page_is_current(observe):
    """If not: python tests/others/write_comparison.py > docs/comparison.md"""
    assert_same((ROOT / "docs/comparison.md").read_text(), page(observe))


def test_the_short_table_is_current(observe):
    """If not: python tests/others/write_comparison.py --short, into README.md between the markers."""
    table = short_table(observe)
    assert table.count("\n") == 2 + len(SHORT)
    after_start = (ROOT / "README.md").read_text().partition("<!-- comparison:start -->")[2]
    written = after_start.partition("<!-- comparison:end -->")[0].strip()
    if not written:
        pytest.skip("README.md has no comparison")
    assert_same(written, table.strip())
