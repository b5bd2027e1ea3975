"""Background saves: the same bytes as plain ones, of the moment they were asked for; no error is lost."""

from __future__ import annotations

import re
import threading
from pathlib import Path

import pytest
import torch

from partwise.config import Config, ModelConfig
from partwise.errors import TrainingError
from partwise.lineage.manifest import make_manifest, read_manifest, stamp_manifest
from partwise.model.load import load_model
from partwise.model.parts import apply_plan, resolve_plan
from partwise.training import saver as saver_module
from partwise.training.checkpoint import save_checkpoint, training_state
from partwise.training.optim import Optimizer
from partwise.training.saver import HostCopies, Saver, distinct_tensors, frozen_views

NO_BASE = {"path": "", "fingerprint": "", "parts": {}}

FULL = {"projector": "full", "language_model": "full"}
LORA = {"language_model": "lora"}


class Run:
    """A tiny model with a plan and an optimizer that has made a step, and what its saver noted and told."""

    def __init__(self, base: Path, folder: Path, parts: dict, **train: int) -> None:
        self.folder = folder
        data = folder.parent / "rows.jsonl"
        data.write_text("{}\n")
        config = Config.model_validate(
            {
                "model": {"path": str(base)},
                "parts": parts,
                "data": {"train": str(data)},
                "train": train,
                "output": str(folder),
            }
        )
        self.loaded = load_model(ModelConfig(path=str(base), dtype="float32"))
        self.plan = resolve_plan(self.loaded.model, config)
        apply_plan(self.loaded.model, self.plan)
        self.optimizer = Optimizer(self.loaded.model, self.plan, config.train, 9)
        self.manifest = make_manifest(self.plan, NO_BASE, [data], "float32")
        self.noted, self.told = [], []
        self.saver = Saver(
            folder,
            self.loaded,
            self.plan,
            self.optimizer,
            config.train,
            lambda saved: self.noted.append(saved),
            lambda line: self.told.append(line),
        )

    def step(self, step: int = 0) -> None:
        inputs = {"input_ids": torch.tensor([[2, 20, 30, 40, 50, 60]]), "use_cache": False}
        self.loaded.model(**inputs).logits.square().mean().backward()
        self.optimizer.step(step)

    def save(self, step: int) -> None:
        self.saver.save(stamp_manifest(self.manifest, step))

    def save_plainly(self, folder: Path, step: int) -> Path:
        state = training_state(self.loaded, self.plan, self.optimizer)
        return save_checkpoint(folder, self.loaded, self.plan, state, stamp_manifest(self.manifest, step))


@pytest.fixture
def open_run(tiny_folder, tmp_path):
    def open_family(family: str = "gemma3", parts: dict = FULL, **train: int) -> Run:
        (tmp_path / "run").mkdir(exist_ok=True)
        run = Run(tiny_folder(family), tmp_path / "run", parts, **train)
        run.step()
        return run

    return open_family


@pytest.fixture
def tied_llama(tmp_path):
    from partwise.tiny import write_tiny

    return write_tiny("llama", tmp_path / "tied", text={"tie_word_embeddings": True})


def hold(monkeypatch) -> threading.Event:
    """Lets no save reach the disk until the event is set."""
    let_go, write = threading.Event(), saver_module.save_checkpoint

    def slow(*arguments):
        let_go.wait(timeout=60)
        return write(*arguments)

    monkeypatch.setattr(saver_module, "save_checkpoint", slow)
    return let_go


def content(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != "partwise.json")
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


CASES = [
    ("gemma3", FULL),
    ("gemma3", LORA),
    ("llava-next", FULL),
    ("qwen2.5-vl", FULL),
    ("llama", {"language_model": "full"}),
]


@pytest.mark.parametrize(("family", "parts"), CASES)
def test_a_background_save_has_the_bytes_of_its_moment(open_run, tmp_path, monkeypatch, family, parts):
    run = open_run(family, parts)
    plain = run.save_plainly(tmp_path / "plain", 1)
    let_go = hold(monkeypatch)
    run.save(1)
    run.step(1)  # what trains goes on changing while the save waits for the disk
    let_go.set()
    run.saver.wait()
    (saved,) = run.noted
    assert content(saved.folder) == content(plain)
    assert content(saved.folder) != content(run.save_plainly(tmp_path / "later", 1))
    assert saved.num_bytes == sum(map(len, content(plain).values()))
    assert read_manifest(saved.folder)["files"] == read_manifest(plain)["files"]


