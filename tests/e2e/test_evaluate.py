"""Models judged by what they answer: afterwards, and while they train, which changes nothing of that."""

from __future__ import annotations

import json
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import partwise
from partwise.config import load_config

# One mean for each evaluation: the second of four is the best.
COUNTED = """
VALUES, PER_EVALUATION = (0.2, 0.9, 0.1, 0.3), 12
calls = 0
def counted(answer, references):
    global calls
    calls += 1
    return VALUES[(calls - 1) // PER_EVALUATION]
"""
CONSTANT = "def constant(answer, references): return 0.5\n"
SHARED = {
    "parts": {"projector": "full", "language_model": {"mode": "lora", "lora_rank": 4, "lora_dropout": 0.3}},
    "train__steps": 8,
    "train__gradient_checkpointing": True,
}


def train(config: Path, resume: bool = False) -> str:
    console = Console(record=True, width=200, quiet=False, file=(config.parent / "log").open("w"))
    partwise.train(load_config(config), resume=resume, console=console)
    return console.export_text()


def records(run: Path, key: str) -> list[dict]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [record for line in lines if key in (record := json.loads(line))]


@pytest.fixture(scope="module")
def judged(toy, tmp_path_factory):
    """A run with packing, checkpointing and dropout that is judged every 2 steps; its folder and console."""
    folder = tmp_path_factory.mktemp("judged")
    (folder / "scores.py").write_text(COUNTED)
    config = toy.config(
        folder,
        data__eval=str(toy.held_out),
        train__save_every=2,
        train__keep_last=1,
        train__keep_best=1,
        evaluate={
            "every": 2,
            "metrics": ["token_f1", f"{folder / 'scores.py'}:counted"],
            "rows": 4,
            "max_new_tokens": 5,
            "control": True,
            "group_by": "images",
            "best_by": "counted",
        },
        **SHARED,
    )
    text = train(config)
    return folder / "run", text


def test_evaluations_leave_the_training_as_it_was_to_the_bit(judged, toy, tmp_path):
    run, _ = judged
    train(toy.config(tmp_path, **SHARED))
    keys = ("step", "loss", "grad_norm")
    with_, without = (
        [{key: record[key] for key in keys} for record in records(folder, "loss")]
        for folder in (run, tmp_path / "run")
    )
    assert with_ == without and len(with_) == 8
    tensors, others = (load_file(f / "final/adapter_model.safetensors") for f in (run, tmp_path / "run"))
    assert tensors.keys() == others.keys()
    assert all(torch.equal(tensors[name], others[name]) for name in tensors)


def test_scores_stand_in_metrics_on_the_console_and_in_the_manifest(judged):
    run, text = judged
    found = records(run, "eval_scores")
    assert [record["step"] for record in found] == [2, 4, 6, 8]
    assert [record["eval_scores"]["counted"] for record in found] == pytest.approx([0.2, 0.9, 0.1, 0.3])
    assert found[0]["eval_judged_rows"] == found[0]["eval_rows"] == 4
    assert (
        set(found[0]["eval_control"]) == {"right", "swapped", "blank"} and len(found[0]["eval_groups"]) == 4
    )
    assert [record["step"] for record in records(run, "eval_loss")] == [2, 4, 6, 8]
    assert "counted 0.900  4 rows judged in" in text
    assert "4 of 40 rows are asked 4 times" in (run / "report.json").read_text()


def test_the_best_checkpoint_by_a_metric_is_kept(judged):
    run, _ = judged
    kept = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert kept == ["step-000004", "step-000008"]
    manifest = json.loads((run / "checkpoints/step-000004/partwise.json").read_text())
    assert manifest["eval_scores"]["counted"] == pytest.approx(0.9) and "eval_loss" in manifest


