"""Five ways in which people lost days: each set up for real, plain and in Partwise, by its commands.

"Plain" is transformers, PEFT, torch and DeepSpeed as they are installed here. Where they mend one of these
faults, the plain half of its test fails: then it is for docs/comparison.md to say so.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from plain import (
    Wrapper,
    load_base,
    lora_with_reentrant_checkpointing,
    plain_inputs,
    save_full_fine_tune,
    trainer_loss,
)
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

FROZEN = {
    "parts": None,
    "finetuning_type": "full",
    "freeze_vision_tower": True,
    "freeze_multi_modal_projector": True,
    "freeze_language_model": True,
}
LORA_BOTH = {
    "vision_tower": {"mode": "lora", "learning_rate": 1e-3},
    "language_model": {"mode": "lora", "learning_rate": 1e-3},
}


def told(done) -> str:
    """What a command printed, without its line breaks."""
    return " ".join((done.out + done.err).split())


def read_metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


# 1. Everything frozen


def test_everything_frozen_under_deepspeed_is_an_index_error(toy, tmp_path, run_python) -> None:
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed; `make venv` does it")
    done = run_python(Path(__file__).with_name("zero.py").read_text(), toy.base, tmp_path)
    assert done.code == 0, done.err
    said = json.loads(done.out.splitlines()[-1])
    for stage in said.values():
        assert stage["Trainer, frozen"] == "IndexError: list index out of range"
        assert stage["Trainer, open"] > 4  # the same with two parts open trains
    assert said["ZeRO-2"]["AdamW, frozen"] == "IndexError: list index out of range"
    assert said["ZeRO-3"]["AdamW, frozen"] == "AssertionError: "


def test_everything_frozen_is_refused_before_weights_are_looked_for(toy, tmp_path, run_cli) -> None:
    config = toy.config(tmp_path, model={"path": str(tmp_path / "no-model")}, **FROZEN)
    lines = [i for i, line in enumerate(config.read_text().splitlines(), 1) if '"freeze_' in line]
    engines = json.loads(run_cli("schema").out)["properties"]["engine"]["enum"]
    for command, overrides in [
        ("check", ["train.gradient_checkpointing=true"]),
        *(("train", [f"engine={engine}"]) for engine in engines),
    ]:
        done = run_cli(command, config, *overrides)
        assert done.code == 1
        assert "nothing would train: vision_tower, projector and language_model are all frozen" in told(done)
        assert f"config.yaml:{lines[0]}-{lines[-1]}" in told(done) and len(lines) == 3
        assert "Traceback" not in told(done) and not (tmp_path / "run").exists()
    # What the message says to do is all there is to do.
    recipe = told(done).partition("opens the other two: ")[2].rstrip(".").split(", ")
    config = toy.config(tmp_path, train__steps=1, **FROZEN)
    trained = run_cli("train", config, *(flag.replace(": ", "=") for flag in recipe))
    assert trained.code == 0, trained.err
    opened = {name for name, part in read_plan(tmp_path / "run").items() if part["trainable"]}
    assert opened == {"projector", "language_model"}


def read_plan(run: Path) -> dict[str, dict]:
    return {part["part"]: part for part in json.loads((run / "plan.json").read_text())["parts"]}


# 2. Gradients that do not arrive


def test_gradients_of_a_checkpointed_tower_are_lost_without_an_error(toy) -> None:
    model = lora_with_reentrant_checkpointing(toy.base)
    arguments = []
    encoder = model.get_base_model().model.vision_tower.encoder
    encoder.register_forward_pre_hook(lambda module, given: arguments.append(given))
    (inputs,) = plain_inputs(toy, 1)
    loss = model(**inputs).loss
    loss.backward()
    assert loss.isfinite()
    # A hook that reads the encoder's first positional argument finds none: Gemma-3 passes it by name.
    assert arguments == [()]
    adapters = {name: p for name, p in model.named_parameters() if p.requires_grad and "lora_B" in name}
    reached = {name for name, p in adapters.items() if p.grad is not None}
    assert {name for name in adapters if "language_model" in name} == reached
    assert any("vision_tower" in name for name in adapters)


def test_every_gradient_arrives_with_and_without_checkpointing(toy, tmp_path, run_cli) -> None:
    metrics = {}
    for checkpointing in (False, True):
        folder = tmp_path / str(checkpointing)
        settings = {"train__gradient_checkpointing": checkpointing, "train__steps": 4}
        config = toy.config(folder, parts=LORA_BOTH, **settings)
        checked = run_cli("check", config)
        assert checked.code == 0, told(checked)
        assert run_cli("train", config).code == 0
        plan = read_plan(folder / "run")
        num_trained = sum(len(part["trainable"]) for part in plan.values())
        assert f"gradients reach {num_trained} of {num_trained} trainable tensors" in told(checked)
        assert plan["vision_tower"]["trainable"] and plan["language_model"]["trainable"]
        proofs = [f for f in json.loads((folder / "run/report.json").read_text()) if f["check"] == "proof"]
        assert f"all {num_trained} trainable tensors moved" in proofs[-1]["message"]
        metrics[checkpointing] = read_metrics(folder / "run")
    for with_it, without in zip(metrics[True], metrics[False], strict=True):
        assert with_it["loss"] == pytest.approx(without["loss"], rel=1e-5)
        for part in LORA_BOTH:
            assert with_it["grad_norms"][part] == pytest.approx(without["grad_norms"][part], rel=1e-3)
            assert with_it["grad_norms"][part] > 0


# 3. Flags that contradict


CONTRADICTIONS: tuple[dict, ...] = (
    {"train_mm_proj_only": True, "parts": {"language_model": "full"}},
    {"train_mm_proj_only": True, "freeze_multi_modal_projector": True},
    {"train_mm_proj_only": True, "freeze_language_model": False},
    {"train_mm_proj_only": True, "freeze_vision_tower": False},
)


def test_plain_flags_mean_what_comes_last(toy) -> None:
    """Each flag as a loop over the parts it names, as training scripts have it: the order decides."""
    flags = {
        "train_mm_proj_only": lambda model: (
            model.requires_grad_(False) and model.model.multi_modal_projector.requires_grad_(True)
        ),
        "freeze_multi_modal_projector": lambda model: model.model.multi_modal_projector.requires_grad_(False),
    }
    counts = []
    for order in (list(flags), list(reversed(flags))):
        model = load_base(toy.base)
        for flag in order:
            flags[flag](model)
        counts.append(sum(p.requires_grad for p in model.parameters()))
    assert counts == [0, 2]


@pytest.mark.parametrize("flags", CONTRADICTIONS, ids=lambda flags: "-".join(flags))
def test_flags_that_contradict_are_an_error_that_names_both(toy, tmp_path, run_cli, flags) -> None:
    config = toy.config(tmp_path, **{"parts": None, **flags})
    for command in ("check", "train"):
        done = run_cli(command, config)
        assert done.code == 1 and all(flag in told(done) for flag in flags), told(done)
        assert not (tmp_path / "run").exists()


def test_the_projector_alone_trains_the_projector_alone(toy, tmp_path, run_cli) -> None:
    config = toy.config(tmp_path, parts=None, train_mm_proj_only=True, train__steps=3)
    done = run_cli("train", config)
    assert done.code == 0 and "projector: full" in done.out, told(done)
    before = load_file(toy.base / "model.safetensors")
    after = load_file(tmp_path / "run/final/model.safetensors")
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if "multi_modal_projector" in name} and len(moved) == 2


# 4. A loss that starts at 70


def test_a_wrapped_loss_is_multiplied_by_the_micro_batches(toy, tmp_path) -> None:
    whole = trainer_loss(Wrapper(load_base(toy.base)), tmp_path, 1)
    split = trainer_loss(Wrapper(load_base(toy.base)), tmp_path, 8)
    assert whole == pytest.approx(trainer_loss(load_base(toy.base), tmp_path, 8), rel=1e-4)
    assert split == pytest.approx(8 * whole, rel=1e-4) and split > 45


def test_the_loss_is_one_number_for_every_split(toy, tmp_path, run_cli) -> None:
    metrics = []
    for size in (16, 4, 1):
        config = toy.config(tmp_path / str(size), train__micro_batch_size=size, train__steps=2)
        assert run_cli("train", config).code == 0
        metrics.append(read_metrics(tmp_path / str(size) / "run"))
    for other in metrics[1:]:
        for mine, theirs in zip(metrics[0], other, strict=True):
            assert theirs["loss"] == pytest.approx(mine["loss"], rel=1e-5)
            assert theirs["grad_norm"] == pytest.approx(mine["grad_norm"], rel=1e-3)


def test_a_first_loss_that_is_too_high_has_its_cause_named(toy, tmp_path, run_cli) -> None:
    learned = toy.config(tmp_path / "learned", train__steps=60, train__warmup_steps=5)
    assert run_cli("train", learned).code == 0
    final, broken = tmp_path / "learned/run/final", tmp_path / "broken"
    healthy = run_cli("check", toy.config(tmp_path / "healthy", model__path=str(final)), "--only", "loss")
    assert healthy.code == 0 and "first loss is 0." in told(healthy), told(healthy)
    # The head lost its tie to the embeddings, and has other weights.
    shutil.copytree(final, broken)
    tensors = load_file(final / "model.safetensors")
    (embeddings,) = [tensor for name, tensor in tensors.items() if "embed_tokens" in name]
    tensors["language_model.lm_head.weight"] = 4 * embeddings.flip(0)
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((broken / "config.json").read_text())
    settings["tie_word_embeddings"] = settings["text_config"]["tie_word_embeddings"] = False
    (broken / "config.json").write_text(json.dumps(settings))
    named = run_cli("check", toy.config(tmp_path / "sick", model__path=str(broken)), "--only", "loss")
    said, _, cause = told(named).partition("the output head is not the one that was trained: ")
    loss = float(said.partition("the first loss is ")[2].split()[0])
    assert loss > 20 and f"the embeddings in its place do better: {loss:.3f} became 0." in cause
    assert "tie_word_embeddings: true" in cause


# 5. A full checkpoint that cannot be a LoRA base


# Each is what plain loading does, and what Partwise must name.
SAVED = {
    "weights alone": ("Unrecognized model", ["has no config.json", "copy it from the model"]),
    "save_pretrained alone": (None, ["has no tokenizer", "tokenizer.json", "Copy the tokenizer files"]),
    "saved while wrapped": (None, ["begins with 'module.'", "all 67 tensors fit", "save the inner model"]),
}


@pytest.mark.parametrize("form", SAVED)
def test_a_full_model_that_is_no_base_is_refused_by_what_it_lacks(toy, tmp_path, run_cli, form) -> None:
    folder = save_full_fine_tune(toy, tmp_path / "full", form)
    plain_error, words = SAVED[form]
    if plain_error:
        with pytest.raises(ValueError, match=plain_error):
            load_base(folder)
    else:
        model, base = load_base(folder), load_base(toy.base)
        same = all(torch.equal(p, base.get_parameter(n)) for n, p in model.named_parameters())
        # Either the weights are others, or the tokenizer is: in neither case an error.
        assert same == (form == "save_pretrained alone")
        assert (len(AutoTokenizer.from_pretrained(folder)) < 10) == same
    config = toy.config(tmp_path, model__path=str(folder), parts={"language_model": "lora"})
    for command in ("check", "train"):
        done = run_cli(command, config)
        assert done.code == 1 and all(word in told(done) for word in words), told(done)
        assert str(folder) in told(done) and "Traceback" not in told(done)
        assert not (tmp_path / "run").exists()


TRAIN = "import sys\nfrom partwise import cli\nsys.argv[0] = 'partwise'\ncli.main()\n"
COMPARE = """
import sys, torch
from transformers import AutoModelForImageTextToText, AutoProcessor
logits = []
for folder in sys.argv[1:]:
    assert len(AutoProcessor.from_pretrained(folder).tokenizer) > 100
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    logits.append(model(input_ids=torch.arange(10, 40)[None]).logits)
assert "partwise" not in sys.modules
print((logits[0] - logits[1]).abs().max().item())
"""


def test_a_full_run_is_the_base_of_a_lora_run_in_a_fresh_process(toy, tmp_path, run_cli, run_python) -> None:
    assert run_cli("train", toy.config(tmp_path / "full", train__steps=3)).code == 0
    final, merged = tmp_path / "full/run/final", tmp_path / "merged"
    parts = {"language_model": {"mode": "lora", "learning_rate": 1e-2}}
    config = toy.config(tmp_path / "lora", model__path=str(final), parts=parts, train__steps=3)
    fresh = run_python(TRAIN, "train", config)
    assert fresh.code == 0, fresh.err
    first = read_metrics(tmp_path / "lora/run")[0]["loss"]
    assert first < read_metrics(tmp_path / "full/run")[0]["loss"] - 0.5  # it goes on from what was learned
    assert run_cli("export", tmp_path / "lora/run", "--out", merged).code == 0
    compared = run_python(COMPARE, final, merged)
    assert compared.code == 0 and float(compared.out) > 1e-2, compared
