"""Configs and data rows that are almost right: only a UserError may come out, soon, and nothing is written.

Each case starts from a sound config or row and is mutated a few times, the same way in every run.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from partwise.config import Config, load_config
from partwise.data.chat import ChatFormat
from partwise.data.sources import open_rows
from partwise.errors import UserError
from partwise.model.load import empty_model, load_model_config, load_processor, media_token_ids
from partwise.model.plan import resolve_plan
from partwise.records import Dropped, Example

CASES = 2500
FUZZ = settings(
    max_examples=CASES,
    derandomize=True,
    database=None,
    deadline=5000,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)

CONFIG = {
    "model": {"path": "m", "dtype": "float32", "attention": "sdpa"},
    "parts": {
        "vision_tower": {"mode": "lora", "lora_rank": 4, "lora_targets": "all", "layers": "-1:"},
        "projector": "full",
        "language_model": {"mode": "lora", "learning_rate": 1e-3, "lora_dropout": 0.0, "use_dora": False},
    },
    "data": {"train": ["a.jsonl", "b.json"], "eval": "c.parquet", "max_seq_len": 64, "overlong": "drop"},
    "train": {"epochs": 2.0, "global_batch_size": 8, "micro_batch_size": 2, "adam_betas": [0.9, 0.95]},
    "engine": "auto",
    "output": "o",
}
FLAGS = {"freeze_vision_tower": True, "freeze_multi_modal_projector": False, "finetuning_type": "lora"}
KEYS = [
    "path",
    "mode",
    "layers",
    "train",
    "steps",
    "warmup_steps",
    "lora_alpha",
    "learning_rate",
    "tools",
    "é",
]

MESSAGES = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "A cup."},
        {"role": "user", "content": "<image>\nAnd?"},
        {"role": "assistant", "content": "None.", "train": False},
    ],
    "images": ["red.png", {"path": "red.png", "bytes": None}],
}
SHAREGPT = {
    "conversations": [{"from": "human", "value": "<image>Which?"}, {"from": "gpt", "value": "Red."}],
    "image": "red.png",
}
PROMPT = {"prompt": "Which?", "completion": [{"role": "assistant", "content": "Red."}]}
# Values that a key takes, so that cases come through to the plan, where some of them do not fit.
LIKELY = {
    "layers": ["-1:", "-2:", "-5:", "2:", "0:1"],
    "mode": ["lora", "full", "frozen"],
    "projector": ["lora", "full", "frozen", {"mode": "full", "layers": "-1:"}],
    "vision_tower": ["lora", "full", "frozen", {"mode": "lora", "lora_targets": "mlp"}],
    "language_model": ["lora", "full", "frozen"],
    "lora_targets": ["attention", "mlp"],
    "finetuning_type": ["full", "freeze"],
}

ROW_WORDS = ["messages", "images", "image", "role", "content", "type", "text", "from", "train", "assistant"]

STRINGS = ("", " ", "\x00", "\ud800", "<image>", "<bos>", "<end_of_turn>", "{{ bos_token }}", "x" * 5000)
IMAGES = (
    "gone.png",
    "broken.png",
    "a\x00.png",
    "/",
    ".",
    "http://a/b.png",
    "data:,",
    "data:image/png;base64,é",
)
SETTINGS = ("-2:", "-5:", "1:", "2:1", ":", "1e400", "nan", "0x10", "full", "lora", "frozen", "mlp", "error")
odd_texts = st.one_of(st.text(max_size=8), *map(st.sampled_from, (STRINGS, IMAGES, SETTINGS)))
odd_values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 10),
    st.sampled_from(SETTINGS),
    st.sampled_from([10**30, -(10**30), 0.5, 1e-300, 1e300, float("inf"), float("-inf"), float("nan")]),
    odd_texts,
    st.lists(st.one_of(st.none(), st.integers(-1, 3), odd_texts), max_size=3),
    st.dictionaries(odd_texts, st.one_of(st.none(), odd_texts), max_size=2),
)


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path of every value inside."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in items:
        yield (*path, key)
        yield from places(child, (*path, key))


@st.composite
def mutated(draw: Callable, seeds: list[Any], words: list[str]) -> Any:
    """One of the seeds with one to three changes, each at any depth."""
    value = copy.deepcopy(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        paths = list(places(value))
        if not paths:
            return draw(odd_values)
        *above, last = draw(st.sampled_from(paths))
        home = value
        for key in above:
            home = home[key]
        change = draw(st.sampled_from(["replace", "replace", "remove", "add", "double", "wrap"]))
        if change == "replace":
            likely = draw(st.booleans()) and LIKELY.get(last)
            home[last] = copy.deepcopy(draw(st.sampled_from(likely))) if likely else draw(odd_values)
        elif change == "remove":
            del home[last]
        elif change == "wrap":
            home[last] = draw(st.sampled_from([[home[last]], {"a": home[last]}, [[home[last]] * 2]]))
        elif isinstance(home, list):
            home.insert(last, copy.deepcopy(home[last]) if change == "double" else draw(odd_values))
        else:
            name = draw(st.one_of(st.sampled_from(words), odd_texts))
            home[name] = copy.deepcopy(home[last]) if change == "double" else draw(odd_values)
    return value


@st.composite
def damaged(draw: Callable, text: str) -> str:
    """The text, most of the time as it is, else with a piece cut out or put in."""
    if draw(st.integers(0, 7)):
        return text
    start, length = draw(st.integers(0, len(text))), draw(st.integers(0, 5))
    piece = draw(
        st.sampled_from(["", "\t", "&a ", "*a", "!!int ", "{", "]", ": ", "\n", "'", "%", "\x07", "- ", "?"])
    )
    return text[:start] + piece + text[start + length :]


def listing(folder: Path) -> list[tuple[str, int]]:
    return sorted((str(path), path.stat().st_mtime_ns) for path in folder.rglob("*"))


@pytest.fixture(scope="module")
def meta_model(tiny_folder: Callable[[str], Path]) -> Any:
    return empty_model(str(tiny_folder("gemma3")))


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, which relative paths of the cases would be written to."""
    folder = tmp_path / "room"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def test_no_config_ends_in_another_error_than_the_users(room: Path, meta_model: Any) -> None:
    path = room.parent / "config.yaml"
    outcomes: dict[str, int] = {}

    seeds = [CONFIG, {key: CONFIG[key] for key in ("model", "data", "output")} | FLAGS]
    for seed in seeds:
        path.write_text(yaml.safe_dump(seed))
        resolve_plan(meta_model, load_config(path))

    @FUZZ
    @given(data=st.data())
    def run(data: st.DataObject) -> None:
        value = data.draw(mutated(seeds, KEYS))
        text = yaml.safe_dump(value, sort_keys=False, allow_unicode=True)
        path.write_bytes(data.draw(damaged(text)).encode("utf-8", "surrogatepass"))
        overrides = [] if data.draw(st.integers(0, 7)) else [data.draw(override_texts)]
        outcome = outcome_of(lambda: resolve(load_config(path, overrides)))
        outcomes[outcome] = outcomes.get(outcome, 0) + 1

    def resolve(config: Config) -> None:
        resolve_plan(meta_model, config)

    run()
    assert list(room.iterdir()) == []
    assert sum(outcomes.values()) >= CASES
    # A fuzz whose cases all fail at the first gate would test nothing behind it.
    assert outcomes["good"] > CASES / 50 and outcomes["ConfigError"] > CASES / 4, outcomes
    assert outcomes["PlanError"] > 5, outcomes