class Outline(HTMLParser):
    """The page's texts and images; it must need nothing from elsewhere."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.images: list[str] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        assert tag not in ("script", "link", "iframe")
        if tag == "img":
            self.images.append(dict(attributes)["src"])

    def handle_data(self, data):
        self.texts.append(data.strip())


def test_samples_of_the_newest_evaluation_can_be_looked_at(judged, toy):
    run, _ = judged
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 4 and {sample["step"] for sample in samples} == {8}
    assert all(sample["question"] == toy.question for sample in samples)
    assert set(samples[0]["controls"]) == {"swapped", "blank"}
    page = Outline((run / "samples.html").read_text())
    assert len(page.images) == 4 and all(image.startswith("data:image/") for image in page.images)
    assert {sample["references"][0] for sample in samples} <= set(page.texts)
    assert "does the model look at the image?" in page.texts and "blank image" in page.texts


@pytest.fixture(scope="module")
def stalled(toy, tmp_path_factory):
    """A run that two evaluations without improvement end after step 3 of 8."""
    folder = tmp_path_factory.mktemp("stalled")
    (folder / "scores.py").write_text(CONSTANT)
    config = toy.config(
        folder,
        data__eval=str(toy.held_out),
        train__save_every=1,
        train__keep_last=3,
        evaluate={
            "every": 1,
            "metrics": [f"{folder / 'scores.py'}:constant"],
            "rows": 1,
            "max_new_tokens": 1,
            "best_by": "constant",
            "patience": 2,
        },
        **SHARED,
    )
    return config, train(config)


def test_training_ends_when_nothing_gets_better(stalled):
    config, text = stalled
    run = config.parent / "run"
    told = (
        "training ends after 3 steps: no better evaluation; the best constant was 0.5000, after step 1, and "
        "evaluate.patience is 2"
    )
    assert told in text and "step 3: all" in text
    assert json.loads((run / "final/partwise.json").read_text())["step"] == 3
    assert [record["step"] for record in records(run, "loss")] == [1, 2, 3]


@pytest.mark.parametrize("newest", [3, 2])
def test_a_resumed_run_counts_the_evaluations_before_it(stalled, newest, tmp_path):
    """Killed before final/ was written: after its last checkpoint, or before it."""
    config, _ = stalled
    run = config.parent / "run"
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/final")
    for step in range(newest + 1, 4):
        shutil.rmtree(tmp_path / f"run/checkpoints/step-{step:06d}")
    (tmp_path / "config.yaml").write_text(config.read_text().replace(f'"{run}"', f'"{tmp_path / "run"}"'))
    train(tmp_path / "config.yaml", resume=True)
    assert json.loads((tmp_path / "run/final/partwise.json").read_text())["step"] == 3
    ours, others = (load_file(f / "final/adapter_model.safetensors") for f in (run, tmp_path / "run"))
    assert all(torch.equal(ours[name], others[name]) for name in ours)
    assert [record["step"] for record in records(tmp_path / "run", "eval_scores")] == [1, 2, 3]


def test_a_stage_ends_when_nothing_gets_better_and_the_next_one_counts_anew(
    stalled, toy, tmp_path, monkeypatch
):
    monkeypatch.setattr("partwise.run.MODEL_CHECKS", [])  # they take longer than the steps
    config, _ = stalled
    settings = json.loads(config.read_text())
    path = toy.config(
        tmp_path,
        parts={"projector": "full"},
        data__eval=str(toy.held_out),
        train__steps=None,
        evaluate=settings["evaluate"],
        stages=[
            {"name": "first", "parts": ["projector"], "steps": 4},
            {"name": "second", "parts": ["projector"], "steps": 4, "learning_rate": 1e-4},
        ],
    )
    text = train(path)
    assert 'stage "first" ends after 3 steps: no better evaluation' in text
    assert 'stage "second" ends after 3 steps: no better evaluation' in text
    assert [record["step"] for record in records(tmp_path / "run", "eval_scores")] == [1, 2, 3, 4, 5, 6]
    assert [r["stage"] for r in records(tmp_path / "run", "stage_end")] == ["first", "second"]


def test_eval_compares_a_run_with_its_base(judged, toy, run_cli, tmp_path):
    run, _ = judged
    out = tmp_path / "out"
    arguments = ("--metrics", "exact_match, anls", "--rows", 6, "--max-new-tokens", 4, "--batch-size", 4)
    done = run_cli(
        *("eval", run, "--data", toy.held_out, *arguments, "--group-by", "images", "--control"),
        *("--baseline", toy.base, "--out", out),
    )
    assert done.code == 0, done.err
    assert f"against {toy.base}" in done.out and "6 rows judged in" in done.out
    assert "by images" in done.out and "blank image" in done.out
    sample = json.loads((out / "samples.jsonl").read_text().splitlines()[0])
    assert set(sample["scores"]) == {"exact_match", "anls"} == set(sample["base"]["scores"])
    assert "base's answer" in Outline((out / "samples.html").read_text()).texts


def test_eval_from_python_has_the_loss_that_training_computes(judged, toy):
    run, _ = judged
    options = partwise.EvalOptions(max_new_tokens=1, metrics=("exact_match",))
    found = partwise.evaluate(run, [toy.held_out], options)
    assert len(found.judgement.samples) == 40 and found.base is None
    assert found.loss == pytest.approx(records(run, "eval_loss")[-1]["eval_loss"], rel=1e-5)


def test_eval_refuses_what_it_cannot_measure(judged, toy, run_cli):
    run, _ = judged
    done = run_cli("eval", run, "--data", toy.held_out, "--metrics", "exact_mach")
    assert done.code == 1 and 'Did you mean "exact_match"?' in done.err
    done = run_cli("eval", run, "--data", toy.held_out, "--group-by", "kind")
    assert done.code == 1 and '--group-by: no row has the key "kind". The first one has messages' in done.err


EVALUATE = {"metrics": ["exact_match"]}


@pytest.mark.parametrize(
    ("evaluate", "change", "message"),
    [
        ({"metrics": ["f1"]}, {}, '"f1" is not a metric'),
        ({"metrics": ["gone.py:score"]}, {}, "there is no file gone.py"),
        ({**EVALUATE, "group_by": "kind"}, {}, 'no row that was read has the key "kind"'),
        (EVALUATE, {"data__eval": "broken"}, 'rows.jsonl:2: "answers" is 7, not a text'),
        ({**EVALUATE, "control": True}, {"data__eval": "text"}, "evaluate.control: true has no effect"),
    ],
)
def test_check_judges_the_section(evaluate, change, message, toy, tmp_path, run_cli):
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "b", "answers": 7}]
    files = {"": toy.held_out, "broken": tmp_path / "rows.jsonl", "text": tmp_path / "text.jsonl"}
    files["broken"].write_text("".join(json.dumps(row) + "\n" for row in rows))
    files["text"].write_text(json.dumps(rows[0]) + "\n")
    held_out = files[change.get("data__eval", "")]
    config = toy.config(tmp_path, data__eval=str(held_out), evaluate=evaluate, **SHARED)
    done = run_cli("check", config, "--only", "evaluate")
    assert done.code == 1 and message in done.out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"evaluate": {"best_by": "anls"}}, 'evaluate.best_by: "anls" is not measured; there is loss, exact'),
        ({"evaluate": {"patience": 2}}, "evaluate.patience: 2 has no effect"),
        ({"evaluate": {"metrics": [], "control": True}}, "evaluate.control: true has no effect"),
        ({"evaluate": EVALUATE, "engine": "fsdp"}, "no process has the whole model"),
        ({"evaluate": EVALUATE, "data__feature_cache": "cache"}, None),
        ({"evaluate": {"control": True}, "data__feature_cache": "cache"}, "no features are kept of a blank"),
        ({"evaluate": {"metrics": [], "patience": 1, "every": 2}, "engine": "zero3"}, None),
        ({"evaluate": EVALUATE, "data__eval": None}, "evaluate: has no effect: there is no data.eval"),
    ],
)
def test_settings_that_contradict_each_other(change, message, toy, tmp_path):
    settings = {**SHARED, "data__eval": str(toy.held_out), **change}
    config = toy.config(tmp_path, **{key: value for key, value in settings.items() if value is not None})
    if message is None:
        assert load_config(config).evaluate is not None
        return
    with pytest.raises(partwise.UserError) as fault:
        load_config(config)
    assert message in str(fault.value)
