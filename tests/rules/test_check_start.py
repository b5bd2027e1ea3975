"""The config and plan checks of a 4B model take seconds: no weight is read, and little is imported."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples/gemma-3-4b-lora.yaml"
# What transformers itself costs before a model can be built on the meta device.
IMPORT = "import gc; gc.disable(); import transformers.modeling_utils, transformers.processing_utils"
CHECK = """
import sys
from partwise import cli
try:
    cli.main()
except SystemExit as stop:
    assert not stop.code, stop.code
print(sorted({"peft", "matplotlib", "pyarrow", "sklearn"} & set(sys.modules)))
"""


@pytest.fixture(scope="module")
def folder_4b(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Callable[[str], Path]) -> Path:
    """A folder with the shapes of Gemma-3 4B, whose weights are a hole in a sparse file."""
    from shutil import copytree

    from transformers import Gemma3Config

    from partwise.model.load import empty_model

    folder = copytree(tiny_folder("gemma3"), tmp_path_factory.mktemp("models") / "gemma-3-4b")
    tokens = {k: v for k, v in json.loads((folder / "config.json").read_text()).items() if "_token_" in k}
    Gemma3Config(
        text_config={
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "num_hidden_layers": 34,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "vocab_size": 262208,
        },
        vision_config={
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "image_size": 896,
            "patch_size": 14,
            "vision_use_head": False,
        },
        **{**tokens, "mm_tokens_per_image": 256},
    ).save_pretrained(folder)
    header, end = {}, 0
    for name, tensor in empty_model(folder).named_parameters():
        start, end = end, end + 2 * tensor.numel()
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return folder


def processor_seconds(code: str, *arguments: object) -> tuple[float, str]:
    """Processor time, which other processes on the machine hardly lengthen, and what was printed."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stdout


def test_config_and_plan_of_a_4b_model_are_checked_in_seconds(folder_4b: Path, tmp_path: Path) -> None:
    """Hardly longer than it takes to import transformers, on any machine: 3.4 s and 3.4 s on one core."""
    only = [word for check in ("output", "model", "plan", "disk") for word in ("--only", check)]
    arguments = ["check", EXAMPLE, f"model.path={folder_4b}", f"output={tmp_path / 'run'}", *only]
    fractions: list[float] = []
    while len(fractions) < 3 and not any(fraction < 1.25 for fraction in fractions):
        imported, _ = processor_seconds(IMPORT)
        checked, out = processor_seconds(CHECK, *arguments)
        fractions.append(checked / imported)
    assert "32.8 M of 4.3 B parameters train" in out
    assert out.splitlines()[-1] == "[]"
    assert min(fractions) < 1.25, fractions
