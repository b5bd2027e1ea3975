"""Checkpoint folders: what is in them, that they load without Partwise, and what a broken write harms."""

from __future__ import annotations

import hashlib
import json
import os
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from partwise.config import Config, ModelConfig
from partwise.engine.fsdp import Fsdp
from partwise.engine.join import connected_alone
from partwise.errors import CheckpointError, TrainingError
from partwise.lineage.checksums import verify_files
from partwise.lineage.manifest import make_manifest, read_manifest, stamp_manifest
from partwise.lineage.origin import model_record
from partwise.model.load import empty_model, load_model
from partwise.model.parts import apply_plan, resolve_plan
from partwise.training.checkpoint import (
    load_checkpoint,
    model_state,
    newest_checkpoint,
    rotate_checkpoints,
    save_checkpoint,
    save_final,
    state_names,
    torn_checkpoints,
    training_state,
    write_model,
)
from partwise.training.optim import Optimizer

FULL = {"projector": "full", "language_model": "full"}
LORA = {"projector": "full", "language_model": {"mode": "lora", "lora_rank": 4}}
IDS = torch.tensor([[2, 20, 30, 40, 50, 60]])


class Run:
    """A tiny model with a plan and an optimizer that has made one step; what the loop has at hand."""

    def __init__(self, base: Path, folder: Path, parts: dict, dtype: str = "float32") -> None:
        self.folder = folder
        self.data = folder.parent / "rows.jsonl"
        if not self.data.exists():
            self.data.write_text("{}\n")
        config = Config.model_validate(
            {
                "model": {"path": str(base)},
                "parts": parts,
                "data": {"train": str(self.data)},
                "output": str(folder),
            }
        )
        self.loaded = load_model(ModelConfig(path=str(base), dtype=dtype))
        self.plan = resolve_plan(self.loaded.model, config)
        apply_plan(self.loaded.model, self.plan)
        self.optimizer = Optimizer(self.loaded.model, self.plan, config.train, 9)
        self.manifest = self.make_manifest()

    def make_manifest(self) -> dict[str, Any]:
        base = model_record(Path(self.loaded.path), self.loaded.name, empty_model(self.loaded.path))
        return make_manifest(self.plan, base, [self.data], "float32")

    def step(self) -> None:
        self.logits().float().square().mean().backward()
        self.optimizer.step(0)

    def logits(self) -> torch.Tensor:
        self.loaded.model.eval()
        return self.loaded.model(input_ids=IDS, use_cache=False).logits

    def save(self, step: int, eval_loss: float | None = None) -> Path:
        manifest = stamp_manifest(self.manifest, step, eval_loss)
        state = training_state(self.loaded, self.plan, self.optimizer)
        return save_checkpoint(self.folder, self.loaded, self.plan, state, manifest)


@pytest.fixture
def run(tiny_folder, tmp_path) -> Run:
    run = Run(tiny_folder("gemma3"), tmp_path / "run", FULL)
    run.step()
    return run


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_full_checkpoint_is_a_whole_hugging_face_folder(run):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = run.save(5)
    assert folder == run.folder / "checkpoints" / "step-000005"
    assert files_in(folder) == {
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "partwise.json",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "training_state/optimizer.safetensors",
    }
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    assert torch.equal(model(input_ids=IDS, use_cache=False).logits, run.logits())
    processor = AutoProcessor.from_pretrained(folder)
    assert processor.chat_template == run.loaded.processor.chat_template


