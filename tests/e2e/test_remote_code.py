"""A model whose code ships in its folder: nothing of it runs unasked, and with the flag everything works."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from partwise.tiny import write_tiny

CONFIGURATION = """
from pathlib import Path
from transformers import LlamaConfig
Path({marker!r}).touch()
class OwnedConfig(LlamaConfig):
    model_type = "owned"
"""
MODELING = """
from transformers import LlamaForCausalLM
from .configuration_owned import OwnedConfig
class OwnedForCausalLM(LlamaForCausalLM):
    config_class = OwnedConfig
"""
ANSWER = """
import sys
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
print(type(model).__name__, float(model.lm_head.weight.sum()))
"""


@pytest.fixture(autouse=True, scope="module")
def own_code_cache(tmp_path_factory) -> Iterator[None]:
    """transformers copies the folder's code to a cache and imports it there; here it is this file's own."""
    cache = tmp_path_factory.mktemp("modules")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(cache))
        patch.setattr(sys, "path", [*sys.path])
        yield


@pytest.fixture
def config(toy, tmp_path) -> Path:
    """A config for text rows and a model of a type that only its own folder defines."""
    base = write_tiny("llama", tmp_path / "base")
    settings = json.loads((base / "config.json").read_text())
    auto_map = {
        "AutoConfig": "configuration_owned.OwnedConfig",
        "AutoModelForCausalLM": "modeling_owned.OwnedForCausalLM",
    }
    settings |= {"model_type": "owned", "architectures": ["OwnedForCausalLM"], "auto_map": auto_map}
    (base / "config.json").write_text(json.dumps(settings))
    (base / "configuration_owned.py").write_text(CONFIGURATION.format(marker=str(tmp_path / "it-ran")))
    (base / "modeling_owned.py").write_text(MODELING)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "Which colour?", "completion": "red"}) + "\n")
    return toy.config(
        tmp_path,
        model__path=str(base),
        parts={"language_model": "full"},
        data__train=str(rows),
        train__steps=2,
        train__global_batch_size=1,
        train__micro_batch_size=1,
    )


def test_without_the_flag_nothing_of_the_folder_runs(config, tmp_path, run_cli) -> None:
    commands = (
        ("check", config),
        ("train", config),
        ("preview", config),
        ("parts", tmp_path / "base"),
        ("chat", tmp_path / "base", "--prompt", "x"),
    )
    for command in commands:
        done = run_cli(*command)
        told = done.out + done.err
        assert done.code == 1 and "Traceback" not in told
        assert "'owned' is defined by Python code in the model folder" in told
        assert "set model.trust_remote_code: true, or give --trust-remote-code" in told
    assert not (tmp_path / "it-ran").exists() and not (tmp_path / "run").exists()


def test_with_the_flag_it_trains_in_full_and_its_result_keeps_the_code(
    config, tmp_path, run_cli, environment
) -> None:
    trust = "model.trust_remote_code=true"
    checked = run_cli("check", config, trust)
    assert checked.code == 0 and "gradients reach 21 of 21" in checked.out, checked.out
    assert run_cli("train", config, trust).code == 0
    run, out = tmp_path / "run", tmp_path / "out"
    refused = run_cli("chat", run, "--prompt", "x")
    assert refused.code == 1 and "--trust-remote-code" in refused.err
    assert run_cli("chat", run, "--prompt", "x", "--max-new-tokens", 2, "--trust-remote-code").code == 0
    assert run_cli("export", run, "--out", out, "--verify", "off").code == 0
    modules = {**environment, "HF_MODULES_CACHE": str(tmp_path / "elsewhere")}
    done = subprocess.run(
        [sys.executable, "-c", ANSWER, out], capture_output=True, text=True, env=modules, check=True
    )
    assert done.stdout.startswith("OwnedForCausalLM ")


def test_with_the_flag_its_adapter_merges_and_answers(config, tmp_path, run_cli) -> None:
    trained = run_cli("train", config, "model.trust_remote_code=true", "parts.language_model=lora")
    assert trained.code == 0, trained.err
    run, out = tmp_path / "run", tmp_path / "out"
    refused = run_cli("export", run, "--out", out)
    assert refused.code == 1 and "--trust-remote-code" in refused.err and not out.exists()
    assert run_cli("export", run, "--out", out, "--trust-remote-code").code == 0
    assert (out / "modeling_owned.py").is_file() and (out / "model.safetensors").is_file()
    answers = [
        run_cli("chat", folder, "--prompt", "x", "--max-new-tokens", 4, "--trust-remote-code").out
        for folder in (run, out)
    ]
    assert answers[0] == answers[1] != ""
