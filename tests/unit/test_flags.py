"""The freeze flags: the whole table, what contradicts, and flags beside `parts`."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from partwise.config import Config, load_config
from partwise.config.flags import FLAGS, check_flags, expand_flags
from partwise.errors import ConfigError, PlanError

BASE = "model: {path: m}\ndata: {train: a}\noutput: o\n"  # three lines: the flags start in line 4


@pytest.fixture(autouse=True)
def _in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def load(*lines: str) -> Config:
    Path("c.yaml").write_text(BASE + "\n".join(lines))
    return load_config("c.yaml")


def faults(*lines: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(*lines)
    return str(caught.value).splitlines()


def modes(config: Config) -> str:
    """Modes of vision tower, projector and language model, such as "- full lora"."""
    settings = [config.parts.settings(part) for part in ("vision_tower", "projector", "language_model")]
    return " ".join("-" if s is None or s.mode == "frozen" else s.mode for s in settings)


VISION, PROJECTOR, LANGUAGE = "freeze_vision_tower", "freeze_multi_modal_projector", "freeze_language_model"
TABLE = {
    (): ("- - full", "- - lora"),
    (f"{VISION}: true", f"{PROJECTOR}: true", f"{LANGUAGE}: false"): ("- - full", "- - lora"),
    (f"{PROJECTOR}: false",): ("- full full", "- full lora"),
    (f"{VISION}: true", f"{PROJECTOR}: false", f"{LANGUAGE}: false"): ("- full full", "- full lora"),
    (f"{PROJECTOR}: false", f"{LANGUAGE}: true"): ("- full -", "- full -"),
    (f"{PROJECTOR}: false", "freeze_llm: true"): ("- full -", "- full -"),
    ("train_mm_proj_only: true",): ("- full -", "- full -"),
    ("train_mm_proj_only: true", f"{VISION}: true", f"{PROJECTOR}: false", "freeze_llm: true"): (
        "- full -",
        "- full -",
    ),
    (f"{VISION}: false", f"{PROJECTOR}: false"): ("full full full", "lora full lora"),
    (f"{VISION}: false", f"{PROJECTOR}: false", "freeze_llm: false"): ("full full full", "lora full lora"),
    (f"{VISION}: false", "freeze_llm: true"): ("full - -", "lora - -"),
}


@pytest.mark.parametrize("flags", TABLE, ids=lambda flags: " ".join(flags) or "none")
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_table(flags, kind):
    config = load(*flags, f"finetuning_type: {kind}")
    assert modes(config) == TABLE[flags][kind == "lora"]


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("language", [LANGUAGE, "freeze_llm"])
def test_all_three_frozen(kind, language):
    with pytest.raises(PlanError) as caught:
        load(f"{VISION}: true", f"{PROJECTOR}: true", f"{language}: true", f"finetuning_type: {kind}")
    assert str(caught.value) == (
        "nothing would train: vision_tower, projector and language_model are all frozen "
        "(c.yaml:4-6). The usual "
        "recipe keeps the vision tower frozen and opens the other two: freeze_vision_tower: true, "
        "freeze_multi_modal_projector: false, freeze_language_model: false, finetuning_type: lora."
    )


def test_frozen_language_model_leaves_nothing_by_default():
    with pytest.raises(PlanError, match=r"are all frozen \(c\.yaml:4\)"):
        load("freeze_llm: true")


def test_a_part_is_named_only_where_written_or_open():
    assert expand_flags({"finetuning_type": "lora"}) == {"language_model": "lora"}
    assert expand_flags({"train_mm_proj_only": True}) == {"projector": "full"}
    assert expand_flags({VISION: True, "finetuning_type": "full"}) == {
        "vision_tower": "frozen",
        "language_model": "full",
    }


def test_expansion_never_depends_on_order_and_never_writes_into_the_flags():
    flags = {VISION: False, PROJECTOR: False, "finetuning_type": "lora"}
    expected = expand_flags(flags)
    for order in itertools.permutations(flags.items()):
        assert expand_flags(dict(order)) == expected
    assert list(flags) == [VISION, PROJECTOR, "finetuning_type"]


@pytest.mark.parametrize(("lines", "layers"), [((), "-2:"), (("3",), "-3:"), (("-3",), ":3")])
def test_layers_of_the_language_model(lines, layers):
    config = load("finetuning_type: freeze", *(f"freeze_trainable_layers: {line}" for line in lines))
    assert modes(config) == "- - full"
    assert config.parts.settings("language_model").layers == layers


def test_freeze_opens_a_vision_tower_in_full():
    assert (
        modes(load("finetuning_type: freeze", f"{VISION}: false", f"{PROJECTOR}: false")) == "full full full"
    )


def test_places_and_text_of_the_expansion():
    config = load(f"{VISION}: true", f"{PROJECTOR}: false", "finetuning_type: lora")
    assert config.where("parts.vision_tower.mode") == "c.yaml:4"
    assert config.where("parts.projector") == "c.yaml:5"
    assert config.where("parts.language_model") == "c.yaml:6"
    assert config.where("parts.audio_tower") == "c.yaml:4"
    assert config.where(VISION) == "c.yaml:4"
    assert config.expanded_flags == (
        "The freeze flags (c.yaml:4-6) stand for\n"
        "parts:\n  vision_tower: frozen\n  projector: full\n  language_model: lora"
    )
    assert load("train_mm_proj_only: true").where("parts.projector") == "c.yaml:4"


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (
            ("train_mm_proj_only: true", f"{PROJECTOR}: true"),
            "c.yaml:4: train_mm_proj_only: true trains the projector alone, but "
            "freeze_multi_modal_projector: true (c.yaml:5) freezes it. Remove one of them.",
        ),
        (
            (f"{LANGUAGE}: false", "train_mm_proj_only: true"),
            "c.yaml:5: train_mm_proj_only: true trains the projector alone, but "
            "freeze_language_model: false (c.yaml:4) opens language_model. Remove one of them.",
        ),
        (
            ("train_mm_proj_only: true", "freeze_llm: false"),
            "c.yaml:4: train_mm_proj_only: true trains the projector alone, but "
            "freeze_llm: false (c.yaml:5) opens language_model. Remove one of them.",
        ),
        (
            ("train_mm_proj_only: true", f"{VISION}: false"),
            "c.yaml:4: train_mm_proj_only: true trains the projector alone, but "
            "freeze_vision_tower: false (c.yaml:5) opens vision_tower. Remove one of them.",
        ),
        (
            ("finetuning_type: lora", "freeze_llm: false", f"{LANGUAGE}: false"),
            "c.yaml:5: freeze_llm is another name of freeze_language_model, which is written too (c.yaml:6). "
            "Keep one of them.",
        ),
        (
            ("freeze_llm: true", "finetuning_type: freeze"),
            "c.yaml:5: finetuning_type: freeze trains layers of the language model, but freeze_llm: true "
            "(c.yaml:4) freezes all of it. Remove one of them.",
        ),
        (
            ("finetuning_type: freeze", "train_mm_proj_only: true"),
            "c.yaml:4: finetuning_type: freeze trains layers of the language model, but "
            "train_mm_proj_only: true "
            "(c.yaml:5) freezes all of it. Remove one of them.",
        ),
        (
            ("freeze_trainable_layers: 2", "finetuning_type: lora"),
            "c.yaml:4: freeze_trainable_layers works only with finetuning_type: freeze, but "
            "finetuning_type: lora (c.yaml:5). Change one of them.",
        ),
        (
            ("train_mm_proj_only: true", "freeze_trainable_layers: 2"),
            "c.yaml:5: freeze_trainable_layers works only with finetuning_type: freeze, but "
            "finetuning_type is not written. Change one of them.",
        ),
        (
            (f"{VISION}: false",),
            "c.yaml:4: finetuning_type is missing: the freeze flags open vision_tower and "
            "language_model, and "
            "nothing says how they train. Write finetuning_type: lora or finetuning_type: full.",
        ),
        (
            (f'{VISION}: "true"', "finetuning_type: full"),
            'c.yaml:4: freeze_vision_tower: "true" is not true or false.',
        ),
        (("train_mm_proj_only: 1",), "c.yaml:4: train_mm_proj_only: 1 is not true or false."),
        (("freeze_llm:", "finetuning_type: full"), "c.yaml:4: freeze_llm: null is not true or false."),
        (
            ("finetuning_type: freeze", "freeze_trainable_layers: 0"),
            "c.yaml:5: freeze_trainable_layers: 0 trains no layer. 2 means the last two layers, -2 "
            "the first two.",
        ),
        (
            ("finetuning_type: freeze", "freeze_trainable_layers: true"),
            "c.yaml:5: freeze_trainable_layers: true is not a whole number.",
        ),
        (
            ("finetuning_type: Lora",),
            'c.yaml:4: finetuning_type: "Lora" is not one of full, lora, freeze. Did you mean "lora"?',
        ),
        (
            ("freeze_vison_tower: true", "finetuning_type: lora"),
            'c.yaml:4: freeze_vison_tower: unknown key. Did you mean "freeze_vision_tower"?',
        ),
        (
            (),
            "c.yaml: parts: missing, so nothing says what trains. The usual recipe is "
            "parts: {vision_tower: frozen, projector: full, language_model: lora}.",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_faults(lines, expected):
    assert faults(*lines) == [expected]


def test_faults_of_flags_come_with_all_others():
    lines = faults("train_mm_proj_only: true", f"{PROJECTOR}: true", "train: {steps: 0}")
    assert [line.partition(": ")[0] for line in lines] == ["c.yaml:4", "c.yaml:6"]


def test_flags_beside_parts_that_mean_the_same():
    config = load(
        f"{PROJECTOR}: false",
        "finetuning_type: lora",
        "parts: {projector: {mode: full, learning_rate: 1e-4}, language_model: {mode: lora, lora_rank: 4}}",
    )
    assert config.parts.settings("language_model").lora_rank == 4
    assert config.where("parts.projector") == "c.yaml:6"
    assert config.expanded_flags is None


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (
            (f"{PROJECTOR}: true", "finetuning_type: lora", "parts: {projector: full, language_model: lora}"),
            f"c.yaml:4: the freeze flags ({PROJECTOR}, finetuning_type) mean parts.projector: frozen, "
            "but parts (c.yaml:6) means full. "
            "Remove the flags, or parts.",
        ),
        (
            ("finetuning_type: full", "parts: {language_model: lora}"),
            "c.yaml:4: the freeze flags (finetuning_type) mean parts.language_model: full, "
            "but parts (c.yaml:5) means lora. "
            "Remove the flags, or parts.",
        ),
        (
            (f"{VISION}: false", "finetuning_type: lora", "parts: {language_model: lora}"),
            f"c.yaml:4: the freeze flags ({VISION}, finetuning_type) mean parts.vision_tower: lora, "
            "but parts (c.yaml:6) means frozen. "
            "Remove the flags, or parts.",
        ),
        (
            ("finetuning_type: freeze", "parts: {language_model: full}"),
            "c.yaml:4: the freeze flags (finetuning_type) mean parts.language_model: full, layers -2:, "
            "but parts (c.yaml:5) means full. Remove the flags, or parts.",
        ),
    ],
)
def test_flags_beside_parts_that_mean_something_else(lines, expected):
    assert faults(*lines) == [expected]


def test_a_wrong_mode_beside_flags_is_one_fault():
    assert faults("finetuning_type: full", "parts: {language_model: ful}") == [
        'c.yaml:5: parts.language_model: "ful" is not one of frozen, lora, full. Did you mean "full"?'
    ]


def every_combination():
    booleans = [name for name, schema in FLAGS.items() if schema["type"] == "boolean"]
    for values in itertools.product((None, True, False), repeat=len(booleans)):
        for kind in (None, "full", "lora", "freeze"):
            flags = {name: value for name, value in zip(booleans, values, strict=True) if value is not None}
            flags |= {"finetuning_type": kind} if kind else {}
            if flags:
                yield flags


def test_every_combination_contradicts_or_does_what_each_flag_says():
    accepted = 0
    for flags in every_combination():
        if check_flags(flags, lambda key: key):
            continue
        accepted += 1
        opened = {part for part, setting in expand_flags(flags).items() if setting != "frozen"}
        said = {VISION: "vision_tower", PROJECTOR: "projector", LANGUAGE: "language_model"}
        for flag, part in {**said, "freeze_llm": "language_model"}.items():
            if flag in flags:
                assert (part in opened) is not flags[flag], flags
        if flags.get("train_mm_proj_only"):
            assert opened == {"projector"}, flags
    assert accepted > 100
