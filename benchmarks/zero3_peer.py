"""Plain transformers' Trainer under DeepSpeed ZeRO-3, on the rows and the model that `engines.py` trains.

Usage: torchrun --nproc-per-node N benchmarks/zero3_peer.py BASE ROWS.jsonl METHOD STEPS MICRO_BATCH
ROWS_PER_GPU OUT.json. METHOD is lora or full; the vision tower is frozen, and the projector trains with full.
Tokens are counted from the attention masks of all processes; rank 0 writes seconds, tokens and peak memory of
each step.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from PIL import Image
from plain import plain_batch
from torch import nn
from torch.utils.data import SequentialSampler
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

LANGUAGE_LAYERS = r".*language_model\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
ZERO_3 = {
    "bf16": {"enabled": True},
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "stage3_gather_16bit_weights_on_model_save": False,
    },
    "zero_allow_untested_optimizer": True,
    "gradient_clipping": 1.0,
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
}


def main() -> None:
    base, rows, method, steps, micro_batch, rows_per_gpu, out = sys.argv[1:]
    # Before the model is opened: that is what makes transformers shard it while it loads.
    arguments = TrainingArguments(
        output_dir=str(Path(out).with_suffix("")),
        max_steps=int(steps),
        per_device_train_batch_size=int(micro_batch),
        gradient_accumulation_steps=int(rows_per_gpu) // int(micro_batch),
        gradient_checkpointing=method == "full",
        gradient_checkpointing_kwargs={"use_reentrant": False},
        learning_rate=1e-5,
        lr_scheduler_type="constant",
        bf16=True,
        optim="adamw_torch_fused",
        deepspeed=ZERO_3,
        dataloader_num_workers=6,
        remove_unused_columns=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    meter = Meter(Path(out))
    samples = [json.loads(line) for line in Path(rows).read_text().splitlines()]
    trainer = InOrder(
        model=open_model(base, method),
        args=arguments,
        train_dataset=samples,
        data_collator=Collate(AutoProcessor.from_pretrained(base), Path(rows).parent),
        callbacks=[meter],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def open_model(base: str, method: str) -> nn.Module:
    model = AutoModelForImageTextToText.from_pretrained(
        base, dtype=torch.bfloat16, attn_implementation="sdpa"
    )
    model.config.get_text_config().use_cache = False
    model.requires_grad_(False)
    if method == "full":
        model.model.multi_modal_projector.requires_grad_(True)
        model.model.language_model.requires_grad_(True)
        return model
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=16, lora_alpha=32, target_modules=LANGUAGE_LAYERS, task_type="CAUSAL_LM")
    return get_peft_model(model, config, autocast_adapter_dtype=False)


class InOrder(Trainer):
    def _get_train_sampler(self, *_: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


class Collate:
    """Chat rows -> a padded batch through the model's own processor, targets on answers alone."""

    def __init__(self, processor: Any, folder: Path) -> None:
        self.processor, self.folder = processor, folder
        self.processor.tokenizer.padding_side = "right"

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        written = [self.written(sample) for sample in samples]
        # What the template writes behind the answer is part of it: the end of the turn.
        splits = [
            text.rindex(sample["messages"][1]["content"])
            for text, sample in zip(written, samples, strict=True)
        ]
        prompts = [text[:split] for text, split in zip(written, splits, strict=True)]
        answers = [text[split:] for text, split in zip(written, splits, strict=True)]
        images = [[Image.open(self.folder / name) for name in sample["images"]] for sample in samples]
        return plain_batch(self.processor, prompts, answers, images)

    def written(self, sample: dict[str, Any]) -> str:
        question, answer = sample["messages"]
        text = question["content"].removeprefix("<image>")
        content = [{"type": "image"}, {"type": "text", "text": text}]
        turns = [
            {"role": "user", "content": content},
            {"role": "assistant", "content": [{"type": "text", "text": answer["content"]}]},
        ]
        return self.processor.apply_chat_template(turns, tokenize=False)


class Meter(TrainerCallback):
    """One line per step, of all processes together; it waits for the device, as our own log does."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.counted: list[torch.Tensor] = []
        self.steps: list[dict[str, float]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        model.register_forward_pre_hook(self.count, with_kwargs=True)
        self.start = time.perf_counter()

    def count(self, _model: nn.Module, _inputs: Any, fields: dict[str, Any]) -> None:
        self.counted.append(fields["attention_mask"].sum())

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        num_tokens = torch.stack(self.counted).sum()
        dist.all_reduce(num_tokens)
        self.counted.clear()
        torch.cuda.synchronize()
        now = time.perf_counter()
        memory = torch.tensor(torch.cuda.max_memory_allocated(), device="cuda")
        dist.all_reduce(memory, op=dist.ReduceOp.MAX)
        self.steps.append(
            {
                "num_input_tokens": int(num_tokens),
                "step_seconds": now - self.start,
                "peak_memory_bytes": int(memory),
            }
        )
        self.start = now

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        if "loss" in logs:
            self.steps[-1]["loss"] = float(logs["loss"])

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if dist.get_rank() == 0:
            self.out.write_text(json.dumps(self.steps))


if __name__ == "__main__":
    main()
