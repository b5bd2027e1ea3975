"""What a run starts from: its config, its folder, and the checkpoint it goes on from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from bench import Bench, Row, failure, listening
from cases_numbers import make_examples, run_trainer
from safetensors.torch import load_file
from transformers import HfArgumentParser, TrainingArguments

from partwise.config import Config, load_config
from partwise.run import check, train

SAVES = {"save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-3}


def key_written_twice(bench: Bench) -> Row:
    file = bench.folder / "arguments.yaml"
    lines = ("learning_rate: 2.0e-5", "learning_rate: 2.0e-3")
    file.write_text("\n".join((f"output_dir: {bench.folder / 'o'}", "use_cpu: true", *lines)) + "\n")
    with listening() as said:
        (arguments,) = HfArgumentParser(TrainingArguments).parse_yaml_file(str(file))
    assert arguments.learning_rate == 2e-3 and not said
    message = bench.refusal(bench.config, "parts: {projector: full}\ntrain:\n  " + "\n  ".join(lines))
    assert "learning_rate" in message and "written twice, here and in line 7" in message
    return Row(
        "`learning_rate` is written twice in a YAML file.",
        f"The last one counts, here {arguments.learning_rate:g}. Nothing is said.",
        "Stops, with both lines.",
        message,
    )


def number_that_is_text(bench: Bench) -> Row:
    file = bench.folder / "arguments.yaml"
    file.write_text(f"output_dir: {bench.folder / 'o'}\nuse_cpu: true\nlearning_rate: 2e-5\n")
    with listening() as said:
        (arguments,) = HfArgumentParser(TrainingArguments).parse_yaml_file(str(file))
    assert arguments.learning_rate == "2e-5" and not said
    rows = make_examples()[:1]
    settings = {"learning_rate": arguments.learning_rate}
    stopped = failure(run_trainer, bench.load("llama"), rows, bench.folder / "o", 1, 1, **settings)
    ours = bench.config("parts: {projector: full}", train="train: {learning_rate: 2e-5}")
    assert ours.train.learning_rate == 2e-5
    return Row(
        "`learning_rate: 2e-5` in a YAML file.",
        "It is text: YAML 1.1 wants `2.0e-5`. `TrainingArguments` takes it, and the optimizer does not: "
        f"`{stopped}`.",
        "It is a number, as in YAML 1.2. Text where a number belongs is an error.",
    )


def run_over_another(bench: Bench) -> Row:
    folder = bench.folder / "twice"
    weights = []
    with listening() as said:
        for seed in (0, 1):
            model = bench.load("llama")
            run_trainer(model, make_examples()[seed : seed + 1], folder, 1, 1, **SAVES)
            weights.append(load_file(folder / "checkpoint-1/model.safetensors"))
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0]) and not said
    run = bench.folder / "mine"
    config = text_run(bench, run)
    train(config)
    before = (run / "final/model.safetensors").read_bytes()
    message = bench.refusal(train, config)
    assert "holds files already" in message
    assert (run / "final/model.safetensors").read_bytes() == before
    return Row(
        "A second run is given the folder of the first.",
        "Its checkpoints take the place of the first run's. Nothing is said.",
        "Stops; what is there is left as it is.",
        message,
    )


def text_run(bench: Bench, run: Path, answer: str = "red") -> Config:
    """Two steps over four rows of text, with a checkpoint after each."""
    data = bench.folder / f"{run.name}.jsonl"
    data.write_text(4 * (json.dumps({"prompt": "Which color is this?", "completion": answer}) + "\n"))
    file = bench.folder / f"{run.name}.yaml"
    file.write_text(
        f"model: {{path: {bench.base('llama')}, dtype: float32}}\n"
        "parts: {language_model: full}\n"
        f"data: {{train: {data}, eval: {data}, num_workers: 0}}\n"
        "train: {steps: 2, global_batch_size: 4, micro_batch_size: 4, save_every: 1}\n"
        f"output: {run}\n"
    )
    return load_config(file)


def resumed_on_other_data(bench: Bench) -> Row:
    folder = bench.folder / "resumed"
    first, second = make_examples()[:1], make_examples()[3:]
    run_trainer(bench.load("llama"), first, folder, 1, 1, **SAVES)
    with listening() as said:
        trainer = run_trainer(bench.load("llama"), 2 * second, folder, 1, 2, resume=True, **SAVES)
    assert trainer.state.global_step == 2 and not any("data" in text for text in said)
    run = bench.folder / "own"
    train(text_run(bench, run))
    shutil.rmtree(run / "final")
    shutil.rmtree(run / "checkpoints/step-000002")
    message = bench.refusal(train, text_run(bench, run, "blue"), resume=True)
    assert "the training data is not the one the run was started with" in message
    return Row(
        "A run is resumed, and its data file is another one now.",
        "Goes on with the new rows. Nothing is said.",
        "Stops. A checkpoint knows a fingerprint of its data and of its base; `partwise train` also refuses "
        "another learning rate, seed or batch.",
        message,
    )


def evaluation_on_training_rows(bench: Bench) -> Row:
    examples = 2 * make_examples()
    with listening() as said:
        trainer = run_trainer(bench.load("llama"), examples, bench.folder / "o", 4, 1)
        loss = trainer.evaluate(trainer.train_dataset)["eval_loss"]
    assert loss > 0 and not said
    findings = check(text_run(bench, bench.folder / "shared"))
    warned = {finding.check: finding.message for finding in findings if finding.level == "warning"}
    assert {"duplicates", "overlap"} <= set(warned)
    return Row(
        "Rows are in the training file twice, and the evaluation file holds them, too.",
        "Both are trained and evaluated on, and the evaluation loss is of rows learned by heart. Nothing is "
        "said.",
        "`partwise check` warns of both, with the rows. Rows are compared as the model sees them.",
        warned["overlap"].replace(f"{bench.folder}/", ""),
    )


CASES = (
    key_written_twice,
    number_that_is_text,
    run_over_another,
    resumed_on_other_data,
    evaluation_on_training_rows,
)
