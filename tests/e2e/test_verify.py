"""A fresh process looks at what was saved: it costs seconds, and it notices what a load does not.

Each damage below is one that plain transformers or PEFT opens without an error.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import partwise
from partwise import run as run_module
from partwise.errors import CheckpointError
from partwise.lineage.reload import examine
from partwise.lineage.verify import Probe, judge, start_verification, write_job
from partwise.training import verifier as verifier_module
from partwise.training.job import Job
from partwise.training.probe import probe_examples

LORA = {"mode": "lora", "lora_rank": 4, "learning_rate": 1e-2}
PARTS = {
    "full": {"vision_tower": "full", "projector": "full", "language_model": "full"},
    "adapter": {"projector": "full", "language_model": LORA},
}


@pytest.fixture(scope="module")
def verified(toy, tmp_path_factory) -> Callable[[str], tuple[Path, Probe]]:
    """By kind, the final folder of a short run that was verified, and the probe of its model."""
    made: dict[str, tuple[Path, Probe]] = {}

    def make(kind: str) -> tuple[Path, Probe]:
        if kind not in made:
            config = toy.config(
                tmp_path_factory.mktemp(kind), parts=PARTS[kind], train__steps=2, train__verify="sample"
            )
            probes = []

            def keep_probe(folder, probe, **options):
                probes.append(probe)
                return start_verification(folder, probe, **options)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(run_module, "start_verification", keep_probe)
                made[kind] = partwise.train(partwise.load_config(config)), probes[0]
        return made[kind]

    return make


@pytest.mark.parametrize("kind", PARTS)
def test_a_run_reports_what_a_fresh_process_found(kind, verified) -> None:
    final, probe = verified(kind)
    report = json.loads((final.parent / "report.json").read_text())
    (finding,) = (line for line in report if line["check"] == "verify")
    assert re.fullmatch(
        r"verified in a fresh process: logits differ by \S+ of their norm, \d+\.\d s", finding["message"]
    )
    values = finding["values"]
    assert values["relative_error"] < 1e-5 and not values["imports_partwise"]
    assert values["seconds"] > 1  # an interpreter with torch and transformers is never faster
    assert "pixel_values" in probe.rows[0] and probe.logits[0].shape == (16, 512)


def drop_a_tensor(folder: Path) -> None:
    change(folder, lambda tensors: tensors.pop(projector(tensors)))


def drop_a_lora_tensor(folder: Path) -> None:
    change(folder, lambda tensors: tensors.pop(next(name for name in tensors if "lora_B" in name)))


def add_a_tensor(folder: Path) -> None:
    change(folder, lambda tensors: tensors.update(stray=torch.zeros(3)))


def change_the_projector(folder: Path) -> None:
    change(folder, lambda tensors: tensors[projector(tensors)].mul_(1.05))


def change_the_tokenizer(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["merges"] = []
    (folder / "tokenizer.json").write_text(json.dumps(content))


def remove_the_processor(folder: Path) -> None:
    (folder / "processor_config.json").unlink()


def remove_the_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


def change(folder: Path, edit: Callable[[dict], object]) -> None:
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def projector(tensors: dict) -> str:
    return next(name for name in tensors if "mm_input_projection_weight" in name)


@pytest.mark.parametrize(
    ("kind", "damage", "told"),
    [
        ("full", drop_a_tensor, r"1 tensors were newly initialised.*mm_input_projection_weight"),
        ("full", add_a_tensor, r"1 tensors of the files have no place in the model: stray"),
        ("full", change_the_projector, r"logits of 1 rows differ by \S+ of their norm.*at most 1e-04"),
        ("full", remove_the_processor, r"it has no processor \(neither processor_config"),
        ("full", change_the_tokenizer, r"its tokenizer \(\d+ tokens\) writes other ids"),
        ("full", remove_the_template, r"its chat template is not the one of the training"),
        ("adapter", drop_a_tensor, r"the adapter file lacks .*mm_input_projection_weight"),
        ("adapter", drop_a_lora_tensor, r"1 tensors were newly initialised, because the adapter file lacks"),
        ("adapter", add_a_tensor, r"1 tensors of the adapter file have no place in the model: stray"),
        ("adapter", change_the_projector, r"logits of 1 rows differ by"),
    ],
)
def test_damage_is_noticed_and_named(kind, damage, told, verified, tmp_path) -> None:
    final, probe = verified(kind)
    folder = tmp_path / "copy"
    shutil.copytree(final, folder)
    damage(folder)
    # What the fresh process does, in this one, to save the seconds of its start.
    result = {**examine(write_job(tmp_path, folder, probe)), "imports_partwise": False}
    with pytest.raises(CheckpointError, match=told) as error:
        judge(folder, probe, result)
    assert str(error.value).startswith(f"{folder} is not the trained model when a fresh process loads it: ")


def test_a_process_that_cannot_end_is_a_warning_and_one_can_be_cancelled(verified) -> None:
    final, probe = verified("full")
    killed = start_verification(final, probe)
    killed.process.kill()
    finding = killed.finish()
    assert finding.level == "warning" and "was not verified" in finding.message
    cancelled = start_verification(final, probe)
    assert not cancelled.is_done()
    cancelled.cancel()
    assert cancelled.is_done() and not Path(cancelled.scratch.name).exists()


def test_a_final_that_is_not_the_trained_model_is_put_aside(toy, tmp_path, run_cli, monkeypatch) -> None:
    """The run counts as unfinished then, and goes on from its checkpoint."""

    def damaged(folder, probe, **options):
        change_the_projector(folder)
        return start_verification(folder, probe)

    config = toy.config(tmp_path, train__steps=2, train__save_every=2, train__verify="sample")
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "start_verification", damaged)
        refused = run_cli("train", config)
    assert refused.code == 1 and "is not the trained model" in refused.err
    assert f"It stands at {tmp_path / 'run/final-refused'} now." in refused.err
    assert not (tmp_path / "run/final").exists()
    resumed = run_cli("train", config, "--resume", "train.verify=off")
    assert resumed.code == 0 and "verified" not in resumed.out, resumed.err
    assert (tmp_path / "run/final/partwise.json").is_file()


def test_a_rare_image_is_found_and_long_rows_are_cut(toy, tmp_path, tiny_folder) -> None:
    """Rows that training drops are no probe; of a long answer the beginning is enough."""
    text = {"prompt": "Which color has grass?", "completion": "green " * 400}
    image = json.loads(toy.train.read_text().splitlines()[0])
    image["images"] = [str(toy.train.parent / name) for name in image["images"]]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, [text] * 70 + [image])))
    config = toy.config(tmp_path, data__train=str(tmp_path / "rows.jsonl"), data__max_seq_len=2000)
    loader = Job(partwise.load_config(config)).loader
    short, with_image = probe_examples(loader)
    assert len(short.input_ids) == 256 and not short.media and "pixel_values" in with_image.media
    strict = partwise.load_config(config, ["data.overlong=drop", "data.max_seq_len=100"])
    assert [bool(example.media) for example in probe_examples(Job(strict).loader)] == [True]


def test_limits_are_those_of_type_and_device(verified) -> None:
    """bfloat16 on another device has room for its noise; a NaN is never allowed."""
    final, probe = verified("full")
    half = replace(probe, dtype="bfloat16", device="cuda:0")
    found = {"device": "cpu", "dtype": "bfloat16", "num_rows": 1, "seconds": 9.0, "imports_partwise": False}
    told = judge(final, half, {**found, "relative_error": 0.05}).message
    assert told == "verified in a fresh process on the cpu: logits differ by 0.05 of their norm, 9.0 s"
    refused = [(half, found, 0.2), (half, {**found, "device": "cuda"}, 0.05), (half, found, float("nan"))]
    for asked, result, error in refused:
        with pytest.raises(CheckpointError, match="differ by"):
            judge(final, asked, {**result, "relative_error": error})


def test_checkpoints_are_compared_while_training_goes_on(toy, tmp_path, run_cli) -> None:
    """The first of the two; the other is taken while that one is still being compared."""
    settings = {"train__save_every": 2, "train__keep_last": 1, "train__verify": "sample"}
    config = toy.config(tmp_path, train__steps=4, **settings)
    done = run_cli("train", config)
    assert done.code == 0, done.err
    assert "step-000002: verified in a fresh process: logits differ by" in done.out
    report = json.loads((tmp_path / "run/report.json").read_text())
    verified = [f["values"] for f in report if f["check"] == "verify"]
    assert [values.get("step") for values in verified] == [2, None]
    assert all(values["relative_error"] < 1e-4 for values in verified)
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-000004"]
    # The same weights as without all of it.
    quiet = toy.config(tmp_path / "quiet", train__steps=4)
    assert run_cli("train", quiet).code == 0
    weights = [folder / "run/final/model.safetensors" for folder in (tmp_path, tmp_path / "quiet")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_checkpoint_that_is_not_the_trained_model_ends_the_run(toy, tmp_path, run_cli, monkeypatch) -> None:
    def damaged(folder, probe, **options):
        change_the_projector(folder)
        return start_verification(folder, probe, **options)

    monkeypatch.setattr(verifier_module, "start_verification", damaged)
    config = toy.config(tmp_path, train__steps=4, train__save_every=2, train__verify="sample")
    done, checkpoints = run_cli("train", config), tmp_path / "run/checkpoints"
    assert done.code == 1 and "is not the trained model when a fresh process loads it" in done.err
    assert f"It stands at {checkpoints}/refused-step-000002 now." in " ".join(done.err.split())
    assert {path.name for path in checkpoints.iterdir()} == {"refused-step-000002", "step-000004"}
    assert not (tmp_path / "run/final").exists()
