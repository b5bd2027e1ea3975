"""The plain halves of the stories: setups of transformers and PEFT as people have them, wrong on purpose."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)


def load_base(folder: Path) -> torch.nn.Module:
    return AutoModelForImageTextToText.from_pretrained(folder, dtype="float32")


def plain_inputs(toy, num_rows: int) -> list[dict[str, torch.Tensor]]:
    """Rows of the toy's data as the plain processor makes them; all text tokens are labels."""
    processor = AutoProcessor.from_pretrained(toy.base)
    rows = [json.loads(line) for line in toy.train.read_text().splitlines()[:num_rows]]
    made = []
    for row in rows:
        image = {"type": "image", "image": str(toy.train.parent / row["images"][0])}
        question, answer = (
            {"type": "text", "text": message["content"].removeprefix("<image>")}
            for message in row["messages"]
        )
        chat = [{"role": "user", "content": [image, question]}, {"role": "assistant", "content": [answer]}]
        inputs = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")
        made.append({**inputs, "labels": inputs["input_ids"]})
    return made


def lora_with_reentrant_checkpointing(base: Path) -> torch.nn.Module:
    """Adapters on both sides; only the text embeddings have the hook that reentrant checkpointing needs."""
    model = get_peft_model(load_base(base), LoraConfig(target_modules=["q_proj", "v_proj"]))
    model.train()
    plain = model.get_base_model()
    plain.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": True})
    plain.disable_input_require_grads()
    plain.get_input_embeddings().register_forward_hook(lambda *call: call[-1].requires_grad_(True))
    return model


class Wrapper(torch.nn.Module):
    """A model behind a forward that takes any keyword and passes on those it knows, as many tools have."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask=None, labels=None, **kwargs):
        return self.model(input_ids=input_ids, attention_mask=attention_mask, labels=labels)


def trainer_loss(model: torch.nn.Module, folder: Path, num_micro_batches: int) -> float:
    """The loss that transformers' Trainer reports for one step over eight equal rows."""
    ids = torch.arange(10, 30)
    rows = 8 * [{"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}]
    arguments = TrainingArguments(
        folder,
        max_steps=1,
        per_device_train_batch_size=8 // num_micro_batches,
        gradient_accumulation_steps=num_micro_batches,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer.state.log_history[0]["loss"]


def save_full_fine_tune(toy, folder: Path, form: str) -> Path:
    model = load_base(toy.base)
    if form == "save_pretrained alone":
        model.save_pretrained(folder)
        return folder
    shutil.copytree(toy.base, folder)
    tensors = load_file(folder / "model.safetensors")
    if form == "weights alone":
        shutil.rmtree(folder)
        folder.mkdir()
    else:
        tensors = {f"module.{name}": tensor for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
