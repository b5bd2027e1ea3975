"""What contenders with a transformers Trainer share: a callback that reads tokens, seconds and loss of steps.

Tokens are counted in a hook before the model's forward pass, from the attention mask that it is given.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from benchmarks.speed.contenders.measure import LEARNING_RATE, Job, Setting, Step


class Meter(TrainerCallback):
    def __init__(self) -> None:
        self.counted: list[torch.Tensor] = []
        self.measured: list[tuple[int, float]] = []
        self.losses: list[float] = []
        self.handle: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        self.handle = model.register_forward_pre_hook(self.count, with_kwargs=True)
        self.start = time.perf_counter()

    def count(self, _model: nn.Module, _inputs: Any, fields: dict[str, Any]) -> None:
        mask = fields.get("attention_mask")
        self.counted.append(
            fields["input_ids"].new_tensor(fields["input_ids"].numel()) if mask is None else mask.sum()
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        num_tokens = int(torch.stack(self.counted).sum())
        self.counted.clear()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.measured.append((num_tokens, now - self.start))
        self.start = now

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        if "loss" in logs:
            self.losses.append(float(logs["loss"]))

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.handle.remove()

    def steps(self) -> Iterator[Step]:
        for (num_tokens, seconds), loss in zip(self.measured, self.losses, strict=True):
            yield Step(num_tokens, seconds, loss)


def trainer_settings(job: Job, setting: Setting, num_steps: int) -> dict[str, Any]:
    """TrainingArguments that are the same for each of these contenders."""
    return {
        "output_dir": str(job.folder / "trainer"),
        "max_steps": num_steps,
        "per_device_train_batch_size": setting.micro_batch_size,
        "gradient_accumulation_steps": job.rows_per_step // setting.micro_batch_size,
        "gradient_checkpointing": setting.gradient_checkpointing,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0,
        "bf16": job.dtype is torch.bfloat16,
        "optim": "adamw_8bit" if job.cell.eight_bit_states else "adamw_torch_fused",
        "dataloader_num_workers": job.num_workers,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 0,
        "use_cpu": job.device.type == "cpu",
    }
