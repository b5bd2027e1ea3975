"""The check of the model folder: what it refuses, what it warns of, and that right folders pass."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoProcessor

from partwise.config import load_config
from partwise.preflight import Context, collect_findings
from partwise.preflight.model import check_model
from partwise.records import Finding
from partwise.training.job import Job

FAMILIES = ("gemma3", "gemma3-text", "llava", "llava-next", "qwen2-vl", "qwen2.5-vl", "llama")


def findings_of(model: Path, folder: Path) -> list[Finding]:
    config = folder / "config.yaml"
    config.write_text(
        f"model: {{path: {model}}}\nparts: {{language_model: full}}\ndata: {{train: a.jsonl}}\noutput: o\n"
    )
    return collect_findings(Context(Job(load_config(config))), [check_model])


@pytest.fixture
def copied(tiny_folder: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_folder("gemma3"), tmp_path / "model"))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_folder_is_one_line(tiny_folder, tmp_path, family) -> None:
    (finding,) = findings_of(tiny_folder(family), tmp_path)
    assert finding.level == "info" and "tensors in its files" in finding.message


def test_tokens_that_were_added_without_rows_are_refused(copied, tmp_path) -> None:
    processor = AutoProcessor.from_pretrained(copied)
    num_free = 512 - len(processor.tokenizer)
    processor.tokenizer.add_tokens([f"[new{i}]" for i in range(num_free)])
    processor.save_pretrained(copied)
    assert [finding.level for finding in findings_of(copied, tmp_path)] == ["info"]
    processor.tokenizer.add_tokens([f"[more{i}]" for i in range(4)])
    processor.save_pretrained(copied)
    (finding,) = findings_of(copied, tmp_path)
    assert finding.level == "error" and "4 of the tokenizer's 516 tokens" in finding.message
    assert '"[more0]" (512), "[more1]" (513), "[more2]" (514) and 1 more' in finding.message


def test_an_image_token_beyond_the_rows_needs_none(copied, tmp_path) -> None:
    """As in models whose image token was added after the vocabulary was closed."""
    processor = AutoProcessor.from_pretrained(copied)
    processor.tokenizer.add_tokens([f"[new{i}]" for i in range(512 - len(processor.tokenizer))])
    processor.tokenizer.add_special_tokens({"additional_special_tokens": ["[image]"]})
    processor.save_pretrained(copied)
    config = json.loads((copied / "config.json").read_text())
    assert [finding.level for finding in findings_of(copied, tmp_path)] == ["error"]
    (copied / "config.json").write_text(json.dumps({**config, "image_token_index": 512}))
    assert [finding.level for finding in findings_of(copied, tmp_path)] == ["info"]


@pytest.mark.parametrize(("own", "inner"), [(False, True), (True, False)])
def test_a_tie_that_is_said_twice_and_differently_is_a_warning(copied, tmp_path, own, inner) -> None:
    config = json.loads((copied / "config.json").read_text())
    config["text_config"]["tie_word_embeddings"] = inner
    (copied / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": own}))
    first, second = findings_of(copied, tmp_path)
    assert (first.level, second.level) == ("info", "warning")
    assert f"is {str(own).lower()}, and {str(inner).lower()} in text_config" in second.message
    del config["text_config"]["tie_word_embeddings"]
    (copied / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": own}))
    assert len(findings_of(copied, tmp_path)) == 1
