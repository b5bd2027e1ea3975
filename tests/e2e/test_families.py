"""Every family through the commands: train in full and as an adapter, export, and the same logits elsewhere.

The reference is plain transformers and PEFT on the written folders, with the inputs of the family's own
processor; Partwise writes the folders and is not asked again.
"""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from partwise.data.loader import epoch_order
from partwise.export.adapter import open_adapter
from partwise.model.load import load_processor
from partwise.tiny import FAMILIES

TEXT_FAMILIES = ("gemma3-text", "llama")
LORA = {"mode": "lora", "lora_rank": 4, "learning_rate": 1e-2}
SIZES = [(28, 28), (61, 34), (19, 90)]


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    """Rows of every kind in a folder with spaces and letters of two scripts; a text model gets the last two.

    One image, two images of odd sizes in two turns of which one is not trained, a system message, a prompt
    with its completion.
    """
    folder = tmp_path_factory.mktemp("my dätä 数据")
    for i, size in enumerate(SIZES):
        Image.effect_noise(size, 60).convert("RGB").save(folder / f"a é {i}.png")
    turns = [
        {"role": "user", "content": "Which is this? <image>"},
        {"role": "assistant", "content": "black", "train": False},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "No. And this?"}]},
        {"role": "assistant", "content": "red"},
    ]
    system = [
        {"role": "system", "content": "Answer in one word."},
        {"role": "user", "content": "Which is 数字?"},
        {"role": "assistant", "content": "sieben"},
    ]
    lines = [
        {"prompt": "<image>\nWhat color?", "completion": "red", "image": "a é 0.png"},
        {"messages": turns, "images": ["a é 1.png", "a é 2.png"]},
        {"messages": system},
        {"prompt": "Which color has grass?", "completion": "green"},
    ]
    for name, chosen in (("all.jsonl", lines), ("text.jsonl", lines[2:])):
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in chosen * 2))
    return folder


def write_config(toy, tmp_path: Path, family: str, base: Path, rows: Path, parts: dict) -> Path:
    text_only = family in TEXT_FAMILIES
    if text_only:
        parts = {"language_model": parts["language_model"]}
    return toy.config(
        tmp_path,
        model__path=str(base),
        parts=parts,
        data__train=str(rows / ("text.jsonl" if text_only else "all.jsonl")),
        train__steps=3,
        train__global_batch_size=4,
        train__micro_batch_size=3,
        train__gradient_checkpointing=True,
    )


def open_plain(family: str, folder: Path) -> PreTrainedModel:
    auto_class = AutoModelForCausalLM if family in TEXT_FAMILIES else AutoModelForImageTextToText
    return auto_class.from_pretrained(folder, dtype="float32").eval()


