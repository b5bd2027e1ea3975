"""The commands end to end: what one writes, the next reads, the last in a fresh process without Partwise."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor

ROOT = Path(__file__).parents[2]
ASK = """
import json, sys
from pathlib import Path
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
folder, rows_file = sys.argv[1], Path(sys.argv[2])
processor = AutoProcessor.from_pretrained(folder)
model = AutoModelForImageTextToText.from_pretrained(folder)
rows = [json.loads(line) for line in rows_file.read_text().splitlines()]
right = 0
for row in rows:
    text = row["messages"][0]["content"].removeprefix("<image>")
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    image = Image.open(rows_file.parent / row["images"][0])
    inputs = processor(text=[prompt], images=[[image]], add_special_tokens=False, return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    answer = processor.decode(out[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True).strip()
    right += answer == row["messages"][1]["content"]
assert "partwise" not in sys.modules
print(right / len(rows))
"""


@pytest.fixture(scope="module")
def trained(toy, tmp_path_factory):
    """A run that learned the colours, trained through the Python door."""
    import partwise

    folder = tmp_path_factory.mktemp("trained")
    # As in base models, generation stops at the end of a text only: training must add the end of a turn.
    base = shutil.copytree(toy.base, folder / "base")
    stops = json.loads((base / "generation_config.json").read_text())
    (base / "generation_config.json").write_text(json.dumps({**stops, "eos_token_id": 1}))
    config = toy.config(
        folder,
        model__path=str(base),
        train__steps=90,
        train__warmup_steps=10,
        train__eval_every=45,
        data__eval=str(toy.held_out),
    )
    partwise.train(partwise.load_config(config))
    return folder / "run"


def read_metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_the_toy_task_is_learned_and_answered_without_partwise(trained, toy, run_python) -> None:
    losses = [line["loss"] for line in read_metrics(trained) if "loss" in line]
    assert losses[0] > 4 and losses[-1] < 0.1
    assert [line["eval_loss"] for line in read_metrics(trained) if "eval_loss" in line][-1] < 0.1
    done = run_python(ASK, trained / "final", toy.held_out)
    assert done.code == 0, done.err
    assert float(done.out.split()[-1]) >= 0.95


def test_the_run_folder_holds_what_the_docs_say(trained) -> None:
    names = {path.name for path in trained.iterdir()}
    assert {"config.yaml", "plan.json", "report.json", "metrics.jsonl", "plots", "final"} <= names
    assert (trained / "plots/curves.png").stat().st_size > 10_000
    final = {path.name for path in (trained / "final").iterdir()}
    assert {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "processor_config.json",
        "chat_template.jinja",
        "partwise.json",
    } <= final


def test_generation_stops_at_the_end_of_a_turn(trained, toy) -> None:
    """Of 20 tokens allowed, an answer takes the word and the mark."""
    final = trained / "final"
    processor = AutoProcessor.from_pretrained(final)
    model = AutoModelForImageTextToText.from_pretrained(final)
    end = processor.tokenizer.convert_tokens_to_ids("<end_of_turn>")
    assert model.generation_config.eos_token_id == [1, end]
    content = [
        {"type": "image", "image": str(toy.held_out.parent / "images/002.png")},
        {"type": "text", "text": toy.question},
    ]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    output = model.generate(**inputs, max_new_tokens=20, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert output[-1] == end and len(output) < 20


def test_chat_answers_about_an_image(trained, toy, run_cli) -> None:
    image = toy.held_out.parent / "images/002.png"
    done = run_cli("chat", trained, "--image", image, "--prompt", toy.question)
    assert (done.code, done.out.strip()) == (0, "blue")


def test_export_copies_a_full_run_and_never_writes_over_anything(trained, tmp_path, run_cli) -> None:
    out = tmp_path / "model"
    assert run_cli("export", trained, "--out", out, "--verify", "off").code == 0
    assert (out / "model.safetensors").read_bytes() == (trained / "final/model.safetensors").read_bytes()
    again = run_cli("export", trained, "--out", out, "--verify", "off")
    assert again.code == 1 and f"{out} exists already" in again.err
    merged = run_cli("export", trained, "--out", tmp_path / "merged", "--to", "adapter")
    assert merged.code == 1 and "was trained full and has no adapter" in merged.err
    assert not (tmp_path / "merged").exists()


def test_a_lora_run_loads_in_peft_and_merges_to_the_same_logits(toy, tmp_path, run_cli) -> None:
    config = toy.config(
        tmp_path,
        parts={
            "projector": "full",
            "language_model": {"mode": "lora", "lora_rank": 4, "learning_rate": 1e-2},
        },
    )
    assert run_cli("train", config).code == 0
    final, merged = tmp_path / "run/final", tmp_path / "merged"
    assert not (final / "model.safetensors").exists()
    assert run_cli("export", tmp_path / "run", "--out", merged, "--verify", "off").code == 0
    inputs = {"input_ids": torch.arange(10, 40)[None]}
    base = AutoModelForImageTextToText.from_pretrained(toy.base).eval()
    with torch.no_grad():
        base_logits = base(**inputs).logits
        adapter_logits = PeftModel.from_pretrained(base, final).eval()(**inputs).logits
        merged_logits = AutoModelForImageTextToText.from_pretrained(merged).eval()(**inputs).logits
    assert (adapter_logits - base_logits).abs().max() > 1e-2
    torch.testing.assert_close(merged_logits, adapter_logits, atol=1e-5, rtol=1e-5)
    answer = run_cli("chat", tmp_path / "run", "--prompt", toy.question, "--max-new-tokens", 3)
    assert answer.code == 0


def test_check_prints_the_plan_and_writes_nothing(toy, tmp_path, run_cli) -> None:
    done = run_cli("check", toy.config(tmp_path), "parts.vision_tower=frozen")
    assert done.code == 0, done.out + done.err
    assert "first loss" in done.out and "gradients reach" in done.out and "frozen" in done.out
    assert not (tmp_path / "run").exists()


def test_checks_are_chosen_by_id_and_reported_as_json(toy, tmp_path, run_cli) -> None:
    config, report = toy.config(tmp_path), tmp_path / "report.json"
    listed = run_cli("check", "--list").out
    docs = "".join((ROOT / f"docs/{page}.md").read_text() for page in ("check", "data"))
    assert [line for line in listed.splitlines() if f"| `{line.split()[0]}` |" not in docs] == []
    assert [line.split()[0] for line in listed.splitlines()][:4] == ["config", "packages", "output", "model"]
    done = run_cli("check", config, "--only", "plan", "--only", "disk", "--skip", "disk", "--report", report)
    assert done.code == 0, done.err
    assert {finding["check"] for finding in json.loads(report.read_text())} == {"plan"}
    assert "plan:" in done.out and "step:" not in done.out
    unknown = run_cli("check", config, "--only", "plann")
    assert unknown.code == 1 and "Did you mean plan?" in unknown.err
    missing = run_cli("check")
    assert missing.code == 1 and "check needs a config file" in missing.err


def test_preview_shows_what_is_trained(toy, tmp_path, run_cli) -> None:
    done = run_cli("preview", toy.config(tmp_path), "--row", "1")
    assert done.code == 0, done.err
    assert "What color is the square?" in done.out and "green" in done.out and "28x28" in done.out
    beyond = run_cli("preview", toy.config(tmp_path), "--row", "160")
    assert beyond.code == 1 and "has 160 rows" in beyond.err


def test_parts_prints_the_tree_of_a_model_and_the_plan_of_a_config(toy, tmp_path, run_cli) -> None:
    tree = run_cli("parts", toy.base)
    assert tree.code == 0, tree.err
    for word in (
        "Gemma3ForConditionalGeneration",
        "model.vision_tower",
        "model.multi_modal_projector",
        "float32",
    ):
        assert word in tree.out
    plan = run_cli("parts", toy.config(tmp_path, parts={"projector": "full"}))
    assert plan.code == 0 and "frozen" in plan.out


def test_plot_lays_runs_over_each_other(trained, run_cli) -> None:
    picture, page = trained / "plots/curves.png", trained / "plots/curves.html"
    picture.unlink()
    page.unlink()
    done = run_cli("plot", trained, trained, "--x", "tokens", "--smooth", "0.1")
    assert done.code == 0 and done.out.split() == ["wrote", str(picture), "wrote", str(page)]
    assert picture.stat().st_size > 10_000 and '"axis":"tokens","smoothing":0.1' in page.read_text()


def test_schema_is_json_with_every_section(run_cli) -> None:
    schema = json.loads(run_cli("schema").out)
    assert {"model", "parts", "data", "train", "engine", "output"} <= set(schema["properties"])


def test_tiny_writes_a_folder_that_parts_reads(tmp_path, run_cli) -> None:
    assert run_cli("tiny", "llama", tmp_path / "llama").code == 0
    assert "LlamaForCausalLM" in run_cli("parts", tmp_path / "llama").out
    unknown = run_cli("tiny", "gemma4", tmp_path / "x")
    assert unknown.code == 1 and "Did you mean gemma3" in unknown.err