override_texts = st.one_of(
    st.text(max_size=12),
    st.builds(
        "{}={}".format,
        st.sampled_from(
            ["train.steps", "parts.projector", "parts.projector.mode", "parts", "a..b", "data.train.0"]
        ),
        odd_texts,
    ),
)


def outcome_of(call: Callable[[], object]) -> str:
    """ "good", or the name of the UserError, whose text must be one that can be shown."""
    try:
        call()
    except UserError as error:
        assert str(error).strip().encode()
        return type(error).__name__
    return "good"


def test_no_row_ends_in_another_error_than_the_users(
    room: Path, tiny_folder: Callable[[str], Path], make_image: Callable
) -> None:
    folder = tiny_folder("gemma3")
    processor = load_processor(folder)
    chat_format = ChatFormat(processor, media_token_ids(load_model_config(folder), processor), 64, "truncate")
    make_image().save(room / "red.png")
    (room / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n not a picture")
    before = listing(room)
    outcomes: dict[str, int] = {}

    @FUZZ
    @given(data=st.data())
    def run(data: st.DataObject) -> None:
        row = data.draw(mutated([MESSAGES, SHAREGPT, PROMPT], ROW_WORDS))
        text = data.draw(damaged(json.dumps(row)))
        name = data.draw(st.sampled_from(["rows.jsonl", "rows.json"]))
        path = room / name
        path.write_bytes((text if name == "rows.jsonl" else f"[{text}]").encode("utf-8", "surrogatepass"))
        outcome = outcome_of(lambda: examples(path))
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
        path.unlink()

    def examples(path: Path) -> None:
        rows = open_rows([path])
        results = [chat_format(rows[i]) for i in range(len(rows))]
        assert all(isinstance(result, Example | Dropped) for result in results)

    run()
    assert listing(room) == before
    assert sum(outcomes.values()) >= CASES
    assert outcomes["good"] > CASES / 20 and outcomes["DataError"] > CASES / 4, outcomes
