"""Unsloth: its patched model and TRL's SFTTrainer under its patches, as its notebooks for Gemma-3 show.

It is imported first, since it patches what is imported after it. Images go through its own collator; of text
it removes padding by itself. The first steps compile, which no measured step sees.
"""

# ruff: noqa: I001
from __future__ import annotations

import unsloth

from collections.abc import Iterator
from typing import Any

from trl import SFTConfig, SFTTrainer
from unsloth.trainer import UnslothVisionDataCollator

from benchmarks.speed.cells import LORA_RANK
from benchmarks.speed.contenders.batch import probe_first_row
from benchmarks.speed.contenders.measure import Job, Setting, Step, main
from benchmarks.speed.contenders.trainer import Meter, trainer_settings
from benchmarks.speed.contenders.trl import as_dataset

CHECKPOINTING = "unsloth"  # its own, which keeps activations in the host's memory


class Unsloth:
    def __init__(self, job: Job) -> None:
        self.job = job
        if job.cell.method == "projector":
            raise SystemExit("Unsloth has no flag for the projector")
        self.model, self.processor = open_unsloth(job)
        self.has_images = any(sample["images"] for sample in job.samples())
        # Its collator puts no images into conversations that do not name them; TRL's does.
        self.rows = as_dataset(job, written=self.has_images)
        self.precision = (
            f"AdamW on {str(job.dtype).removeprefix('torch.')} weights, adapters as it keeps them"
        )

    def run(self, setting: Setting, num_steps: int) -> Iterator[Step]:
        checkpointing = CHECKPOINTING if setting.gradient_checkpointing else False
        unsloth.FastModel.for_training(self.model, use_gradient_checkpointing=checkpointing)
        meter = Meter()
        extra: dict[str, Any] = {}
        if self.has_images:
            # What its notebooks set for images: rows reach the collator as they are.
            extra = {"remove_unused_columns": False, "dataset_kwargs": {"skip_prepare_dataset": True}}
        config = SFTConfig(
            **trainer_settings(self.job, setting, num_steps),
            **extra,
            max_length=self.job.cell.max_seq_len,
            completion_only_loss=True,
            train_sampling_strategy="sequential",
        )
        collator = UnslothVisionDataCollator(self.model, self.processor) if self.has_images else None
        trainer = SFTTrainer(
            model=self.model,
            args=config,
            train_dataset=self.rows,
            processing_class=self.processor,
            data_collator=collator,
            callbacks=[meter],
        )
        trainer.train()
        yield from meter.steps()

    def mask(self) -> tuple[bool | None, str]:
        return probe_first_row(self.job, self.model)


def open_unsloth(job: Job) -> tuple[Any, Any]:
    cell = job.cell
    is_full = cell.method.startswith("full")
    model, processor = unsloth.FastModel.from_pretrained(
        str(job.base),
        max_seq_length=cell.max_seq_len,
        dtype=job.dtype,
        load_in_4bit=cell.method == "qlora",
        load_in_16bit=cell.method != "qlora",
        full_finetuning=is_full,
        use_gradient_checkpointing=CHECKPOINTING,
        use_exact_model_name=True,
        local_files_only=True,
    )
    if not is_full:
        model = unsloth.FastModel.get_peft_model(
            model,
            r=LORA_RANK,
            lora_alpha=2 * LORA_RANK,
            lora_dropout=0.0,
            bias="none",
            finetune_vision_layers=False,
            finetune_language_layers=True,
            finetune_attention_modules=True,
            finetune_mlp_modules=True,
            use_gradient_checkpointing=CHECKPOINTING,
        )
    elif cell.method == "full" and cell.model.sees_images:
        for part in ("vision_tower", "multi_modal_projector"):
            getattr(model.model, part).requires_grad_(False)
    return model, processor


if __name__ == "__main__":
    main(Unsloth)