def test_adapter_checkpoint_loads_with_plain_peft(tiny_folder, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    base = tiny_folder("gemma3")
    run = Run(base, tmp_path / "run", LORA)
    run.step()
    run.step()
    folder = save_final(run.folder, run.loaded, run.plan, stamp_manifest(run.manifest, 2))
    assert folder == run.folder / "final"
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"} <= files_in(folder)
    assert "model.safetensors" not in files_in(folder) and not (folder / "training_state").exists()

    plain = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    before = plain(input_ids=IDS, use_cache=False).logits
    adapted = PeftModel.from_pretrained(plain, folder)(input_ids=IDS, use_cache=False).logits
    torch.testing.assert_close(adapted, run.logits(), rtol=1e-5, atol=1e-6)
    assert not torch.equal(adapted, before)


def test_manifest_tells_where_the_folder_comes_from(run, tiny_folder):
    manifest = read_manifest(run.save(5))
    assert manifest == json.loads((run.folder / "checkpoints/step-000005/partwise.json").read_text())
    assert (manifest["kind"], manifest["step"]) == ("full", 5)
    base = model_record(tiny_folder("gemma3"), str(tiny_folder("gemma3")), empty_model(tiny_folder("gemma3")))
    assert manifest["base"] == {key: base[key] for key in ("path", "fingerprint", "parts")}
    assert manifest["parents"] == [base] and base["kind"] == "model"
    assert set(base["parts"]) == {"vision_tower", "projector", "language_model"}
    assert {part: plan["mode"] for part, plan in manifest["plan"].items()} == {
        "vision_tower": "frozen",
        "projector": "full",
        "language_model": "full",
    }
    assert set(manifest["versions"]) == {"partwise", "torch", "transformers", "peft"}
    assert read_manifest(run.folder) is None


@pytest.mark.parametrize("parts", [FULL, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_restores_every_bit(tiny_folder, tmp_path, parts, dtype):
    torch.manual_seed(0)
    run = Run(tiny_folder("gemma3"), tmp_path / "run", parts, dtype)
    run.step()
    folder = run.save(1)
    torch.manual_seed(1)  # other adapters at the start: the checkpoint's must win
    other = Run(tiny_folder("gemma3"), tmp_path / "run", parts, dtype)
    assert not torch.equal(other.logits(), run.logits())
    assert load_checkpoint(folder, other.optimizer, other.manifest) == 1
    expected = run.optimizer.state_dict()
    assert expected.keys() == other.optimizer.state_dict().keys()
    for name, tensor in other.optimizer.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    for name, tensor in other.loaded.model.state_dict().items():
        assert torch.equal(tensor, run.loaded.model.state_dict()[name]), name


def test_newest_is_the_newest_whole_one(run):
    assert newest_checkpoint(run.folder) is None
    folders = [run.save(step) for step in (999_999, 1_000_000, 1_000_001)]
    (folders[2] / "partwise.json").unlink()
    (run.folder / "checkpoints" / ".step-2000000.partial").mkdir()
    assert newest_checkpoint(run.folder) == folders[1]


def test_rotation_keeps_the_last_whole_ones_and_sweeps_torn_ones(run):
    folders = [run.save(step) for step in (1, 2, 3, 4)]
    (folders[3] / "partwise.json").unlink()
    torn = run.folder / "checkpoints" / ".step-000005.partial"
    torn.mkdir()
    mine = run.folder / "checkpoints" / "mine"
    mine.mkdir()
    assert torn_checkpoints(run.folder) == [torn, folders[3]]
    rotate_checkpoints(run.folder, keep_last=2)
    assert sorted((run.folder / "checkpoints").iterdir()) == [mine, *folders[1:3]]
    assert torn_checkpoints(run.folder) == []


def test_rotation_keeps_the_best_besides(run):
    losses = {1: 0.5, 2: 0.3, 3: None, 4: 0.4, 5: 0.3, 6: 0.9}
    folders = {step: run.save(step, eval_loss=loss) for step, loss in losses.items()}
    assert read_manifest(folders[1])["eval_loss"] == 0.5 and "eval_loss" not in read_manifest(folders[3])
    (folders[2] / "partwise.json").write_text("{")  # damaged: it has no loss to be kept for
    rotate_checkpoints(run.folder, keep_last=1, keep_best=2)
    assert sorted((run.folder / "checkpoints").iterdir()) == [folders[step] for step in (4, 5, 6)]


@pytest.fixture
def full_disk():
    """Files cannot grow past 64 KiB, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_told_and_harms_nothing(run, request):
    kept, final = run.save(1), save_final(run.folder, run.loaded, run.plan, stamp_manifest(run.manifest, 1))
    before = {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}
    request.getfixturevalue("full_disk")
    with pytest.raises(TrainingError) as caught:
        run.save(2)
    text = str(caught.value)
    assert text.startswith(f"cannot write {run.folder}/checkpoints/step-000002: ")
    assert text.endswith(
        "Earlier checkpoints are untouched: free space or make the folder writable, then resume."
    )
    with pytest.raises(TrainingError, match=r"cannot write .*/final: "):
        save_final(run.folder, run.loaded, run.plan, stamp_manifest(run.manifest, 2))
    assert {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()} == before
    assert newest_checkpoint(run.folder) == kept and read_manifest(final)["step"] == 1


def test_files_are_readable_as_the_umask_says(run):
    old = os.umask(0o027)
    try:
        folder = run.save(1)
    finally:
        os.umask(old)
    assert {path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file()} == {0o640}


def test_a_run_folder_that_cannot_be_made_is_told(run, tmp_path):
    run.folder = tmp_path / "file" / "run"
    (tmp_path / "file").write_text("")
    with pytest.raises(
        TrainingError, match=r"cannot write .*/file/run/checkpoints/step-000001: .*Not a directory"
    ):
        run.save(1)


def test_final_is_replaced_as_a_whole(run):
    save_final(run.folder, run.loaded, run.plan, stamp_manifest(run.manifest, 1))
    (run.folder / "final" / "stale").write_text("")
    save_final(run.folder, run.loaded, run.plan, stamp_manifest(run.manifest, 2))
    assert read_manifest(run.folder / "final")["step"] == 2
    assert "stale" not in files_in(run.folder / "final")
    assert {path.name for path in run.folder.iterdir()} == {"final"}


def test_other_data_or_another_base_is_refused(run, tiny_folder, tmp_path):
    folder = run.save(1)
    run.data.write_text('{"other": 1}\n')
    changed = run.make_manifest()
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(folder, run.optimizer, changed)
    assert str(caught.value) == (
        f"{folder}: the training data is not the one the run was started with (fingerprint "
        f"{run.manifest['data']['fingerprint'][:12]}, now {changed['data']['fingerprint'][:12]}). "
        "Put it back as it was, or start a new run with another output."
    )
    changed = {**run.manifest, "base": {**run.manifest["base"], "fingerprint": "0" * 64}}
    with pytest.raises(CheckpointError, match="the base model is not the one the run was started with"):
        load_checkpoint(folder, run.optimizer, changed)


def test_a_torn_or_broken_checkpoint_is_told(run):
    folder = run.save(1)
    (folder / "partwise.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"partwise\.json cannot be read: .*The folder is damaged"):
        read_manifest(folder)
    (folder / "partwise.json").write_text('{"format": 99}')
    with pytest.raises(CheckpointError, match=r"partwise\.json: format 99 is not 2"):
        read_manifest(folder)
    (folder / "partwise.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no partwise\.json: its writing was cut off"):
        load_checkpoint(folder, run.optimizer, run.manifest)


def damage(path: Path, kind: str) -> None:
    data = bytearray(path.read_bytes())
    if kind == "truncated":
        path.write_bytes(data[:-1])
    elif kind == "flipped":
        data[-1000] ^= 4
        path.write_bytes(data)
    else:
        path.unlink()


@pytest.mark.parametrize("kind", ["truncated", "flipped", "missing"])
def test_a_damaged_checkpoint_is_refused_and_the_newest_intact_one_named(run, kind):
    folders = [run.save(step) for step in (1, 2, 3, 4)]
    state = [folder / "training_state/optimizer.safetensors" for folder in folders]
    damage(state[2], "flipped")
    damage(state[3], kind)
    expected = {
        "truncated": f"has {state[3].stat().st_size if kind == 'truncated' else 0:,} bytes, and "
        f"{state[0].stat().st_size:,} were written",
        "flipped": "... was written",
        "missing": "is missing",
    }
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(folders[3], run.optimizer, run.manifest)
    text = str(caught.value)
    assert text.startswith(f"{folders[3]} is damaged: training_state/optimizer.safetensors ")
    assert expected[kind] in text
    assert text.endswith(
        f"{folders[1]} is intact. To go on from there: rm -r {folders[2]} {folders[3]} && "
        f"partwise train {run.folder}/config.yaml --resume"
    )
    (folders[3] / "partwise.json").write_text("{")
    with pytest.raises(CheckpointError, match=rf"The folder is damaged.*{folders[1]} is intact"):
        load_checkpoint(folders[3], run.optimizer, run.manifest)
    damage(state[0], "flipped")
    damage(state[1], "flipped")
    with pytest.raises(CheckpointError, match="No other checkpoint of the run is intact"):
        load_checkpoint(folders[2], run.optimizer, run.manifest)


def test_a_checkpoint_without_checksums_is_still_read_with_care(run):
    folder = run.save(1)
    manifest = read_manifest(folder)
    del manifest["files"]
    (folder / "partwise.json").write_text(json.dumps(manifest))
    assert load_checkpoint(folder, run.optimizer, run.manifest) == 1
    damage(folder / "training_state/optimizer.safetensors", "truncated")
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors cannot be read: "):
        load_checkpoint(folder, run.optimizer, run.manifest)


def test_the_manifest_lists_every_file_with_its_checksum(run):
    folder = run.save(1)
    manifest = read_manifest(folder)
    assert set(manifest["files"]) == files_in(folder) - {"partwise.json"}
    for name, facts in manifest["files"].items():
        data = (folder / name).read_bytes()
        assert facts == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "README.md").write_text("mine")
    assert verify_files(folder, manifest) == []
    damage(folder / "model.safetensors", "flipped")
    damage(folder / "tokenizer.json", "missing")
    faults = verify_files(folder, manifest)
    assert [fault.split()[:2] for fault in faults] == [["model.safetensors", "has"], ["tokenizer.json", "is"]]
    assert verify_files(folder, manifest, ["config.json"]) == []


def test_writing_leaves_gathered_weights_to_the_training(tiny_folder, tmp_path):
    """A thread writes while FSDP2 has gathered a layer that runs."""
    run = Run(tiny_folder("gemma3"), tmp_path / "run", FULL)
    engine = Fsdp()
    with connected_alone():
        engine.spread(run.loaded.model, run.plan, torch.float32, torch.device("cpu"))
        state = model_state(run.loaded, run.plan, engine)
        engine.net.unshard()
        write_model(tmp_path / "written", run.loaded, run.plan, state)
        assert not isinstance(run.loaded.model.get_input_embeddings().weight, DTensor)


@pytest.mark.parametrize("family", ["gemma3", "llava-next", "qwen2.5-vl", "llama"])
def test_state_names_are_those_of_the_state_dict(load_tiny, family):
    model = load_tiny(family)
    model.register_buffer("kept", torch.zeros(1))
    model.register_buffer("passing", torch.zeros(1), persistent=False)
    assert state_names(model) == set(model.state_dict())
