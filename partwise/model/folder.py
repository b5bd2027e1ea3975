"""What a model folder must hold before anything is loaded from it.

In: a path, or a hub name where a hub can be reached. Out: the local folder, its config file as a dict, the
names of its tensors. Every fault is a CheckpointError that names the file and the way out. Only headers
are read, so this is cheap for any size. Not done here: making a model or a processor; model/load.py does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open

from partwise.errors import CheckpointError, UserError

TEXT_FILES = ["*.json", "*.jinja", "*.model", "*.txt", "*.py"]
WEIGHT_FILES = ["model*.safetensors"]
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
VOCABULARY_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
)
TRUST = (
    "Read that code, and if you trust it, set model.trust_remote_code: true, or give --trust-remote-code to "
    "a command without a config."
)
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")


def find_model_folder(path: str | Path, with_weights: bool = False) -> Path:
    """The folder itself, or the local copy of a hub model; without weights only its small files are fetched.

    Raises: CheckpointError where there is neither such a folder nor a hub model that can be fetched.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(
            f"{path} is a file; a model is a folder with config.json, weights and tokenizer."
        )
    if not HUB_NAME.fullmatch(str(path)):
        raise CheckpointError(f"There is no model folder {path} (from {Path.cwd()}). Correct model.path.")
    try:
        return Path(snapshot_download(str(path), allow_patterns=TEXT_FILES + WEIGHT_FILES * with_weights))
    except Exception as error:
        raise CheckpointError(
            f"There is no model folder {path} (from {Path.cwd()}), and no hub model of that name could be "
            f"fetched: {shorten(error, 120)} Correct model.path, or download the model and give its folder."
        ) from error


def model_name(path: str | Path) -> str:
    """The hub name, or a folder's absolute path: a name that means the same model from any directory."""
    folder = Path(path).expanduser()
    return str(folder.resolve()) if folder.is_dir() else str(path)


def shorten(error: Exception | str, num_characters: int = 240) -> str:
    """A library's error as one sentence of at most about `num_characters`."""
    text = " ".join(str(error).split())
    if isinstance(error, Exception):
        text = f"{type(error).__name__}: {text}"
    return f"{text.rstrip('.')}." if len(text) <= num_characters else f"{text[:num_characters]}…"


@contextmanager
def as_checkpoint_error(where: Path, what: str, way_out: str) -> Iterator[None]:
    """Whatever a library raises about a folder's content becomes one CheckpointError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise CheckpointError(f"{where}: {what}: it needs Python code in the folder. {TRUST}") from error
        raise CheckpointError(f"{where}: {what}: {shorten(error)} {way_out}") from error


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises: CheckpointError when it is not one."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CheckpointError(
            f"{file} cannot be read as JSON: {shorten(error)} Copy the file again."
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{file} holds a {type(content).__name__}, not a JSON object. Copy the file again."
        )
    return content


def check_config_file(folder: Path, trust_remote_code: bool) -> None:
    """Raises: CheckpointError when config.json is missing, or says no model type that can be built."""
    if is_adapter(folder):
        base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
        raise CheckpointError(
            f"{folder} holds an adapter (adapter_config.json), not a whole model. To train it "
            f"further, give its base model ({base}) as model.path and this folder as model.adapter; to start "
            "from both as one model, export it with --to hf and give that folder."
        )
    file = folder / "config.json"
    if not file.is_file():
        raise CheckpointError(
            f"{folder} has no config.json, so it is not a model folder. Give the folder that holds "
            "config.json; if the file was lost, copy it from the model that this one was made from."
        )
    content = read_json(file)
    model_type = content.get("model_type")
    if not model_type:
        raise CheckpointError(
            f"{file} has no model_type, so the model's class is unknown. Copy config.json from the model "
            "that this one was made from."
        )
    if "quantization_config" in content:
        raise CheckpointError(
            f"{file}: its weights are quantised, and quantised weights cannot be trained. Give the folder of "
            "the same model in bfloat16 or float32; parts.language_model.quantization: nf4 then holds the "
            "frozen weights below adapters in 4 bits."
        )
    if content["model_type"] in transformers.CONFIG_MAPPING:
        return
    if "auto_map" not in content:
        raise CheckpointError(
            f"{file}: transformers {transformers.__version__} has no model type {model_type!r}. Install a "
            "version that has it, or correct model_type."
        )
    if not trust_remote_code:
        raise CheckpointError(
            f"{file}: the model type {model_type!r} is defined by Python code in the model folder. {TRUST}"
        )


def check_tokenizer_files(folder: Path) -> None:
    """Raises: CheckpointError without a vocabulary: transformers would make an empty tokenizer."""
    if not any((folder / name).is_file() for name in VOCABULARY_FILES):
        raise CheckpointError(
            f"{folder} has no tokenizer (none of {', '.join(VOCABULARY_FILES)}). Copy the tokenizer files "
            "from the model that this one was made from."
        )


def has_processor_files(folder: Path) -> bool:
    return any((folder / name).is_file() for name in PROCESSOR_FILES)


def read_tensor_names(folder: Path) -> frozenset[str]:
    """The names of all tensors in the folder's safetensors files; empty for a folder of pickled weights.

    Raises: CheckpointError when weights are missing or a file is cut off or broken.
    """
    files = weight_files(folder)
    names: set[str] = set()
    for file in files:
        if not file.is_file():
            raise CheckpointError(
                f"{folder} lacks {file.name}, one of the {len(files)} files that its index lists. Copy or "
                "download it."
            )
        if file.suffix == ".safetensors":
            names.update(read_header(file)[0])
    return frozenset(names)


def weight_files(folder: Path) -> list[Path]:
    """The files of the folder's weights, in the order of their names.

    Raises: CheckpointError when the folder has none.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            weight_map = read_json(index).get("weight_map", {})
            return [folder / file for file in sorted(set(weight_map.values()))]
    raise CheckpointError(
        f"{folder} has no weights (neither model.safetensors, pytorch_model.bin nor an index of several such "
        "files). Give the folder that holds them, or copy them here."
    )


def is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file()


def adapter_file(folder: Path) -> Path:
    """The weights of an adapter folder.

    Raises: CheckpointError when the folder is none, or has no weights in safetensors.
    """
    if not is_adapter(folder):
        is_model = (folder / "config.json").is_file()
        told = "holds a whole model, not an adapter" if is_model else "holds no adapter"
        raise CheckpointError(
            f"{folder} {told}: it has no adapter_config.json. "
            + ("Give it as model.path." if is_model else "Give the folder of a PEFT adapter.")
        )
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        raise CheckpointError(
            f"{folder} has no adapter_model.safetensors. Save the adapter again with a current PEFT, or copy "
            "its weights here."
        )
    return file


def read_header(file: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """Name -> {"dtype", "shape", "data_offsets"} of a safetensors file's tensors, and where bytes start.

    Raises: CheckpointError when the file is cut off or broken.
    """
    try:
        with safe_open(file, framework="pt"):  # it compares the header with the file's size
            pass
        with file.open("rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(size))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file} ({file.stat().st_size} bytes) is not a whole safetensors file: {shorten(error)} It "
            "is cut off or damaged; copy or download it again."
        ) from error
    header.pop("__metadata__", None)
    return header, 8 + size
