"""Stages before anything trains: what is refused, the configs they stand for, and when a loss is at rest."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from partwise.config import Config, StableConfig, dump_config, load_config
from partwise.config.expand import stage_configs, whole_config
from partwise.engine.ranks import Ranks
from partwise.errors import ConfigError, PlanError
from partwise.model.parts import resolve_plan
from partwise.records import StepMetrics
from partwise.training.optim import Optimizer
from partwise.training.span import Finished, StageSpan, finished_stages
from partwise.training.stability import Ending, relative_slope, relative_spread

HEAD = """\
model: {path: m}
parts: {vision_tower: full, projector: full, language_model: full}
data: {train: a.jsonl}
train: {global_batch_size: 4, warmup_steps: 2}
output: o
"""
STAGES = """\
stages:
  - {parts: [projector], steps: 3, learning_rate: 1e-3}
  - name: top
    parts:
      projector: full
      vision_tower: frozen
      language_model: {layers: "-2:", learning_rate: 1e-5}
    until: {window: 4, max_steps: 8}
    learning_rate: 1e-4
  - {parts: [vision_tower, language_model], epochs: 1.5, data: {train: [b.jsonl], max_seq_len: 64}}
"""
ROOT = Path(__file__).parents[2]
LAYERS, STEPS_PER_EPOCH = 5, 10


def load(text: str) -> Config:
    Path("c.yaml").write_text(text)
    return load_config("c.yaml")


def expand(config: Config) -> list:
    return stage_configs(config, lambda part: LAYERS, lambda data: STEPS_PER_EPOCH)


def fault(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        expand(load(text))
    return str(caught.value)


@pytest.fixture(autouse=True)
def _in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def settings(stage, part: str) -> tuple:
    found = stage.config.parts.settings(part)
    return found.mode, found.layers, found.learning_rate


def test_stages_are_ordinary_configs():
    config = load(HEAD + STAGES)
    projector, top, last = expand(config)
    assert [stage.name for stage in (projector, top, last)] == [
        "projector",
        "top",
        "vision_tower + language_model",
    ]
    assert [stage.config.train.steps for stage in (projector, top, last)] == [3, 8, 15]
    assert settings(projector, "projector") == ("full", None, 1e-3)
    assert settings(projector, "language_model") == ("frozen", None, None)
    assert settings(top, "projector") == ("full", None, 1e-4)
    assert settings(top, "language_model") == ("full", "-2:", 1e-5)
    assert settings(top, "vision_tower") == ("frozen", None, None)
    # Nobody knows where a stage with until ends, so the rate does not fall towards it.
    assert top.until == StableConfig(window=4, max_steps=8)
    assert [stage.config.train.learning_rate_schedule for stage in (projector, top)] == ["cosine", "constant"]
    assert last.config.data.train_files == ["b.jsonl"] and last.config.data.max_seq_len == 64
    assert all(stage.config.stages is None for stage in (projector, top, last))
    whole = whole_config(config, [projector, top, last])
    assert whole.data.train_files == ["a.jsonl", "b.jsonl"]
    assert whole.parts.settings("language_model").layers is None
    part = whole_config(config, [projector, top]).parts.settings("language_model")
    assert (part.mode, part.layers) == ("full", "-2:")


def test_stages_read_back_from_the_run_folder():
    for text in (STAGES, "schedule: progressive\n", "unfreeze: {layers_per_stage: 2, from: bottom}\n"):
        config = load(HEAD + text)
        assert load(dump_config(config)) == config
        assert [s.config for s in expand(load(dump_config(config)))] == [s.config for s in expand(config)]


def test_progressive_shares_the_steps_of_the_run():
    stages = expand(load(HEAD.replace("warmup_steps: 2", "steps: 100") + "schedule: progressive\n"))
    assert [stage.name for stage in stages] == ["language_model", "+ projector", "+ vision_tower"]
    assert [stage.opened for stage in stages] == [
        ["language_model"],
        ["projector", "language_model"],
        ["vision_tower", "projector", "language_model"],
    ]
    assert [stage.config.train.steps for stage in stages] == [33, 33, 34]
    assert [stage.config.train.warmup_steps for stage in stages] == [1, 1, 2]
    assert settings(stages[2], "vision_tower") == ("full", None, 2e-5 / 5)
    assert settings(stages[2], "projector") == ("full", None, None)
    frozen = HEAD.replace("projector: full", "projector: frozen") + "schedule: progressive\n"
    assert [stage.name for stage in expand(load(frozen))] == ["language_model", "+ vision_tower"]


def test_unfreeze_opens_layers_from_one_end():
    top = expand(load(HEAD + "unfreeze: {part: language_model, layers_per_stage: 2, from: top}\n"))
    assert [settings(stage, "language_model")[1] for stage in top] == ["-2:", "-4:", None]
    bottom = expand(load(HEAD + "unfreeze: {layers_per_stage: 4, from: bottom}\n"))
    assert [settings(stage, "language_model")[1] for stage in bottom] == [":4", None]
    assert [stage.opened for stage in top] == [["vision_tower", "projector", "language_model"]] * 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            STAGES + "schedule: progressive\n",
            "c.yaml:16: schedule beside stages: each says which parts train when. Keep one of them.",
        ),
        (
            STAGES.replace("steps: 3", "steps: 3, until: stable"),
            'c.yaml:7: stages.0 "projector": steps and until are both given. Keep one of them.',
        ),
        (
            STAGES.replace(", steps: 3", ""),
            'c.yaml:7: stages.0 "projector" does not say how long it is. Give steps, epochs, or until: '
            "stable.",
        ),
        (
            STAGES.replace("[projector]", "{projector: frozen}"),
            "c.yaml:7: stages.0 trains nothing. Name a part under its parts: [language_model].",
        ),
        (
            STAGES.replace("projector: full", "projector: lora"),
            'c.yaml:10: stages.1 "top": projector is lora here and full under parts: what one stage trained, '
            "the next could not go on with. Write the same, or make two runs, with partwise export between.",
        ),
        (
            STAGES.replace("[projector]", "[audio_tower]"),
            'c.yaml:7: stages.0 "audio_tower" trains audio_tower, but parts does not say how. Write '
            "parts.audio_tower: full.",
        ),
        (
            STAGES.replace("[vision_tower, language_model]", "[projecter]"),
            'c.yaml:15: stages.2.parts.0: "projecter" is not one of vision_tower, audio_tower, projector, '
            'language_model. Did you mean "projector"?',
        ),
        (
            STAGES.replace("max_steps: 8", "max_step: 8"),
            'c.yaml:13: stages.1.until.max_step: unknown key. Did you mean "max_steps"?',
        ),
        (
            STAGES.replace("layers:", "lora_rank: 8, layers:"),
            "c.yaml:12: stages.1.parts.language_model.lora_rank: unknown key. It belongs under "
            '"parts.language_model:".',
        ),
        (
            STAGES.replace("[vision_tower, language_model]", "[language_model]"),
            "c.yaml:2: parts.vision_tower: it is open, but none of the stages trains it. Freeze it, or name "
            "it in one.",
        ),
        (
            STAGES.replace("steps: 3", "steps: 2"),
            'c.yaml:7: stages.0 "projector": warmup_steps: 2 leaves nothing of its 2 steps. Warm up for '
            "fewer steps.",
        ),
        (
            STAGES.replace("epochs: 1.5", "epochs: 0.2"),
            'c.yaml:15: stages.2 "vision_tower + language_model": warmup_steps: 2 leaves nothing of its 2 '
            "steps. "
            "Warm up for fewer steps.",
        ),
        (
            STAGES.replace("max_steps: 8", "max_steps: 8, min_steps: 9"),
            'c.yaml:13: stages.1 "top": until.min_steps: 9 is more than max_steps (8). Lower the first or '
            "raise the second.",
        ),
        (
            STAGES.replace("{window: 4, max_steps: 8}", "{min_steps: 11}"),
            'c.yaml:13: stages.1 "top": until.min_steps: 11 is more than the 10 steps of an epoch, the most '
            "that it has. Lower it, or give max_steps.",
        ),
        (
            STAGES.replace(
                "  - name: top",
                "  - {parts: {projector: full}, steps: 9, name: again, learning_rate: 1e-3}\n  - name: top",
            ),
            'c.yaml:8: stages.1 "again" is the stage before once more: the same parts, rates and rows. '
            "Change what trains, or make the stage before longer.",
        ),
        (
            STAGES.replace("name: top", "name: projector"),
            'c.yaml:8: stages.1: a stage before has the name "projector" too. Give each a name of its own.',
        ),
        (
            STAGES.replace("{window: 4, max_steps: 8}", "stable"),
            'c.yaml:13: stages.1 "top": until.window: 50 logged steps, one in 1, are more than the 10 steps '
            "that "
            "it has at most, so it could never be stable. Lower the window or train.log_every, or raise "
            "max_steps.",
        ),
        ("stages: []\n", "c.yaml:6: stages: the list is empty. Name at least one stage, or remove it."),
        (
            "unfreeze: {layers_per_stage: 5}\n",
            "c.yaml:6: unfreeze.layers_per_stage: 5 opens all 5 layers of language_model in one stage. Write "
            "fewer, or remove unfreeze.",
        ),
    ],
)
def test_stages_that_are_refused(text, expected):
    assert fault(HEAD + text) == expected


@pytest.mark.parametrize(
    ("old", "new", "text", "expected"),
    [
        (
            "vision_tower: full, projector: full",
            "vision_tower: frozen",
            "schedule: progressive\n",
            "c.yaml:6: schedule: progressive has one stage only, because nothing but language_model trains. "
            "Open another part, or remove it.",
        ),
        (
            "language_model: full",
            "language_model: {mode: full, layers: '-1:'}",
            "unfreeze: {layers_per_stage: 1}\n",
            'c.yaml:6: unfreeze.part: language_model beside parts.language_model.layers: "-1:": unfreeze '
            "decides which layers train. Remove the range.",
        ),
        (
            "language_model: full",
            "language_model: frozen",
            "unfreeze: {layers_per_stage: 1}\n",
            "c.yaml:6: unfreeze.part: language_model is frozen under parts, so that none of its layers ever "
            "train. Set parts.language_model: lora or full.",
        ),
        (
            "warmup_steps: 2",
            "steps: 9",
            STAGES,
            "c.yaml:4: train.steps: 9 has no effect: each of the stages says how long it is. Remove it.",
        ),
        (
            "warmup_steps: 2",
            "steps: 2",
            "schedule: progressive\n",
            "c.yaml:4: train: 2 steps are too few for 3 stages (language_model, + projector, + "
            "vision_tower). "
            "Train for more steps or epochs.",
        ),
        (
            "warmup_steps: 2",
            "steps: 6, warmup_steps: 2",
            "schedule: progressive\n",
            'c.yaml:4: stage "language_model": warmup_steps: 2 leaves nothing of its 2 steps. Warm up for '
            "fewer steps.",
        ),
    ],
)
def test_keys_that_contradict_stages(old, new, text, expected):
    assert HEAD.count(old) == 1
    assert fault(HEAD.replace(old, new) + text) == expected


def test_the_line_through_the_losses_and_the_middle_half_of_the_norms():
    assert relative_slope([4, 3, 2, 1]) == pytest.approx(-3 / 2.5)
    assert relative_slope([2, 2, 2, 2]) == 0
    assert relative_spread([1, 2, 3, 4, 5]) == pytest.approx(2 / 3)


def test_the_page_of_stages_shows_configs_that_load():
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "stages.md").read_text(), re.S)
    assert len(blocks) == 4
    names = []
    for block in blocks:
        text = block if "model:" in block.splitlines()[0] else HEAD + block
        if block.startswith("parts:"):
            text = "model: {path: m}\ndata: {train: a.jsonl}\noutput: o\n" + block
        config = load(text)
        names += [stage.name for stage in expand(config)] if "parts:\n  language" not in block else []
    assert names == [
        *("language_model", "+ projector", "+ vision_tower"),
        *("language", "+ projector", "all, lower layers slower"),
        *("language_model -4:", "all of language_model"),
    ]


def metrics(step: int, loss: float, norm: float = 1.0) -> StepMetrics:
    return StepMetrics(step, 0.0, loss, norm, {}, {}, {}, {}, 1, 1, {}, 1.0, 0.0, 0)


def decide(losses: list[float], first: int = 0, known: int = 0, log_every: int = 1, **until: float):
    """The first decision and its step; the first `known` steps are read from records."""
    keys = {"window": 4, "slope": 0.05, "spread": 0.5, **until}
    span = StageSpan(len(losses), "s", (Finished("before", first),), until=StableConfig(**keys))
    steps = [metrics(first + index + 1, loss) for index, loss in enumerate(losses)]
    records = [vars(one) for one in steps[:known]]
    ending = Ending(span, records, log_every, Ranks())
    return next((d for one in steps[known:] if (d := ending.see(one))), None)


def test_a_stage_ends_when_its_loss_has_come_to_rest():
    losses = [8, 6, 4, 3, 2.5, 2.5, 2.5, 2.5, 2.5, 2.5]
    decision = decide(losses, first=20)
    assert (decision.step, decision.steps, decision.reason) == (28, 8, "stable")
    assert decision.record == {
        "step": 28, "stage_end": "stable", "stage_steps": 8, "window": 4, "slope": 0.0, "spread": 0.0,
    }  # fmt: skip
    assert "the loss changes by +0.00% of itself" in decision.text
    # A resumed run reads what it logged, and decides alike wherever it was stopped.
    assert {decide(losses, first=20, known=known) for known in range(8)} == {decision}
    assert decide(losses, min_steps=9).step == 9
    assert decide([9, 8, 7, 6, 5, 4]).reason == "max_steps"
    assert decide([1, 1, 1]).reason == "max_steps"  # no window was full
    # Steps that are logged for a checkpoint do not count.
    assert decide(losses * 2, log_every=2).step % 2 == 0


def test_an_unsteady_gradient_is_no_rest():
    span = StageSpan(8, "s", until=StableConfig(window=4, slope=0.1, spread=0.5))
    ending = Ending(span, [], 1, Ranks())
    norms = [1, 9, 1, 9, 1, 1, 1, 1]
    decisions = [ending.see(metrics(i + 1, 2.0, norm)) for i, norm in enumerate(norms)]
    assert [bool(decision) for decision in decisions] == [False] * 7 + [True]


def test_the_manifest_says_which_stages_are_done():
    span = StageSpan(5, "second", (Finished("first", 3),), run_steps=8)
    assert (span.first_step, span.last_step) == (3, 8)
    assert finished_stages(span.stamp({}, 6, is_done=False)) == [Finished("first", 3)]
    assert finished_stages(span.stamp({}, 7, is_done=True)) == [Finished("first", 3), Finished("second", 4)]
    assert StageSpan(5).stamp({"step": 1}, 5, is_done=True) == {"step": 1} and finished_stages(None) == []


def test_layers_train_at_rates_of_their_own(load_tiny):
    model = load_tiny("gemma3")
    text = HEAD.replace(
        "language_model: full",
        "language_model: {mode: full, layer_decay: 0.5, learning_rate: 1e-2}",
    )
    config = load(text)
    plan = resolve_plan(model, config)
    fractions = plan["language_model"].rate_fractions
    by_layer = {
        place: {rate for name, rate in fractions.items() if place in name}
        for place in (".norm.", "layers.1.", "layers.0.", "embed_tokens")
    }
    assert by_layer == {".norm.": {1.0}, "layers.1.": {1.0}, "layers.0.": {0.5}, "embed_tokens": {0.25}}
    assert set(fractions) == set(plan["language_model"].trainable)
    optimizer = Optimizer(model, plan, config.train, 10)
    assert optimizer.learning_rates(1)["language_model"] == 1e-2
    embeddings = next(name for name in fractions if "embed_tokens" in name)
    assert optimizer.groups[embeddings]["peak"] == 0.25e-2
    adapters = text.replace("mode: full, layer", "mode: lora, layer").replace("vision_tower: full", "")
    lora = resolve_plan(model, load(adapters.replace("{,", "{")))["language_model"].rate_fractions
    assert {rate for name, rate in lora.items() if "layers.0." in name} == {0.5}
    with pytest.raises(PlanError, match=r"parts\.projector\.layer_decay: 0\.5: projector has no layers"):
        decayed = "projector: {mode: full, layer_decay: 0.5}"
        resolve_plan(model, load(HEAD.replace("projector: full", decayed)))
