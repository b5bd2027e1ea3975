"""What DeepSpeed says of a model that is wholly frozen, and of one with two open parts, as JSON.

    python tests/e2e/zero.py MODEL EMPTY_FOLDER

One process on the CPU. Nothing is compiled: the shared-memory kernel, which DeepSpeed would build for its
collectives, is taken off the list of those that fit this machine.
"""

from __future__ import annotations

import json
import os
import sys

import deepspeed
import torch
from deepspeed.ops import __compatible_ops__
from transformers import AutoModelForImageTextToText, Trainer, TrainingArguments

MODEL, FOLDER = sys.argv[1:]


def frozen_model() -> torch.nn.Module:
    return AutoModelForImageTextToText.from_pretrained(MODEL, dtype="float32").requires_grad_(False)


def zero(stage: int) -> dict:
    return {"zero_optimization": {"stage": stage}, "train_micro_batch_size_per_gpu": 2}


def train(stage: int, is_open: bool) -> float:
    """The loss of one step of Trainer, which gives DeepSpeed the tensors that train in two groups."""
    arguments = TrainingArguments(
        FOLDER,
        max_steps=1,
        per_device_train_batch_size=2,
        deepspeed=zero(stage),
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    ids = torch.arange(10, 30)
    rows = 2 * [{"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}]
    model = frozen_model()
    model.model.multi_modal_projector.requires_grad_(is_open)
    model.model.language_model.requires_grad_(is_open)
    return Trainer(model, arguments, train_dataset=rows).train().training_loss


def give_all_to_adamw(stage: int) -> None:
    """DeepSpeed with an optimizer that holds every tensor, frozen as they are."""
    model = frozen_model()
    deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(model.parameters()), config=zero(stage))


def outcome(function, *arguments) -> object:
    try:
        return function(*arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
__compatible_ops__["deepspeed_shm_comm"] = False
torch.distributed.init_process_group("gloo", init_method=f"file://{FOLDER}/store", rank=0, world_size=1)
said = {
    f"ZeRO-{stage}": {
        "Trainer, frozen": outcome(train, stage, False),
        "Trainer, open": outcome(train, stage, True),
        "AdamW, frozen": outcome(give_all_to_adamw, stage),
    }
    for stage in (2, 3)
}
print(json.dumps(said))
