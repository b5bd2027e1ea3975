"""What one run saves is the base of the next: full, LoRA, merged, LoRA, full; and adapters beside each other.

The judge of every link is one fresh process that knows plain transformers and PEFT only: it computes logits
for the folders that it is given, each opened as its files say.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from partwise.export import folder as export_folder
from partwise.model.load import load_processor

FAMILIES = ("gemma3", "llava-next", "qwen2.5-vl")
LORA = {"mode": "lora", "lora_rank": 4, "learning_rate": 1e-2}
JUDGE = """
import json, sys
from pathlib import Path
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText
def open_folder(folder):
    settings = Path(folder) / "adapter_config.json"
    if not settings.is_file():
        model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
        assert not any(info.values()), (folder, info)
        return model.eval()
    base = open_folder(json.loads(settings.read_text())["base_model_name_or_path"])
    return PeftModel.from_pretrained(base, folder).eval()
inputs, out, *folders = sys.argv[1:]
inputs = load_file(inputs)
with torch.no_grad():
    save_file({str(i): open_folder(folder)(**inputs).logits for i, folder in enumerate(folders)}, out)
assert "partwise" not in sys.modules
"""


@pytest.fixture
def judge(run_python, tmp_path):
    """Logits of folders, in their order, for a question about an image, from one fresh process."""

    def logits(probe: Path, *folders: Path) -> list[torch.Tensor]:
        done = run_python(JUDGE, probe, tmp_path / "logits", *folders)
        assert done.code == 0, done.err[-2000:]
        found = load_file(tmp_path / "logits")
        return [found[str(i)] for i in range(len(folders))]

    return logits


@pytest.fixture(scope="module")
def question(tiny_folder, make_image, tmp_path_factory):
    """By family, a file with the model's inputs for a question about an image."""

    def inputs(family: str) -> Path:
        path = tmp_path_factory.mktemp("question") / "inputs"
        content = [{"type": "image", "image": make_image((50, 40))}, {"type": "text", "text": "What is it?"}]
        made = load_processor(tiny_folder(family)).apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        save_file(dict(made), path)
        return path

    return inputs


@pytest.fixture
def train(toy, tmp_path, run_cli):
    """A run of two steps; its name, base and parts -> the run folder."""

    def run(name: str, base: Path, parts: dict, *overrides: str) -> Path:
        config = toy.config(tmp_path / name, model__path=str(base), parts=parts, train__steps=2)
        done = run_cli("train", config, "train.global_batch_size=4", "train.micro_batch_size=4", *overrides)
        assert done.code == 0, done.err
        return tmp_path / name / "run"

    return run


def export(run_cli, out: Path, *arguments: object) -> Path:
    done = run_cli("export", *arguments, "--out", out, "--verify", "off")
    assert done.code == 0, done.err
    return out


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_full_then_lora_then_merged_then_lora_then_full(
    family, tiny_folder, question, train, judge, run_cli, tmp_path
) -> None:
    everything = {"vision_tower": "full", "projector": "full", "language_model": "full"}
    full = train("full", tiny_folder(family), everything)
    lora = train("lora", full / "final", {"projector": "full", "language_model": LORA})
    merged = export(run_cli, tmp_path / "merged", lora)
    second = train("second", merged, {"language_model": {**LORA, "use_dora": True}})
    again = export(run_cli, tmp_path / "again", second)
    last = train("last", again, everything)
    copied = export(run_cli, tmp_path / "copied", last)

    links = [full / "final", lora / "final", merged, second / "final", again, last / "final", copied]
    logits = judge(question(family), tiny_folder(family), *links)
    same, learned = 1e-5, 1e-3
    expected = [learned, learned, same, learned, same, learned, same]
    for (before, after), limit, link in zip(pairwise(logits), expected, links, strict=True):
        far = distance(after, before)
        assert far > learned if limit == learned else far <= same, (link, far)


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_of_one_base_are_merged_by_weights(
    family, tiny_folder, question, train, judge, run_cli, tmp_path
) -> None:
    """LoRA with the projector in full, and DoRA with rsLoRA: each weight is base + 0.7 da + 0.3 db."""
    base = tiny_folder(family)
    first = train("first", base, {"projector": "full", "language_model": LORA})
    second = train("second", base, {"language_model": {**LORA, "use_dora": True, "use_rslora": True}})
    alone = [export(run_cli, tmp_path / f"alone-{run.parent.name}", run) for run in (first, second)]
    both, verify = tmp_path / "both", "sample" if family == "gemma3" else "off"
    done = run_cli("export", first, second, "--weights", "0.7,0.3", "--out", both, "--verify", verify)
    assert done.code == 0 and ("logits differ by" in done.out) == (verify == "sample"), done.err

    start, one, two, mixed = (load_file(f / "model.safetensors") for f in (base, *alone, both))
    assert start.keys() == mixed.keys()
    for name, tensor in start.items():
        expected = tensor + 0.7 * (one[name] - tensor) + 0.3 * (two[name] - tensor)
        torch.testing.assert_close(mixed[name], expected, atol=1e-6, rtol=1e-5)
    assert any(
        not torch.equal(one[name], start[name]) for name in start if "multi_modal" in name or "merger" in name
    )

    folders = [first / "final", alone[0], second / "final", alone[1], both]
    logits = judge(question(family), *folders)
    assert distance(logits[1], logits[0]) <= 1e-5 and distance(logits[3], logits[2]) <= 1e-5
    assert min(distance(logits[4], logits[1]), distance(logits[4], logits[3])) > 1e-3


