"""What is saved and loaded: weights that are not there, adapters, and folders that cannot be opened."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from bench import Bench, Row, failure, listening, loss_of, picture, trained_names, update
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from partwise.config import ModelConfig
from partwise.data.collate import collate
from partwise.export.adapter import open_adapter
from partwise.model.load import load_model
from partwise.model.parts import apply_plan, resolve_plan
from partwise.records import Example, StepData
from partwise.run import train
from partwise.training.checkpoint import write_model
from partwise.training.optim import Optimizer
from partwise.training.step import train_step

Tensors = dict[str, torch.Tensor]

PROJECTOR_RATE, ADAPTER_RATE = 0.01, 0.0001


def edited_copy(bench: Bench, name: str, edit: Callable[[Tensors], Tensors]) -> Path:
    """A copy of the base whose weights file was changed."""
    folder = bench.folder / name
    shutil.copytree(bench.base(), folder)
    file = folder / "model.safetensors"
    save_file(edit(load_file(file)), file, metadata={"format": "pt"})
    return folder


def open_plain(folder: Path) -> tuple[torch.nn.Module, list[str], str]:
    """The model as transformers loads it, what it misses, and what was said."""
    with listening() as said:
        model, report = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    return model, sorted(report["missing_keys"]), " ".join(said)


def open_ours(folder: Path) -> object:
    return load_model(ModelConfig(path=str(folder), dtype="float32"))


def weights_without_projector(bench: Bench) -> Row:
    folder = edited_copy(
        bench, "no-projector", lambda tensors: {k: t for k, t in tensors.items() if "projector" not in k}
    )
    model, missing, said = open_plain(folder)
    assert len(missing) == 2 and "MISSING" in said
    trained = bench.load().get_parameter(missing[0])
    assert not torch.equal(model.get_parameter(missing[0]), trained)
    message = bench.refusal(open_ours, folder)
    assert "2 missing in the files, which would be random" in message
    return Row(
        "A weights file lacks the projector.",
        f"Loads, with {len(missing)} tensors newly initialised. A table in the log says so, and the run "
        "goes on.",
        "Stops, with the names.",
        message,
    )


def weights_of_a_wrapped_model(bench: Bench) -> Row:
    folder = edited_copy(bench, "wrapped", lambda tensors: {f"module.{k}": t for k, t in tensors.items()})
    model, missing, said = open_plain(folder)
    total = len(list(model.named_parameters()))
    assert len(set(missing) - {"lm_head.weight"}) == total and "MISSING" in said
    message = bench.refusal(open_ours, folder)
    assert "Without that prefix all 67 tensors fit" in message
    return Row(
        "A model was saved while it was wrapped: `module.` stands before all names.",
        f"Loads, and all {total} tensors are random. A table in the log says so.",
        "Stops, after trying what would make them fit.",
        message.partition(": the weights do not fit")[0]
        + ": [...] "
        + message[message.index("Every name") :],
    )


def full_model_saved_alone(bench: Bench) -> Row:
    folder = bench.folder / "saved"
    bench.load().save_pretrained(folder)
    files = sorted(path.name for path in folder.iterdir())
    with listening() as said:
        size = len(AutoTokenizer.from_pretrained(folder))
    no_processor = failure(AutoProcessor.from_pretrained, folder)
    right = len(bench.processor().tokenizer)
    assert size < 10 < right and not said and no_processor.startswith("OSError")
    message = bench.refusal(open_ours, folder)
    assert "has no tokenizer" in message
    final, _ = adapter_run(bench)
    assert len(AutoProcessor.from_pretrained(final).tokenizer) == right
    assert (final / "chat_template.jinja").is_file()
    return Row(
        "A full fine-tune is saved by `model.save_pretrained` alone.",
        f"`AutoTokenizer` opens the folder without a word, with {size} tokens instead of {right}. "
        f"`AutoProcessor` fails. There are only {', '.join(f'`{file}`' for file in files)}.",
        "A checkpoint has processor, tokenizer and chat template; a folder without them is refused.",
        message,
    )


@cache
def adapter_run(bench: Bench) -> tuple[Path, Path]:
    """A run of Partwise with LoRA and an open projector: its final folder, and its base, which may change."""
    base = bench.folder / "own-base"
    shutil.copytree(bench.base(), base)
    rows = []
    for color in ("red", "green", "blue", "black"):
        picture(color).save(bench.folder / f"{color}.png")
        turns = [{"role": "user", "content": "<image>Which?"}, {"role": "assistant", "content": color}]
        rows.append(json.dumps({"messages": turns, "images": [f"{color}.png"]}) + "\n")
    data = bench.folder / "train.jsonl"
    data.write_text("".join(rows))
    config = bench.config(
        "parts: {projector: full, language_model: lora}",
        train="train: {steps: 4, global_batch_size: 4, micro_batch_size: 2, learning_rate: 1.0e-2}",
    )
    model = config.model.model_copy(update={"path": str(base)})
    files = config.data.model_copy(update={"train": str(data), "num_workers": 0})
    return train(config.model_copy(update={"model": model, "data": files})), base


def train_ours(bench: Bench, example: Example) -> tuple[Any, Path]:
    """A model after four steps with LoRA and an open projector, and the folder it is saved in."""
    config = bench.config(
        f"""
        parts:
          projector: {{mode: full, learning_rate: {PROJECTOR_RATE}}}
          language_model: {{mode: lora, lora_targets: attention, learning_rate: {ADAPTER_RATE}}}
        """,
        train="train: {learning_rate_schedule: constant}",
    )
    loaded = load_model(config.model)
    plan = resolve_plan(loaded.model, config)
    apply_plan(loaded.model, plan)
    optimizer = Optimizer(loaded.model, plan, config.train, 4)
    for step in range(4):
        train_step(loaded.model, StepData(step, (collate([example], 0),)), optimizer, torch.device("cpu"))
    folder = bench.folder / "ours"
    folder.mkdir(exist_ok=True)
    write_model(folder, loaded, plan)
    return loaded.model, folder


def tensors_in(folder: Path, word: str) -> int:
    with safe_open(folder / "adapter_model.safetensors", "pt") as tensors:
        return sum(word in name for name in tensors.keys())  # noqa: SIM118 - safe_open is no dict


def train_plain(bench: Bench, inputs: Tensors) -> Any:
    """A PEFT model after four steps with LoRA and an open projector."""
    settings = LoraConfig(target_modules=r".*language_model.*self_attn.*_proj", r=16, lora_alpha=32)
    model = get_peft_model(bench.load(), settings)
    model.base_model.model.model.multi_modal_projector.requires_grad_(True)
    names = trained_names(model)
    projector, adapters = ([n for n in names if ("projector" in n) == wanted] for wanted in (True, False))
    assert len(projector) == 2 and adapters
    groups = [
        {"params": [model.get_parameter(n) for n in group], "lr": rate}
        for group, rate in ((projector, PROJECTOR_RATE), (adapters, ADAPTER_RATE))
    ]
    optimizer = torch.optim.AdamW(groups)
    for _ in range(4):
        update(model, optimizer, inputs)
    return model


def adapter_without_projector(bench: Bench) -> Row:
    folder, inputs = bench.folder / "adapter", bench.inputs()
    turns = [
        {"role": "user", "content": "<image>Which color is this?"},
        {"role": "assistant", "content": "red"},
    ]
    example = bench.example({"messages": turns, "images": [picture("red")]})
    assert isinstance(example, Example) and torch.equal(example.input_ids, inputs["input_ids"][0])
    inputs["labels"] = example.labels[None]
    model = train_plain(bench, inputs)
    trained = loss_of(model, inputs)
    with listening() as said:
        model.save_pretrained(folder)
        reloaded = loss_of(PeftModel.from_pretrained(bench.load(), folder), inputs)
    assert tensors_in(folder, "projector") == 0 and reloaded - trained > 0.05 and not said

    ours, saved = train_ours(bench, example)
    kept = loss_of(ours, inputs)
    again = loss_of(PeftModel.from_pretrained(bench.load(), saved), inputs)
    num_tensors = tensors_in(saved, "projector")
    assert num_tensors == 2 and abs(kept - again) < 1e-4
    # An untrained projector would be seen.
    ours.model.multi_modal_projector.load_state_dict(bench.load().model.multi_modal_projector.state_dict())
    assert abs(loss_of(ours, inputs) - kept) > 0.01
    return Row(
        "LoRA on the language model, the projector trains in full.",
        f"The adapter is saved without the projector: the loss is {trained:.2f} before saving and "
        f"{reloaded:.2f} after loading. Nothing is said.",
        f"The adapter folder holds the projector: the loss is {kept:.2f} before saving and {again:.2f} after "
        "plain PEFT has loaded the folder.",
    )


def adapter_on_another_base(bench: Bench) -> Row:
    final, base = adapter_run(bench)
    inputs = bench.inputs()
    right = loss_of(
        PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(base), final), inputs
    )
    kept = (base / "model.safetensors").read_bytes()
    shutil.copy(bench.base("gemma3", 1) / "model.safetensors", base)
    try:
        with listening() as said:
            other = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(base), final)
        wrong = loss_of(other, inputs)
        message = bench.refusal(open_adapter, final)
    finally:
        (base / "model.safetensors").write_bytes(kept)
    assert abs(wrong - right) > 0.05 and not said
    assert "the adapter was trained on another base" in message
    return Row(
        "The base model's folder holds another fine-tune now than when the adapter was trained.",
        f"Loads without a word. The loss is {wrong:.2f}; on its own base it is {right:.2f}.",
        "Stops. The run recorded a fingerprint of its base.",
        message,
    )


CASES = (
    weights_without_projector,
    weights_of_a_wrapped_model,
    full_model_saved_alone,
    adapter_without_projector,
    adapter_on_another_base,
)
