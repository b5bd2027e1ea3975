"""What goes wrong for a user: killed runs go on bitwise, bad input gets one paragraph and changes nothing."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from starting import start, wait_for

from partwise.lineage.checksums import verify_files
from partwise.lineage.manifest import read_manifest
from partwise.training.checkpoint import newest_checkpoint

PARTWISE = Path(sys.executable).with_name("partwise")


def read_records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def logged_steps(run: Path) -> list[int]:
    return [record["step"] for record in read_records(run) if "loss" in record]


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
    torn = run / "checkpoints/.step-000099.partial"
    torn.mkdir()
    # What may change, changes nothing: recomputed layers give the same bits.
    resumed = run_cli("train", config, "--resume", "train.gradient_checkpointing=true", "train.save_every=4")
    assert resumed.code == 0, resumed.err
    assert f"passed over: {torn}, torn by a kill; the next checkpoint sweeps it" in resumed.out
    assert "resuming from" in resumed.out and not torn.exists()
    name = "model.safetensors" if language_model == "full" else "adapter_model.safetensors"
    whole = tmp_path / "whole/run/final" / name
    assert (run / "final" / name).read_bytes() == whole.read_bytes()
    assert logged_steps(run) == list(range(1, 25))


def test_a_run_killed_before_its_first_checkpoint_starts_again(toy, tmp_path, run_cli, environment) -> None:
    config, run = toy.config(tmp_path, train__steps=40), tmp_path / "run"
    with subprocess.Popen(
        [PARTWISE, "train", config], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        wait_for(lambda: (run / "metrics.jsonl").exists(), process)
        os.kill(process.pid, signal.SIGKILL)
    assert run_cli("train", config, "--resume").code == 0
    assert logged_steps(run) == list(range(1, 41))


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


def test_a_run_that_was_moved_with_its_files_goes_on(toy, tmp_path, run_cli) -> None:
    config = toy.config(tmp_path, train__steps=4, train__save_every=2)
    assert run_cli("train", config).code == 0
    run, weights = tmp_path / "moved", (tmp_path / "run/final/model.safetensors").read_bytes()
    shutil.move(tmp_path / "run", run)
    for name in ("final", "checkpoints/step-000004"):
        shutil.rmtree(run / name)
    base, data = (shutil.copytree(path, tmp_path / path.name) for path in (toy.base, toy.train.parent))
    moved = (f"model.path={base}", f"data.train={data}/rows.jsonl", f"output={run}")
    with (data / "rows.jsonl").open("a") as file:
        file.write("\n")
    refused = run_cli("train", config, *moved, "--resume")
    assert refused.code == 1 and "the training data is not the one the run was started with" in refused.err
    shutil.copy(toy.train, data)
    resumed = run_cli("train", config, *moved, "--resume")
    assert resumed.code == 0, resumed.err
    assert (run / "final/model.safetensors").read_bytes() == weights


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
    "engine": ({"engine": "zero4"}, ['"zero4" is not one of', 'Did you mean "zero']),
    "engine beside 4 bits": (
        {"engine": "zero3", "parts": {"language_model": {"mode": "lora", "quantization": "nf4"}}},
        ["zero3", "cannot be cut into shards", "engine: ddp"],
    ),
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


def start_train(config: Path, environment: dict[str, str], *arguments: str) -> subprocess.Popen[str]:
    return start([PARTWISE, "train", config, *arguments], environment, stdout=subprocess.DEVNULL)


def test_a_stop_signal_saves_and_the_next_step_follows(toy, tmp_path, run_cli, environment) -> None:
    """To the whole group, as Ctrl-C and schedulers do: the data workers must survive it, too."""
    settings = {"train__steps": 60, "data__num_workers": 2, "train__log_every": 3}
    assert run_cli("train", toy.config(tmp_path / "whole", **settings)).code == 0
    config, run = toy.config(tmp_path / "stopped", **settings), tmp_path / "stopped/run"
    stops = [0]
    for number in (signal.SIGTERM, signal.SIGINT):
        with start_train(config, environment, *(["--resume"] if run.exists() else [])) as process:
            wait_for(
                lambda: (run / "metrics.jsonl").exists() and logged_steps(run)[-1:] > stops[-1:], process
            )
            os.killpg(process.pid, number)
            error = process.communicate(timeout=60)[1]
        assert process.returncode == 128 + number and "Traceback" not in error
        stops.append(logged_steps(run)[-1])
        folder = run / f"checkpoints/step-{stops[-1]:06d}"
        assert error.splitlines()[-1] == (
            f"stopped by {number.name} after step {stops[-1]} of 60; saved {folder}. "
            f"Go on with: partwise train {run}/config.yaml --resume"
        )
        assert newest_checkpoint(run) == folder and not (run / "final").exists()
    resumed = run_cli("train", run / "config.yaml", "--resume")
    assert resumed.code == 0, resumed.err
    name = "final/model.safetensors"
    assert (run / name).read_bytes() == (tmp_path / "whole/run" / name).read_bytes()
    assert logged_steps(run) == sorted({*range(3, 61, 3), *stops[1:]})


def test_a_second_signal_ends_at_once(toy, tmp_path, environment) -> None:
    # A step so long that it does not end between the two signals.
    settings = {"train__steps": 9, "train__global_batch_size": 160, "train__micro_batch_size": 1}
    config, run = toy.config(tmp_path, **settings), tmp_path / "run"
    with start_train(config, environment) as process:
        wait_for(lambda: (run / "metrics.jsonl").exists(), process)
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=10) == -signal.SIGTERM
    assert newest_checkpoint(run) is None and not list(run.rglob("*.partial"))


def test_a_stop_in_the_last_step_leaves_only_final_to_write(toy, tmp_path, run_cli) -> None:
    """As a signal in the last step leaves it: a checkpoint of all steps, and no final/."""
    config = toy.config(tmp_path, train__steps=4, train__save_every=4)
    assert run_cli("train", config).code == 0
    weights = (tmp_path / "run/final/model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "run/final")
    resumed = run_cli("train", config, "--resume")
    assert resumed.code == 0, resumed.err
    assert (tmp_path / "run/final/model.safetensors").read_bytes() == weights
    assert logged_steps(tmp_path / "run") == [1, 2, 3, 4]


def test_python_gets_an_exception_and_its_handlers_back(toy, tmp_path, run_python) -> None:
    config = toy.config(tmp_path, train__steps=500)
    code = (
        "import signal, sys, threading, time, pathlib, partwise\n"
        "mine = lambda *arguments: print('mine')\n"
        "signal.signal(signal.SIGINT, mine)\n"
        "config = partwise.load_config(sys.argv[1])\n"
        "def stop():\n"
        "    while not pathlib.Path(config.output, 'metrics.jsonl').exists(): time.sleep(0.02)\n"
        "    signal.raise_signal(signal.SIGTERM)\n"
        "threading.Thread(target=stop).start()\n"
        "try:\n"
        "    partwise.train(config)\n"
        "except Exception:\n"
        "    print('an error')\n"
        "except partwise.StoppedError as stopped:\n"
        "    print(stopped.signal.name, stopped)\n"
        "print(signal.getsignal(signal.SIGINT) is mine, signal.getsignal(signal.SIGTERM).name)\n"
    )
    done = run_python(code, config)
    assert done.code == 0, done.err
    first, second = done.out.splitlines()
    assert first.startswith("SIGTERM stopped by SIGTERM after step ") and second == "True SIG_DFL"


def test_a_run_in_a_thread_needs_no_handlers(toy, tmp_path, run_python) -> None:
    config = toy.config(tmp_path, train__steps=2)
    code = (
        "import sys, threading, partwise\n"
        "config = partwise.load_config(sys.argv[1])\n"
        "thread = threading.Thread(target=lambda: print(partwise.train(config)))\n"
        "thread.start(); thread.join()\n"
    )
    assert run_python(code, config).out.strip() == str(tmp_path / "run/final")


def test_a_damaged_checkpoint_stops_the_resumption_and_names_the_way_out(toy, tmp_path, run_cli) -> None:
    config, run = toy.config(tmp_path, train__steps=6, train__save_every=2), tmp_path / "run"
    assert run_cli("train", config).code == 0
    weights = (run / "final/model.safetensors").read_bytes()
    shutil.rmtree(run / "final")
    state = run / "checkpoints/step-000006/training_state/optimizer.safetensors"
    state.write_bytes(state.read_bytes()[:-8])
    refused = run_cli("train", config, "--resume")
    assert refused.code == 1 and "Traceback" not in refused.err
    message, _, command = refused.err.partition("To go on from there: ")
    assert "optimizer.safetensors has" in message and "step-000004 is intact" in message
    assert command == f"rm -r {run}/checkpoints/step-000006 && partwise train {run}/config.yaml --resume\n"
    shutil.rmtree(run / "checkpoints/step-000006")
    assert run_cli("train", run / "config.yaml", "--resume").code == 0
    assert (run / "final/model.safetensors").read_bytes() == weights


def test_the_best_checkpoint_is_kept(toy, tmp_path, run_cli) -> None:
    settings = {"data__eval": str(toy.held_out), "train__save_every": 2, "train__learning_rate": 3e-2}
    config = toy.config(tmp_path, **settings, train__keep_best=1, train__keep_last=1)
    assert run_cli("train", config).code == 0
    losses = {r["step"]: r["eval_loss"] for r in read_records(tmp_path / "run") if "eval_loss" in r}
    assert sorted(losses) == [2, 4, 6, 8]
    kept = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert kept == sorted({f"step-{min(losses, key=losses.get):06d}", "step-000008"})
    manifest = json.loads((tmp_path / "run/checkpoints" / kept[0] / "partwise.json").read_text())
    assert manifest["eval_loss"] == losses[manifest["step"]]


def test_a_full_disk_keeps_the_older_checkpoint(toy, tmp_path, environment) -> None:
    """A file-size limit, set from outside while the run trains, stands for the full disk."""
    config, run = toy.config(tmp_path, train__steps=400, train__save_every=2), tmp_path / "run"
    with start_train(config, environment) as process:
        wait_for(lambda: newest_checkpoint(run) is not None, process)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (100_000, 100_000))
        error = process.communicate(timeout=60)[1]
    assert process.returncode == 1, error
    assert "Traceback" not in error and "cannot write" in error and "File too large" in error
    kept = newest_checkpoint(run)
    assert kept is not None and verify_files(kept, read_manifest(kept)) == []
    assert all(path.name.startswith("step-") for path in (run / "checkpoints").iterdir())