def test_a_merge_in_bfloat16_is_done_in_fp32_and_tells_its_rounding(toy, train, run_cli, tmp_path) -> None:
    run = train("run", toy.base, {"language_model": LORA})
    whole, half = (tmp_path / name for name in ("whole", "half"))
    export(run_cli, whole, run)
    done = run_cli("export", run, "--out", half, "--dtype", "bfloat16", "--max-shard-size", "200KB")
    assert done.code == 0, done.err
    assert "merged 14 weights in fp32; rounding to bfloat16 took" in done.out
    assert "logits differ by" in done.out and "the adapter moves them by" in done.out
    index = json.loads((half / "model.safetensors.index.json").read_text())
    config = json.loads((half / "config.json").read_text())
    assert {config["dtype"], config["text_config"]["dtype"]} == {"bfloat16"}
    shards = {name: tensor for file in half.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert len(set(index["weight_map"].values())) > 1 and index["weight_map"].keys() == shards.keys()
    exact = load_file(whole / "model.safetensors")
    assert all(torch.equal(shards[name], tensor.bfloat16()) for name, tensor in exact.items())


def test_what_cannot_be_merged_is_refused(toy, train, run_cli, tmp_path, tiny_folder) -> None:
    adapter = train("adapter", toy.base, {"language_model": LORA})
    full = train("full", toy.base, {"language_model": "full"})
    other = train("other", full / "final", {"language_model": LORA})
    out = tmp_path / "out"
    refused = {
        ("--to", "adapter", full): "was trained full and has no adapter",
        (adapter, full, "--weights", "1,1"): "only adapters can be merged by weights",
        (adapter, other, "--weights", "1,1"): "adapters of different bases cannot be merged",
        (adapter, other): "--weights has 0 numbers for 2 runs",
        (adapter, other, "--to", "adapter"): "2 adapters make no single one",
        (adapter, "--weights", "0.5,x"): "--weights 0.5,x is not a list of numbers",
        (adapter, "--weights", "0"): "the model equals its base bit for bit",
        (adapter, "--max-shard-size", "5 gigabytes"): "--max-shard-size 5 gigabytes",
    }
    for arguments, words in refused.items():
        done = run_cli("export", *arguments, "--out", out)
        assert done.code == 1 and words in done.err, (arguments, done.err)
        assert not out.exists() and not (tmp_path / ".out.partial").exists()


def test_an_adapter_that_learned_nothing_is_not_merged(toy, train, run_cli, tmp_path) -> None:
    run = train("run", toy.base, {"language_model": LORA})
    file = run / "final/adapter_model.safetensors"
    zeroed = {name: t.zero_() if "lora_B" in name else t for name, t in load_file(file).items()}
    save_file(zeroed, file, metadata={"format": "pt"})
    (run / "final/partwise.json").unlink()  # else it counts as damaged
    done = run_cli("export", run, "--out", tmp_path / "out")
    assert done.code == 1 and "learned nothing" in done.err and not (tmp_path / "out").exists()


def test_an_adapter_is_exported_as_peft_reads_it(toy, train, run_cli, tmp_path) -> None:
    """Also from a checkpoint, without what only training needs."""
    run = train("run", toy.base, {"projector": "full", "language_model": LORA}, "train.save_every=2")
    out = export(run_cli, tmp_path / "out", run / "checkpoints/step-000002", "--to", "adapter")
    assert (out / "adapter_model.safetensors").read_bytes() == (
        run / "final/adapter_model.safetensors"
    ).read_bytes()
    assert not (out / "training_state").exists()


def test_an_export_that_is_not_what_was_trained_leaves_nothing(
    toy, train, run_cli, tmp_path, monkeypatch
) -> None:
    run = train("run", toy.base, {"projector": "full", "language_model": LORA})
    merge = export_folder.write_merged

    def forget_the_projector(sources, weights, out, *settings, **options):
        written = merge(sources, weights, out, *settings, **options)
        tensors, base = load_file(out / "model.safetensors"), load_file(toy.base / "model.safetensors")
        tensors |= {name: tensor for name, tensor in base.items() if "projector" in name}
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
        return written

    monkeypatch.setattr(export_folder, "write_merged", forget_the_projector)
    done = run_cli("export", run, "--out", tmp_path / "out")
    assert done.code == 1 and f"{tmp_path / 'out'} is not the trained model" in done.err, done.err
    assert "differ by" in done.err
    assert not (tmp_path / "out").exists()
