"""load_config, dump_config, config_schema: the texts people read, the lines they name, and what is equal."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from partwise.config import Config, PartConfig, config_schema, dump_config, load_config
from partwise.config.reference import write_reference
from partwise.errors import ConfigError, PlanError

ROOT = Path(__file__).parents[2]
GOOD = """\
model: {path: models/tiny}
parts:
  vision_tower: frozen
  projector: {mode: full, learning_rate: 1e-4}
  language_model:
    mode: lora
    lora_rank: 8
    layers: "-12:"
data: {train: train.jsonl}
train: {global_batch_size: 8, micro_batch_size: 4, adam_betas: [0.9, 0.95]}
output: runs/a
"""


@pytest.fixture(autouse=True)
def _in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def load(text: str, *overrides: str) -> Config:
    Path("c.yaml").write_text(text)
    return load_config("c.yaml", overrides)


def faults(text: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(text, *overrides)
    return str(caught.value).splitlines()


def change(old: str, new: str) -> str:
    assert GOOD.count(old) == 1
    return GOOD.replace(old, new)


def test_values_and_places():
    config = load(GOOD, "train.steps=3")
    assert config.parts.vision_tower == "frozen"
    assert config.parts.settings("projector") == PartConfig(mode="full", learning_rate=1e-4)
    assert config.parts.settings("audio_tower") is None
    assert config.train.adam_betas == (0.9, 0.95)
    assert config.train.steps == 3
    assert config.expanded_flags is None
    places = {
        "model.path": "c.yaml:1",
        "parts.language_model.lora_rank": "c.yaml:7",
        "parts.language_model.lora_alpha": "c.yaml:5",
        "parts.audio_tower": "c.yaml:2",
        "train.adam_betas.1": "c.yaml:10",
        "train.steps": 'override "train.steps=3"',
        "engine": "c.yaml",
    }
    assert {key: config.where(key) for key in places} == places


def test_config_is_frozen():
    config = load(GOOD)
    with pytest.raises(ValueError, match="frozen"):
        config.output = "elsewhere"
    with pytest.raises(ValueError, match="frozen"):
        config.train.seed = 3


def test_all_faults_at_once_in_the_order_of_the_file():
    text = """\
model:
  path: 12
  dtyp: bfloat16
  trust_remote_code: yes
parts:
  projector:
    mode: ful
    learning_rate: -1
  language_model: {mode: full, lora_rank: 16, layers: 4}
  projecter: full
  audio_tower: [lora]
lora_rank: 3
learning_rate: 1e-4
data: {train: [], max_seq_len: 4.5}
train:
  micro_batch_size: 4
  micro_batch_size: 2
  adam_betas: [0.9]
  freeze_llm: true
  warp: 9
