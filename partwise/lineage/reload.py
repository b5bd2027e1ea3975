"""A saved folder in a fresh process, with plain transformers and PEFT: what it says about a few rows.

Run as a script by verify.py with a job file; it imports nothing of Partwise, so that what loads here loads
for everyone. In: folders, rows as the model's own inputs, and a trained model's logits unless a folder is to
give them. Out: one JSON line: how far the logits are apart, or what is wrong with the folder.
"""

from __future__ import annotations

import contextlib
import gc
import inspect
import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel, get_peft_model_state_dict
from peft.utils import load_peft_weights
from safetensors.torch import load_file
from transformers import AutoConfig, AutoProcessor, AutoTokenizer, BitsAndBytesConfig

# Beside the weights: activations of a few rows, and what a device keeps for itself.
ROOM_FACTOR = 1.2
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")


class FolderError(Exception):
    """The folder is not what was saved; the text says how."""


def main(job_file: str) -> None:
    job = json.loads(Path(job_file).read_text())
    result = examine(job)
    result["seconds"] = time.time() - job["started"]
    result["imports_partwise"] = "partwise" in sys.modules
    print(json.dumps(result))


def examine(job: dict[str, Any]) -> dict[str, Any]:
    """Errors of the folder's logits; or `fault`: what is wrong; or `unable`: why nothing could be said."""
    try:
        return compare(job, load_file(job["probe"]))
    except FolderError as fault:
        return {"fault": str(fault)}
    except (MemoryError, torch.OutOfMemoryError) as error:
        return {"unable": str(error).partition("\n")[0] or "out of memory"}
    except Exception as error:
        return {"fault": f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"}


def compare(job: dict[str, Any], tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Errors of the folder's logits against the probe's, or against those of the folder `reference`."""
    folder = Path(job["folder"])
    check_input_side(folder, job)
    rows = split_rows(tensors, "inputs")
    device = pick_device(job)
    result: dict[str, Any] = {"device": device.type, "dtype": job["dtype"], "num_rows": len(rows)}
    wanted = [row["logits"] for row in split_rows(tensors, "trained")]
    if job["reference"]:
        reference = open_folder(Path(job["reference"]), job, device)
        wanted = [logits_of(reference, row) for row in rows]
        if isinstance(reference, PeftModel):
            with reference.disable_adapter():
                untrained = [logits_of(reference, row) for row in rows]
            result["moved"] = relative_error(wanted, untrained)
        del reference
        gc.collect()
    model = open_folder(folder, job, device)
    found = [logits_of(model, row) for row in rows]
    result["relative_error"] = relative_error(found, wanted)
    result["max_difference"] = max(float((a - b).abs().max()) for a, b in zip(found, wanted, strict=True))
    return result


def split_rows(tensors: dict[str, torch.Tensor], kind: str) -> list[dict[str, torch.Tensor]]:
    """The tensors named KIND/ROW/NAME, by row."""
    rows: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        prefix, row, name = key.split("/")
        if prefix == kind:
            rows.setdefault(int(row), {})[name] = tensor
    return [rows[row] for row in sorted(rows)]


def relative_error(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    """The largest norm of a row's difference over the norm of what it should be; infinite for NaN."""
    errors = [float((a - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True)]
    return max(error if error == error else float("inf") for error in errors)


@torch.no_grad()
def logits_of(model: Any, row: dict[str, torch.Tensor]) -> torch.Tensor:
    """(positions, V) in fp32 on the CPU: the last positions of a row, `num_logits` of them."""
    num_logits = int(row["num_logits"])
    plain = model.get_base_model() if isinstance(model, PeftModel) else model
    options: dict[str, Any] = {"use_cache": False}
    if "logits_to_keep" in inspect.signature(plain.forward).parameters:
        options["logits_to_keep"] = num_logits
    inputs = {
        name: tensor.to(plain.device, plain.dtype if tensor.is_floating_point() else None)
        for name, tensor in row.items()
        if name != "num_logits"
    }
    return model(**inputs, **options).logits[0, -num_logits:].float().cpu()


def check_input_side(folder: Path, job: dict[str, Any]) -> None:
    """Raises: FolderError unless tokenizer, processor and chat template are those of the training."""
    trust = job["trust_remote_code"]
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
    if tokenizer(job["text"])["input_ids"] != job["token_ids"]:
        raise FolderError(
            f"its tokenizer ({len(tokenizer)} tokens) writes other ids than the one of the training"
        )
    owner = tokenizer
    if job["processor"]:
        if not any((folder / name).is_file() for name in PROCESSOR_FILES):
            raise FolderError(f"it has no processor (neither {' nor '.join(PROCESSOR_FILES)})")
        # A processor with a video part needs torchvision, which may be missing here.
        with contextlib.suppress(ImportError):
            owner = AutoProcessor.from_pretrained(folder, trust_remote_code=trust)
            if type(owner).__name__ != job["processor"]:
                kind = type(owner).__name__
                raise FolderError(f"its processor opens as a {kind}, not as {job['processor']}")
    if job["chat_template"] and (owner.chat_template or tokenizer.chat_template) != job["chat_template"]:
        raise FolderError("its chat template is not the one of the training")


def open_folder(folder: Path, job: dict[str, Any], device: torch.device) -> Any:
    """The model of a folder, or the adapter on the base that it names, in eval mode.

    Raises: FolderError where anything is missing, left over or of another shape.
    """
    adapter_file = folder / "adapter_config.json"
    if not adapter_file.is_file():
        return open_model(folder, job, device, job["quantization"].get(str(folder))).eval()
    base = json.loads(adapter_file.read_text())["base_model_name_or_path"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = PeftModel.from_pretrained(
                open_model(base, job, device, job["quantization"].get(str(folder))),
                str(folder),
                autocast_adapter_dtype=False,  # computes as training did; PEFT's default is adapters in fp32
            )
        except KeyError as error:
            raise FolderError(f"the adapter file lacks {error}") from error
        model = model.eval()
    stored = set(load_peft_weights(str(folder), device="cpu"))
    loaded = set(get_peft_model_state_dict(model))
    refuse(sorted(loaded - stored), "were newly initialised, because the adapter file lacks them")
    refuse(sorted(stored - loaded), "of the adapter file have no place in the model")
    return model


def open_model(
    folder: Path | str, job: dict[str, Any], device: torch.device, quantization: dict[str, Any] | None
) -> Any:
    """The model of a folder on the device. `quantization` says what BitsAndBytesConfig must be told."""
    options: dict[str, Any] = {}
    if quantization:
        options["quantization_config"] = BitsAndBytesConfig(
            bnb_4bit_compute_dtype=getattr(torch, job["dtype"]), **quantization
        )
        options["device_map"] = {"": str(device)}
    trust = job["trust_remote_code"]
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust)
    model, report = auto_class(config).from_pretrained(
        folder,
        dtype=getattr(torch, job["dtype"]),
        attn_implementation=job["attention"],
        trust_remote_code=trust,
        output_loading_info=True,
        weights_only=True,
        **options,
    )
    for module in model.modules():
        # Else bitsandbytes rounds scales to bfloat16 on some CPUs.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    tied = set(model.all_tied_weights_keys)
    refuse(sorted(set(report["missing_keys"]) - tied), "were newly initialised, because the files lack them")
    refuse(sorted(report["unexpected_keys"]), "of the files have no place in the model")
    refuse([str(key) for key in report["mismatched_keys"]], "have another shape")
    return model if quantization else model.to(device)


def auto_class(config: Any) -> Any:
    auto_map = getattr(config, "auto_map", None) or {}
    takes_images = type(config) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    if takes_images or "AutoModelForImageTextToText" in auto_map:
        return transformers.AutoModelForImageTextToText
    return transformers.AutoModelForCausalLM


def refuse(names: list[str], what: str) -> None:
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise FolderError(f"{len(names)} tensors {what}: {', '.join(names[:3])}{more}")


def pick_device(job: dict[str, Any]) -> torch.device:
    """The device of the training where it has room for the model, else the CPU.

    Raises: MemoryError where that has none either: trying would take other processes down with this one.
    """
    needed = job["num_weights"] * getattr(torch, job["dtype"]).itemsize * ROOM_FACTOR
    wanted = torch.device(job["device"])
    if wanted.type == "cuda" and torch.cuda.is_available() and needed < torch.cuda.mem_get_info(wanted)[0]:
        return wanted
    if needed > (free := free_memory_bytes()):
        raise MemoryError(f"it needs {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free")
    return torch.device("cpu")


def free_memory_bytes() -> float:
    """What Linux says is available; elsewhere no limit is known."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return float("inf")
    fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    main(sys.argv[1])