def test_a_tied_llama_is_saved_as_without_the_copy(tied_llama, tmp_path):
    run = Run(tied_llama, tmp_path / "run", {"language_model": "full"})
    assert run.loaded.model.lm_head.weight is run.loaded.model.model.embed_tokens.weight
    run.save(1)
    run.saver.wait()
    assert content(run.noted[0].folder) == content(run.save_plainly(tmp_path / "plain", 1))


def test_shared_memory_is_copied_once(open_run):
    run = open_run()
    state = training_state(run.loaded, run.plan, run.optimizer)
    copies = HostCopies()
    copied = copies.take(state)
    head, embeddings = "lm_head.weight", "model.language_model.embed_tokens.weight"
    assert copied.model[head] is copied.model[embeddings] is copied.optimizer[f"master/{embeddings}"]
    assert copied.model[head].data_ptr() != state.model[head].data_ptr()
    assert len(copies.buffers) == len(distinct_tensors(state)) < len(state.model) + len(state.optimizer)
    assert copies.missing_bytes(state) == 0
    assert copies.take(state).model[head] is copied.model[head]


def test_frozen_weights_are_not_copied_and_all_others_are(open_run):
    run = open_run()
    state = training_state(run.loaded, run.plan, run.optimizer)
    copies = HostCopies(frozen_views(run.loaded, run.plan))
    copied = copies.take(state)
    still = {name for name, tensor in copied.model.items() if tensor is state.model[name]}
    assert still == {name for name in state.model if name.startswith("model.vision_tower.")}
    assert not still.intersection(copies.buffers) and copies.missing_bytes(state) == 0
    moved = [copied.model[name] for name in run.plan.trainable]
    assert moved and not {t.data_ptr() for t in moved} & {t.data_ptr() for t in state.model.values()}


def test_one_save_is_in_flight_at_most_and_waiting_counts(open_run, monkeypatch):
    run = open_run()
    let_go = hold(monkeypatch)
    run.save(1)
    run.saver.poll()
    assert run.noted == []
    timer = threading.Timer(0.3, let_go.set)
    timer.start()
    run.save(2)
    assert [saved.step for saved in run.noted] == [1]
    with run.saver:
        pass
    assert [saved.step for saved in run.noted] == [1, 2]
    assert run.noted[0].stall_seconds < 0.3 < run.noted[1].stall_seconds + 0.01
    assert run.noted[0].write_seconds > 0.29


def test_an_error_in_the_background_is_told_once_at_the_next_chance(open_run):
    run = open_run()
    (run.folder / "checkpoints").write_text("a file stands where the folder should be")
    run.save(1)
    with pytest.raises(TrainingError, match=r"cannot write .*step-000001"):
        for _ in range(600):
            run.saver.poll()
            threading.Event().wait(0.05)
    run.saver.poll()
    run.save(2)
    with pytest.raises(TrainingError, match=r"cannot write .*step-000002"), run.saver:
        pass
    assert run.noted == []


def test_an_error_beside_another_one_is_shown(open_run):
    run = open_run()
    (run.folder / "checkpoints").write_text("")
    with pytest.raises(ValueError, match="the first"), run.saver:
        run.save(1)
        raise ValueError("the first")
    assert len(run.told) == 1 and "cannot write" in run.told[0]


def test_without_memory_for_a_copy_it_writes_at_once_and_says_so_once(open_run, monkeypatch):
    run = open_run()
    monkeypatch.setattr(saver_module, "host_memory_bytes", lambda: 1 << 20)
    for step in (1, 2):
        run.save(step)
        assert [saved.step for saved in run.noted] == list(range(1, step + 1))
    (told,) = run.told
    assert re.fullmatch(
        r"checkpoints stall training: a copy of [\d.]+ MiB does not fit into the host's 1.0 MiB of free "
        "memory",
        told,
    )
    assert all(saved.stall_seconds >= saved.write_seconds for saved in run.noted)


def test_rotation_runs_in_the_background(open_run):
    run = open_run(keep_last=1)
    for step in (1, 2, 3):
        run.save(step)
    run.saver.wait()
    assert [path.name for path in (run.folder / "checkpoints").iterdir()] == ["step-000003"]
