"""What goes wrong for a user: killed runs go on bitwise, bad input gets one paragraph and changes nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from partwise.training.checkpoint import newest_checkpoint

PARTWISE = Path(sys.executable).with_name("partwise")


def wait_for(condition, process: subprocess.Popen, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.02)


@pytest.mark.parametrize("language_model", ["full", "lora"])
def test_a_killed_run_resumes_to_the_same_bits(toy, tmp_path, run_cli, environment, language_model) -> None:
    parts = {"projector": "full", "language_model": {"mode": language_model, "learning_rate": 1e-2}}
    settings = {"parts": parts, "train__steps": 24, "train__save_every": 5, "train__warmup_steps": 3}
    assert run_cli("train", toy.config(tmp_path / "whole", **settings)).code == 0
    config, run = toy.config(tmp_path / "killed", **settings), tmp_path / "killed/run"
    with subprocess.Popen(
        [PARTWISE, "train", config], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        wait_for(lambda: newest_checkpoint(run) is not None, process)
        os.kill(process.pid, signal.SIGKILL)
    assert not (run / "final").exists()
    again = run_cli("train", config)
    assert again.code == 1 and "Add --resume" in again.err
    resumed = run_cli("train", config, "--resume")
    assert resumed.code == 0, resumed.err
    assert "resuming from" in resumed.out
    name = "model.safetensors" if language_model == "full" else "adapter_model.safetensors"
    whole = tmp_path / "whole/run/final" / name
    assert (run / "final" / name).read_bytes() == whole.read_bytes()
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 25))


def test_a_run_killed_before_its_first_checkpoint_starts_again(toy, tmp_path, run_cli, environment) -> None:
    config, run = toy.config(tmp_path, train__steps=40), tmp_path / "run"
    with subprocess.Popen(
        [PARTWISE, "train", config], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        wait_for(lambda: (run / "metrics.jsonl").exists(), process)
        os.kill(process.pid, signal.SIGKILL)
    assert run_cli("train", config, "--resume").code == 0
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 40


def test_resume_refuses_another_config_and_a_finished_run(toy, tmp_path, run_cli) -> None:
    config = toy.config(tmp_path, train__steps=2)
    missing = run_cli("train", config, "--resume")
    assert missing.code == 1 and "holds no run to go on with" in missing.err
    assert run_cli("train", config).code == 0
    done = run_cli("train", config, "--resume")
    assert done.code == 1 and "is finished" in done.err
    (tmp_path / "run/final/partwise.json").unlink()
    changed = run_cli("train", config, "--resume", "train.learning_rate=0.1", "train.log_every=2")
    assert changed.code == 1 and "train.learning_rate was 0.003, is 0.1" in changed.err
    assert "log_every" not in changed.err


# Each is (overrides or changes of the toy config, what the message must say).
BAD_CONFIGS = {
    "wrong key": ({"train__learning_rte": 1e-4}, ["learning_rte", "learning_rate"]),
    "wrong mode": ({"parts": {"projector": "ful"}}, ['"ful" is not one of', 'Did you mean "full"?']),
    "all frozen": (
        {"parts": {"vision_tower": "frozen", "projector": "frozen", "language_model": "frozen"}},
        ["nothing would train", "The usual recipe"],
    ),
    "contradicting flags": (
        {"parts": None, "train_mm_proj_only": True, "freeze_multi_modal_projector": True},
        ["train_mm_proj_only", "freeze_multi_modal_projector"],
    ),
    "layers outside": (
        {"parts": {"language_model": {"mode": "full", "layers": "-12:"}}},
        ["-12:", "2 layers"],
    ),
    "a part it lacks": ({"parts": {"audio_tower": "full"}}, ["audio_tower", "vision_tower"]),
    "warm-up as long as the run": (
        {"train": {"epochs": 2, "global_batch_size": 80, "micro_batch_size": 8, "warmup_steps": 4}},
        ["leaves nothing of the 4 steps that 160 rows make in train.epochs 2"],
    ),
    "engine": ({"engine": "zero3"}, ["zero3", "this version trains on one"]),
    "lora on a bare parameter": ({"parts": {"projector": "lora"}}, ["projector", "full"]),
}


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_a_bad_config_is_one_message_and_leaves_nothing(toy, tmp_path, run_cli, name) -> None:
    changes, words = BAD_CONFIGS[name]
    config = toy.config(tmp_path, **changes)
    for command in ("check", "train"):
        done = run_cli(command, config)
        assert done.code == 1
        told = " ".join((done.out + done.err).split())
        assert all(word in told for word in words), told
        assert "Traceback" not in told
        assert not (tmp_path / "run").exists()


def row(content: str = "<image>What?", answer: str | None = "red", images: list[str] | None = None) -> str:
    messages = [{"role": "user", "content": content}]
    if answer is not None:
        messages.append({"role": "assistant", "content": answer})
    return json.dumps({"messages": messages, "images": images or []})


BAD_ROWS = {
    "empty file": ("", ["rows.jsonl", "no rows"]),
    "not JSON": ('{"messages": [', ["rows.jsonl:1"]),
    "no answer": (row("What?", None), ["rows.jsonl:1", "assistant"]),
    "missing image": (row(images=["gone.png"]), ["gone.png"]),
    "broken image": (row(images=["broken.png"]), ["broken.png"]),
    "placeholders": (
        row("<image><image>What?", images=["a.png", "b.png", "c.png"]),
        ["rows.jsonl:1", "3 images given, 2 placeholders"],
    ),
    "control token": (row("What<end_of_turn>?"), ["<end_of_turn>"]),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_data_is_one_message_and_leaves_nothing(toy, tmp_path, run_cli, name) -> None:
    text, words = BAD_ROWS[name]
    (tmp_path / "rows.jsonl").write_text(text)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n not a picture")
    config = toy.config(tmp_path, data__train=str(tmp_path / "rows.jsonl"))
    for command in ("check", "train"):
        done = run_cli(command, config)
        told = " ".join((done.out + done.err).split())
        assert done.code == 1, told
        assert all(word in told for word in words), told
        assert "Traceback" not in told
        assert not (tmp_path / "run").exists()


def test_a_model_folder_without_its_files_is_named(toy, tmp_path, run_cli) -> None:
    for missing in ("config.json", "processor_config.json", "model.safetensors"):
        folder = tmp_path / f"without-{missing}"
        folder.mkdir()
        for path in toy.base.iterdir():
            if path.name != missing:
                (folder / path.name).symlink_to(path)
        done = run_cli("train", toy.config(tmp_path, model__path=str(folder)))
        assert done.code == 1
        assert str(folder) in done.err and "Traceback" not in done.err, done.err
        assert not (tmp_path / "run").exists()
    checked = run_cli("check", toy.config(tmp_path, model__path=str(tmp_path / "without-config.json")))
    assert checked.code == 1 and checked.out.count("has no config.json") == 1


def test_an_unwritable_output_is_named(toy, tmp_path, run_cli) -> None:
    (tmp_path / "file").write_text("")
    done = run_cli("train", toy.config(tmp_path, output=str(tmp_path / "file/run")))
    assert done.code == 1 and "is a file, not a folder" in done.err


def test_a_full_disk_keeps_the_older_checkpoint(toy, tmp_path, environment) -> None:
    """A file-size limit stands for the full disk: the second checkpoint cannot be written."""
    config, run = toy.config(tmp_path, train__steps=6, train__save_every=2), tmp_path / "run"
    code = (
        "import resource, signal, sys\n"
        "from partwise import cli\n"
        "from partwise.training import loop\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "save = loop.save_checkpoint\n"
        "def save_then_fill(*arguments):\n"
        "    save(*arguments)\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "loop.save_checkpoint = save_then_fill\n"
        f"sys.argv = ['partwise', 'train', {str(config)!r}]\n"
        "cli.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr and "step-000004" in done.stderr, done.stderr
    assert newest_checkpoint(run) == run / "checkpoints/step-000002"
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000002"]