engine: zero4
"""
    assert faults(text) == [
        "c.yaml: output: missing. It must be given: The run folder. Relative to the working directory.",
        "c.yaml:2: model.path: 12 is not text; put it in quotes.",
        'c.yaml:3: model.dtyp: unknown key. Did you mean "dtype"?',
        'c.yaml:4: model.trust_remote_code: "yes" is not true or false.',
        'c.yaml:7: parts.projector.mode: "ful" is not one of frozen, lora, full. Did you mean "full"?',
        "c.yaml:8: parts.projector.learning_rate: -1 must be greater than 0.",
        "c.yaml:9: parts.language_model.layers: 4 is not a range of layers. "
        'Write a slice in quotes: "-12:" (the last twelve), ":4", "2:8".',
        'c.yaml:10: parts.projecter: unknown key. Did you mean "projector"?',
        'c.yaml:11: parts.audio_tower: ["lora"] is not one of frozen, lora, full.',
        'c.yaml:12: lora_rank: unknown key. It belongs under "parts.language_model:".',
        'c.yaml:13: learning_rate: unknown key. It belongs under "train:".',
        "c.yaml:14: data.max_seq_len: 4.5 is not a whole number.",
        "c.yaml:14: data.train: [] is too short: give 1 or more.",
        "c.yaml:16: train.micro_batch_size: written twice, here and in line 17. Keep one of them.",
        "c.yaml:18: train.adam_betas.1: missing. Write one value more.",
        "c.yaml:19: train.freeze_llm: unknown key. It belongs at the top level.",
        "c.yaml:20: train.warp: unknown key. The keys here are epochs, steps, global_batch_size, "
        "micro_batch_size, learning_rate, learning_rate_schedule, warmup_steps, min_learning_rate_fraction, "
        "weight_decay, adam_betas, adam_eps, optimizer_states, offload_optimizer, max_grad_norm, "
        "gradient_checkpointing, memory_limit, compile, seed, log_every, eval_every, save_every, keep_last, "
        "keep_best, verify.",
        'c.yaml:21: engine: "zero4" is not one of auto, single, ddp, fsdp, zero2, zero3. '
        'Did you mean "zero3"?',
    ]


@pytest.mark.parametrize("engine", ["auto", "single", "ddp", "zero3"])
def test_only_fsdp_offloads(engine):
    assert load(GOOD, "engine=fsdp", "train.offload_optimizer=true").train.offload_optimizer
    with pytest.raises(
        ConfigError, match=f"offload_optimizer: true beside engine: {engine}.*Write engine: fsdp"
    ):
        load(GOOD, f"engine={engine}", "train.offload_optimizer=true")


@pytest.mark.parametrize("engine", ["auto", "single", "ddp", "fsdp", "zero2", "zero3"])
def test_engines(engine):
    assert load(GOOD, f"engine={engine}").engine == engine


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (
            change("micro_batch_size: 4", "micro_batch_size: 9"),
            "c.yaml:10: train.micro_batch_size: 9 is more than train.global_batch_size (8). "
            "Lower the first or raise the second.",
        ),
        (
            change("{global_batch_size: 8, micro_batch_size: 4", "{global_batch_size: 2"),
            "c.yaml:10: train.micro_batch_size: 4 is more than train.global_batch_size (2). "
            "Lower the first or raise the second.",
        ),
        (
            change("train: {", "train: {steps: 5, warmup_steps: 5, "),
            "c.yaml:10: train.warmup_steps: 5 leaves nothing of train.steps (5). Warm up for fewer steps.",
        ),
        (
            change("train: {", "train: {eval_every: 5, "),
            "c.yaml:10: train.eval_every: 5 has no effect: there is no data.eval. Add it, or remove this.",
        ),
        (
            change("train: {", "train: {save_every: 5, keep_best: 1, "),
            "c.yaml:10: train.keep_best: 1 has no effect: there is no data.eval. Add it, or remove this.",
        ),
        (
            change("train: {", "train: {keep_best: 1, ").replace("data: {", "data: {eval: b.jsonl, "),
            "c.yaml:10: train.keep_best: 1 has no effect: there is no train.save_every. Add it, or remove "
            "this.",
        ),
        (
            change("train: {", "train: {learning_rate_schedule: constant, min_learning_rate_fraction: 0.5, "),
            "c.yaml:10: train.min_learning_rate_fraction: 0.5 has no effect: train.learning_rate_schedule is "
            "constant. Remove it, or choose cosine or linear.",
        ),
        (
            change("mode: lora", "mode: full"),
            "c.yaml:7: parts.language_model.lora_rank: 8 has no effect: language_model is trained in full, "
            "without adapters. Remove it, or change the mode.",
        ),
        (
            change("vision_tower: frozen", "vision_tower: {mode: frozen, layers: '-2:'}"),
            'c.yaml:3: parts.vision_tower.layers: "-2:" has no effect: vision_tower is frozen. '
            "Remove it, or change the mode.",
        ),
        (
            change("vision_tower: frozen", "vision_tower: {mode: lora, lora_dropout: 0.1}"),
            "c.yaml:3: parts.vision_tower.lora_dropout: 0.1 for vision_tower, 0.0 for language_model; "
            "an adapter folder holds one value for all parts. Write the same for each.",
        ),
        (
            change("vision_tower: frozen", "vision_tower: {mode: full, quantization: nf4}"),
            "c.yaml:3: parts.vision_tower.quantization: nf4 beside mode full: an update is far smaller than "
            "the steps between 4-bit weights, so they cannot train. Set parts.vision_tower.mode: lora, or "
            "remove parts.vision_tower.quantization.",
        ),
        (
            change("vision_tower: frozen", "vision_tower: {mode: frozen, double_quantization: false}"),
            "c.yaml:3: parts.vision_tower.double_quantization: false has no effect: vision_tower is not "
            "quantised. Remove it, or set parts.vision_tower.quantization: nf4.",
        ),
        (
            change("{mode: full, learning_rate: 1e-4}", "{mode: lora, quantization: nf4}"),
            "c.yaml:4: parts.projector.quantization: nf4: a projector is too small to gain anything, and "
            "everything the model sees passes through it. Remove it.",
        ),
    ],
)
def test_rules_between_keys(text, fault):
    assert faults(text) == [fault]


@pytest.mark.parametrize("name", ["lora_dropout=0.1", "use_rslora=true", "use_dora=true"])
def test_adapters_must_agree(name):
    overrides = ["parts.vision_tower=lora", f"parts.language_model.{name}"]
    (fault,) = faults(GOOD, *overrides)
    assert fault.startswith(f'override "{overrides[1]}": parts.language_model.{name.partition("=")[0]}: ')
    load(GOOD, *overrides, f"parts.vision_tower.{name}")


def test_every_adapter_setting_needs_mode_lora():
    lora_only = [name for name in PartConfig.model_fields if name.startswith(("lora_", "use_"))]
    assert len(lora_only) == 6
    values = {"lora_rank": 4, "lora_alpha": 4, "lora_dropout": 0.0, "lora_targets": "mlp"}
    for name in lora_only:
        (fault,) = faults(GOOD, f"parts.projector.{name}={values.get(name, 'false')}")
        assert f"parts.projector.{name}" in fault
        assert "has no effect" in fault


def test_rules_are_checked_beside_wrong_values():
    text = change("micro_batch_size: 4", "micro_batch_size: 9").replace("mode: full", "mode: ful")
    assert [fault.split(": ")[1] for fault in faults(text)] == [
        "parts.projector.mode",
        "train.micro_batch_size",
    ]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("1e-4", 1e-4),
        ("1E-4", 1e-4),
        ("1.e-4", 1e-4),
        ("2.5e-5", 2.5e-5),
        (".5", 0.5),
        ("1", 1.0),
        ("1_0", 10.0),
    ],
)
def test_numbers(value, expected):
    assert load(change("1e-4", value)).parts.projector.learning_rate == expected
    assert load(GOOD, f"train.learning_rate={value}").train.learning_rate == expected


@pytest.mark.parametrize("value", ['"1e-4"', ".inf", ".nan", "true", "1:30", "abc", "null"])
def test_what_is_no_rate(value):
    assert len(faults(GOOD, f"train.learning_rate={value}")) == 1


def test_words_and_times_stay_text():
    """YAML 1.1 would make these a boolean, a number in base 60, an octal number and a date."""
    for text in ("on", "no", "010", "2026-01-02"):
        assert load(GOOD, f"output={text}").output == text
    assert load(change('"-12:"', "4:12")).parts.language_model.layers == "4:12"


@pytest.mark.parametrize("layers", ["-12:", ":4", "2:8", "-4:-2", ":-1"])
def test_layer_ranges(layers):
    assert load(GOOD, f"parts.language_model.layers={layers}").parts.language_model.layers == layers


@pytest.mark.parametrize("layers", ["12", ":", "::2", "a:b", "[1, 2]", "1,2:"])
def test_what_is_no_layer_range(layers):
    (fault,) = faults(GOOD, f"parts.language_model.layers={layers}")
    assert "is not a range of layers" in fault


def test_overrides_set_replace_and_open_shorthands():
    config = load(
        GOOD,
        "parts.vision_tower.mode=full",
        "parts.language_model={mode: lora, lora_rank: 4}",
        "data.train=[a.jsonl, b.jsonl]",
        "data.eval=c.jsonl",
        "train.steps=2",
        "train.steps=",
    )
    assert config.parts.vision_tower == PartConfig(mode="full")
    assert config.parts.language_model == PartConfig(mode="lora", lora_rank=4)
    assert config.data.train_files == ["a.jsonl", "b.jsonl"]
    assert config.data.eval_files == ["c.jsonl"]
    assert config.train.steps is None
    assert config.where("parts.language_model.lora_rank").startswith('override "parts.language_model={')
    assert (
        load(change("projector: {mode: full, learning_rate: 1e-4}", "projector: lora"), "output=b=c").output
        == "b=c"
    )


def test_overrides_that_fit_nowhere():
    assert faults(
        GOOD, "foo", "train.steps.x=2", "train.lerning_rate=1", "train.seed=-1", "model.path=["
    ) == [
        "override \"model.path=[\":1: this is not YAML: expected the node content, but found '<stream end>'. "
        "Look at indentation, colons and quotes here and above."
    ]
    assert faults(GOOD, "foo", "data.train.x=2", "train.lerning_rate=1", "train.seed=-1") == [
        'override "foo": an override is key.path=value, such as train.steps=100.',
        'override "data.train.x=2": data.train has no keys of its own. Override data.train itself.',
        'override "train.lerning_rate=1": train.lerning_rate: unknown key. Did you mean "learning_rate"?',
        'override "train.seed=-1": train.seed: -1 must be at least 0.',
    ]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "c.yaml:1: the file is empty. A config needs at least model, parts, data and output."),
        (
            b"# nothing\n",
            "c.yaml:1: the file is empty. A config needs at least model, parts, data and output.",
        ),
        (b"- a\n", "c.yaml:1: the top level is a list. A config is keys and values, such as output: runs/a."),
        (
            b"# c\nabc",
            "c.yaml:2: the top level is a single value. A config is keys and values, such as output: runs/a.",
        ),
        (b"a: 1\nb: c: d\n", "c.yaml:2: this is not YAML: mapping values are not allowed here. "),
        (b"a: [1\n", "c.yaml:2: this is not YAML: expected ',' or ']', but got '<stream end>'. "),
        (b"a: \x01", "c.yaml: this is not YAML: unacceptable character #x0001: "),
        (b"a: \xff", "c.yaml: not a text file in UTF-8 (byte 3). Give a YAML file."),
        (b"a: &a [*a]", "c.yaml: an alias (*name) refers to itself. Write the value out instead."),
        (b"a: " + b"[" * 5000, "c.yaml: this is not a config: values are nested too deeply."),
        (b"a: 1\n---\nb: 2\n", "c.yaml:2: this is not YAML: but found another document. "),
    ],
)
def test_files_that_are_no_config(content, text):
    Path("c.yaml").write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config("c.yaml")
    assert str(caught.value).startswith(text)


def test_files_that_are_not_there():
    with pytest.raises(ConfigError, match=r"^no\.yaml: there is no such config file \(looked in /"):
        load_config("no.yaml")
    with pytest.raises(ConfigError, match=r"^\.: cannot be read: Is a directory\. Give a YAML file\.$"):
        load_config(".")


def test_sections_that_are_none():
    assert faults("model:\nparts: full\ntrain: 3\noutput: a\n[a]: 1\n") == [
        "c.yaml: data: missing. It must be given: The rows, and how long an example may be.",
        "c.yaml: top level: line 5: a key is one word.",
        "c.yaml:1: model: is empty. Write its keys on indented lines below it, or remove it.",
        'c.yaml:2: parts: "full" is not a section; write its keys on indented lines below it.',
        "c.yaml:3: train: 3 is not a section; write its keys on indented lines below it.",
    ]


def test_tags_are_refused():
    assert faults(change("1e-4", "!!python/name:os.system 1"))[0].startswith(
        'c.yaml:4: parts.projector.learning_rate: cannot read "1" as tag:yaml.org,2002:python/name:os.system.'
    )


ALL_FROZEN = "parts: {vision_tower: frozen, projector: frozen, language_model: frozen}"


@pytest.mark.parametrize(
    ("parts", "places"),
    [
        ("parts:\n  vision_tower: frozen\n  projector: frozen\n  language_model: frozen", "c.yaml:5-7"),
        ("parts:\n  vision_tower: frozen\n\n  language_model: {mode: frozen}", "c.yaml:5, c.yaml:7"),
        (ALL_FROZEN, "c.yaml:4"),
        ("parts: {}", "c.yaml:4"),
    ],
)
def test_nothing_would_train(parts, places):
    with pytest.raises(PlanError) as caught:
        load(f"model: {{path: m}}\ndata: {{train: a}}\noutput: o\n{parts}\n")
    assert str(caught.value) == (
        f"nothing would train: vision_tower, projector and language_model are all frozen ({places}). "
        "The usual recipe keeps the vision tower frozen and opens the other two: "
        "parts: {vision_tower: frozen, projector: full, language_model: lora}."
    )


def test_nothing_would_train_by_override():
    with pytest.raises(PlanError, match=r'\(c\.yaml:4, override "parts\.projector=frozen"\)'):
        load(f"model: {{path: m}}\ndata: {{train: a}}\noutput: o\n{ALL_FROZEN}\n", "parts.projector=frozen")


@pytest.mark.parametrize(
    "text", ["1e5", "on", "010", "null", "-12:", "a: b", "ü # x", "2026-01-02", "1:30", " a\n"]
)
def test_dump_reads_back_equal(text):
    first = load(GOOD, "parts.vision_tower={mode: lora, lora_rank: 16}", "train.learning_rate=1e-4")
    first = first.model_copy(update={"output": text})
    Path("dumped.yaml").write_text(dump_config(first), encoding="utf-8")
    again = load_config("dumped.yaml")
    assert again == first
    assert dump_config(again) == dump_config(first)
    assert again != load(GOOD)


def test_dump_writes_out_defaults():
    dumped = dump_config(load(GOOD))
    assert "learning_rate_schedule: cosine\n" in dumped
    assert "max_seq_len: 4096\n" in dumped


@pytest.mark.parametrize("path", sorted((ROOT / "examples").rglob("*.yaml")), ids=lambda path: path.name)
def test_examples_load_and_read_back(path):
    config = load_config(path)
    Path("dumped.yaml").write_text(dump_config(config))
    assert load_config("dumped.yaml") == config


def test_schema_has_the_flags_and_every_key_explains_itself():
    schema = config_schema()
    assert schema["required"] == ["model", "data", "output"]
    assert schema["additionalProperties"] is False
    assert {"parts", "freeze_llm", "finetuning_type"} <= schema["properties"].keys()
    keys = [schema["properties"], *(section["properties"] for section in schema["$defs"].values())]
    assert [name for section in keys for name, field in section.items() if not field.get("description")] == []


def test_reference_is_current():
    written = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    assert written == write_reference(config_schema()), "run: python -m partwise.config > docs/config.md"


def test_import_is_light():
    heavy = "torch transformers peft pyarrow numpy PIL rich typer"
    code = (
        f"import sys, partwise.config; sys.exit(str([m for m in {heavy.split()} if m in sys.modules] or 0))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stderr.strip() in ("", "0"), done.stderr


def test_a_text_that_no_file_can_hold_is_a_fault():
    for escape, shown in ((r"\0", r"\x00"), (r"\ud800", r"\ud800")):
        assert faults(change("runs/a", f'"runs/{escape}a"')) == [
            rf"c.yaml:11: output: 'runs/{shown}a' holds '{shown}'. Write it without."
        ]
    key = r"c.yaml: top level: 'out\x00put' holds '\x00'. Write it without."
    assert key in faults(change("output:", r'"out\0put":'))
    assert faults(GOOD, "output=\ud800") == [
        r"""override "output=?": output=?: 'output=\ud800' holds '\ud800'. Write it without."""
    ]
