"""Preference runs and raw text, as a user runs them on a tiny Gemma-3 with images."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from partwise.training.metrics import read_metrics

NAMES = ("red", "green", "blue", "yellow")
LORA = {"language_model": {"mode": "lora", "learning_rate": 1e-2}, "projector": "frozen"}


def write_pairs(path: Path, number: int) -> Path:
    """For each of the first coloured squares the right colour, and by turns one of the others."""
    rows = []
    for i, line in enumerate(path.read_text().splitlines()[:number]):
        row = json.loads(line)
        question, answer = row["messages"]
        wrong = NAMES[(NAMES.index(answer["content"]) + 1 + i // 4 % 3) % 4]
        rejected = {"role": "assistant", "content": wrong}
        rows.append({"prompt": [question], "chosen": [answer], "rejected": rejected, "images": row["images"]})
    pairs = path.with_name("pairs.jsonl")
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return pairs


@pytest.fixture(scope="module")
def pairs(toy) -> dict[str, str]:
    return {"data__train": str(write_pairs(toy.train, 64)), "data__eval": str(write_pairs(toy.held_out, 20))}


def records(folder: Path) -> tuple[list[dict], list[dict]]:
    found = list(read_metrics(folder / "run"))
    return [r for r in found if "loss" in r], [r for r in found if "eval_loss" in r]


def test_dpo_learns_which_answer_is_right_on_images_it_has_not_seen(toy, pairs, tmp_path, run_cli):
    settings = {"train__steps": 20, "train__eval_every": 10, "parts": LORA}
    config = toy.config(tmp_path, objective={"loss": "dpo"}, **pairs, **settings)
    done = run_cli("train", config)
    assert done.code == 0, done.err
    assert "margin" in done.out and "accuracy" in done.out
    steps, evaluations = records(tmp_path)
    first, last = evaluations[0]["eval_preference"], evaluations[-1]["eval_preference"]
    assert steps[0]["loss"] == pytest.approx(0.693147, abs=1e-6)
    assert steps[0]["preference"]["reward_margin"] == pytest.approx(0, abs=1e-6)
    assert last["reward_margin"] > first["reward_margin"] > 0.2
    assert last["reward_accuracy"] >= 0.95
    assert last["chosen_log_prob"] > last["rejected_log_prob"] + 3  # and likelier than the wrong colour
    assert evaluations[-1]["eval_loss"] < 0.4
    assert (tmp_path / "run" / "final" / "adapter_config.json").is_file()


@pytest.mark.parametrize(
    ("objective", "rows", "text"),
    [
        ({"loss": "dpo"}, "chats", 'rows.jsonl:1: "chosen" is missing .* set objective.loss: sft'),
        ({"loss": "sft"}, "pairs", "pairs.jsonl:1: .* Set objective.loss: dpo"),
        ({"loss": "kto"}, "pairs", 'pairs.jsonl:1: "label" is missing'),
        ({"loss": "text"}, "chats", "rows.jsonl:1: .* objective.loss text learns raw text"),
        ({"loss": "dpo", "reference": "adapter_off"}, "pairs", "language_model train in full.*precomputed"),
    ],
)
def test_rows_of_another_objective_are_errors_that_name_the_key(
    objective, rows, text, toy, pairs, tmp_path, run_cli
):
    train = pairs["data__train"] if rows == "pairs" else str(toy.train)
    config = toy.config(tmp_path, objective=objective, data__train=train)
    done = run_cli("check", config, "--only", "rows", "--only", "objective")
    assert done.code == 1
    assert any(__import__("re").search(text, line) for line in done.out.replace("\n", " ").split("error")), (
        done.out
    )


def test_check_tells_of_answers_and_reference(toy, pairs, tmp_path, run_cli):
    lines = Path(pairs["data__train"]).read_text().splitlines()
    same = json.loads(lines[0])
    same["rejected"] = same["chosen"]
    path = Path(pairs["data__train"]).with_name("same.jsonl")
    path.write_text("\n".join([*lines[:8], json.dumps(same)]) + "\n")
    config = toy.config(tmp_path, objective={"loss": "dpo"}, data__train=str(path), parts=LORA)
    done = run_cli("check", config)
    out = " ".join(done.out.split())
    assert done.code == 0
    assert "the reference is the model with its adapters switched off" in out
    assert "9 good answers of" in out
    assert "1 pairs have the same answer twice, such as" in out
    assert "first-answers: the first loss is 0.6931" in out


def test_raw_text_and_interleaved_documents_train_in_pieces(toy, tmp_path, run_cli):
    images = [json.loads(line)["images"][0] for line in toy.train.read_text().splitlines()[:8]]
    rows = [{"text": "a colour is a kind of light. " * (1 + 5 * (i % 3))} for i in range(8)]
    rows += [{"text": f"Here: <image> and then words. {'more ' * 60}", "images": [image]} for image in images]
    path = toy.train.with_name("texts.jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"train__steps": 6, "data__max_seq_len": 48, "data__train": str(path)}
    config = toy.config(tmp_path, objective={"loss": "text"}, **settings)
    done = run_cli("train", config)
    assert done.code == 0, done.err
    steps, _ = records(tmp_path)
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.5
    assert not steps[0]["num_dropped"] and "preference" not in steps[0]
    # All 16 documents in each step: every token that is no image's trains, and some come in several pieces.
    assert steps[0]["num_target_tokens"] == steps[1]["num_target_tokens"] > 16 * 48