@torch.no_grad()
def logits_of(model: PreTrainedModel, family: str, folder: Path, rows: Path) -> torch.Tensor:
    """The model's logits for a question, about an image of odd size where it takes images."""
    image = [] if family in TEXT_FAMILIES else [{"type": "image", "image": Image.open(rows / "a é 1.png")}]
    content = [*image, {"type": "text", "text": "What color?"}] if image else "What color?"
    inputs = load_processor(folder).apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    return model(**inputs).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_a_full_run_is_a_whole_model(family, toy, rows, tiny_folder, tmp_path, run_cli) -> None:
    base, out = tiny_folder(family), tmp_path / "out"
    parts = {"vision_tower": "full", "projector": "full", "language_model": "full"}
    config = write_config(toy, tmp_path, family, base, rows, parts)
    trained = run_cli("train", config, "train.save_every=2")
    assert trained.code == 0, trained.err
    before = logits_of(open_plain(family, base), family, base, rows)
    after = logits_of(open_plain(family, tmp_path / "run/final"), family, tmp_path / "run/final", rows)
    assert (after - before).abs().max() > 1e-2
    assert run_cli("export", tmp_path / "run", "--out", out, "--verify", "off").code == 0
    assert torch.equal(logits_of(open_plain(family, out), family, out, rows), after)

    # The same from the checkpoint of step 2: a resumed run writes the same bits.
    shutil.rmtree(tmp_path / "run/final")
    resumed = run_cli("train", config, "train.save_every=2", "--resume")
    assert resumed.code == 0 and "resuming from" in resumed.out, resumed.err
    written = [folder / "model.safetensors" for folder in (tmp_path / "run/final", out)]
    assert written[0].read_bytes() == written[1].read_bytes()


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_run_merges_to_a_whole_model(family, toy, rows, tiny_folder, tmp_path, run_cli) -> None:
    base, out = tiny_folder(family), tmp_path / "out"
    config = write_config(toy, tmp_path, family, base, rows, {"projector": "full", "language_model": LORA})
    trained = run_cli("train", config)
    assert trained.code == 0, trained.err
    final = tmp_path / "run/final"
    plain = open_plain(family, base)
    before = logits_of(plain, family, base, rows)
    adapter = logits_of(PeftModel.from_pretrained(plain, final).eval(), family, final, rows)
    assert (adapter - before).abs().max() > 1e-2
    assert run_cli("export", tmp_path / "run", "--out", out, "--verify", "off").code == 0
    merged = logits_of(open_plain(family, out), family, out, rows)
    torch.testing.assert_close(merged, adapter, atol=1e-5, rtol=1e-5)

    image = [] if family in TEXT_FAMILIES else ["--image", rows / "a é 1.png"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        answers = [
            run_cli("chat", folder, *image, "--prompt", "What color?", "--max-new-tokens", 4)
            for folder in (tmp_path / "run", out)
        ]
    assert [done.code for done in answers] == [0, 0]
    assert answers[0].out == answers[1].out


def test_a_vision_adapter_merges_to_a_whole_model(toy, rows, tiny_folder, tmp_path, run_cli) -> None:
    """LoRA on the last layer of the tower that the model reads, nothing else: the rest stays the base's."""
    base, final, out = tiny_folder("qwen2.5-vl"), tmp_path / "run/final", tmp_path / "out"
    parts = {"vision_tower": {**LORA, "layers": "-1:", "lora_targets": "attention", "use_dora": True}}
    assert run_cli("train", write_config(toy, tmp_path, "qwen2.5-vl", base, rows, parts)).code == 0
    plain = open_plain("qwen2.5-vl", base)
    before = logits_of(plain, "qwen2.5-vl", base, rows)
    adapter = logits_of(PeftModel.from_pretrained(plain, final).eval(), "qwen2.5-vl", final, rows)
    assert (adapter - before).abs().max() > 1e-4
    assert run_cli("export", tmp_path / "run", "--out", out, "--verify", "off").code == 0
    merged = open_plain("qwen2.5-vl", out)
    torch.testing.assert_close(logits_of(merged, "qwen2.5-vl", out, rows), adapter, atol=1e-5, rtol=1e-5)
    untouched = open_plain("qwen2.5-vl", base).model.language_model.state_dict()
    assert all(torch.equal(merged.model.language_model.state_dict()[k], v) for k, v in untouched.items())


def test_an_adapter_finds_its_base_from_another_directory(toy, tmp_path, run_cli, monkeypatch) -> None:
    """The config says the base's place relative to where it was trained; the adapter says it absolutely."""
    monkeypatch.chdir(toy.base.parent)
    config = toy.config(tmp_path, model__path="base", parts={"language_model": LORA}, train__steps=1)
    assert run_cli("train", config).code == 0
    final = tmp_path / "run/final"
    named = json.loads((final / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(toy.base.resolve())
    monkeypatch.chdir(tmp_path)
    assert run_cli("export", "run", "--out", "merged", "--verify", "off").code == 0
    settings = json.loads((final / "adapter_config.json").read_text()) | {"base_model_name_or_path": "gone/x"}
    (final / "adapter_config.json").write_text(json.dumps(settings))
    lost = run_cli("chat", "run", "--prompt", "x")
    assert lost.code == 1
    assert "the base model gone/x that it names is neither a folder here nor a hub model" in lost.err


def test_an_image_may_be_rare_among_text_rows(toy, tmp_path, run_cli) -> None:
    """The image comes in step 5 of 8. A run that ends before it would leave the projector as it was."""
    image_row = toy.train.read_text().splitlines()[0].replace("images/", f"{toy.train.parent}/images/")
    lines = [json.dumps({"prompt": "Which color has grass?", "completion": "green"})] * 8
    lines[epoch_order(8, seed=0, epoch=0)[4]] = image_row
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    config = toy.config(
        tmp_path,
        parts={"projector": "full"},
        data__train=str(tmp_path / "rows.jsonl"),
        train__steps=5,
        train__global_batch_size=1,
        train__micro_batch_size=1,
    )
    refused = run_cli("train", config, "train.steps=4")
    assert refused.code == 1 and "none of the 4 rows that the run reads first has an image" in refused.err
    assert run_cli("train", config).code == 0
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["grad_norm"] > 0 for line in lines] == [False] * 4 + [True]


def test_a_talk_goes_on_after_a_question_that_cannot_be_asked(tiny_folder, rows, capsys) -> None:
    from partwise.serve.chat import run_chat

    questions = iter(["Is <end_of_turn> a word?", "What color?", ""])
    run_chat(tiny_folder("gemma3"), [str(rows / "a é 0.png")], None, 2, read=lambda _: next(questions))
    told = capsys.readouterr()
    assert told.err.count("error:") == 1 and '"<end_of_turn>" at character' in told.err


def test_chat_names_an_image_or_folder_that_is_not_there(tiny_folder, tmp_path, run_cli) -> None:
    missing = run_cli("chat", tiny_folder("gemma3"), "--image", tmp_path / "no.png", "--prompt", "x")
    assert missing.code == 1 and f"--image: there is no file {tmp_path / 'no.png'}" in missing.err
    (tmp_path / "file").touch()
    for name, words in (("file", "is a file, not a folder"), ("nothing", "does not exist")):
        done = run_cli("chat", tmp_path / name, "--prompt", "x")
        assert done.code == 1 and words in done.err


@pytest.mark.parametrize("family", ["gemma3", "llava-next", "qwen2.5-vl", "llama"])
def test_a_quantised_run_resumes_and_merges(family, toy, rows, tiny_folder, tmp_path, run_cli) -> None:
    """QLoRA with 8-bit states; the reference of the merged model is the adapter on the 4-bit base."""
    base, out = tiny_folder(family), tmp_path / "out"
    qlora = {**LORA, "lora_rank": 64, "quantization": "nf4"}
    config = write_config(toy, tmp_path, family, base, rows, {"projector": "full", "language_model": qlora})
    overrides = ("train.save_every=2", "train.optimizer_states=8bit")
    trained = run_cli("train", config, *overrides)
    assert trained.code == 0, trained.err
    final = tmp_path / "run/final"
    first = (final / "adapter_model.safetensors").read_bytes()
    state = load_file(tmp_path / "run/checkpoints/step-000002/training_state/optimizer.safetensors")
    assert any(name.startswith("root_codes/") for name in state)
    shutil.rmtree(final)
    resumed = run_cli("train", config, *overrides, "--resume")
    assert resumed.code == 0 and "resuming from" in resumed.out, resumed.err
    assert (final / "adapter_model.safetensors").read_bytes() == first

    before = logits_of(open_plain(family, base), family, base, rows)
    adapter = logits_of(open_adapter(final, "float32").model, family, final, rows)
    assert (adapter - before).abs().max() > 1e-2
    assert run_cli("export", tmp_path / "run", "--out", out).code == 0
    merged = logits_of(open_plain(family, out), family, out, rows)
    torch.testing.assert_close(merged, adapter, atol=1e-4, rtol=0)
    answers = [
        run_cli("chat", folder, "--prompt", "What color?", "--max-new-tokens", 4) for folder in (final, out)
    ]
    assert answers[0].code == 0 and answers[0].out == answers[1].out
