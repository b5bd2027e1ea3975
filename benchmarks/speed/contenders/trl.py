"""TRL's SFTTrainer with its own collator, as its documentation shows for vision-language models.

Rows are prompt and completion with images, the loss is on completions alone. Packing is left off: TRL refuses
it for images, and without FlashAttention its packed documents see each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from datasets import Dataset, Image, List
from transformers import PrinterCallback
from trl import SFTConfig, SFTTrainer

from benchmarks.speed.contenders.batch import probe_first_row
from benchmarks.speed.contenders.measure import Job, Setting, Step, main
from benchmarks.speed.contenders.model import open_model, open_processor
from benchmarks.speed.contenders.trainer import Meter, trainer_settings


class Trl:
    def __init__(self, job: Job, with_liger: bool = False) -> None:
        self.job, self.with_liger = job, with_liger
        self.processor = open_processor(job)
        self.model = open_model(job)
        self.rows = as_dataset(job)
        self.precision = f"AdamW on {str(job.dtype).removeprefix('torch.')} weights"

    def run(self, setting: Setting, num_steps: int) -> Iterator[Step]:
        meter = Meter()
        config = SFTConfig(
            **trainer_settings(self.job, setting, num_steps),
            gradient_checkpointing_kwargs={"use_reentrant": False},
            max_length=self.job.cell.max_seq_len,
            completion_only_loss=True,
            train_sampling_strategy="sequential",
            use_liger_kernel=self.with_liger,
        )
        trainer = SFTTrainer(
            model=self.model,
            args=config,
            train_dataset=self.rows,
            processing_class=self.processor,
            callbacks=[meter],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        yield from meter.steps()

    def mask(self) -> tuple[bool | None, str]:
        return probe_first_row(self.job, self.model)


def as_dataset(job: Job, written: bool = False) -> Dataset:
    """Conversations, or what the chat template makes of them; images are decoded when they are read."""
    rows: dict[str, list[Any]] = {"prompt": [], "completion": [], "images": []}
    for sample in job.samples():
        question, answer = sample["messages"]
        text = question["content"].removeprefix("<image>" * len(sample["images"]))
        rows["prompt"].append(sample["prompt"] if written else [{"role": "user", "content": text}])
        rows["completion"].append(sample["completion"] if written else [answer])
        rows["images"].append(sample["images"])
    if not any(rows["images"]):
        del rows["images"]
        return Dataset.from_dict(rows)
    return Dataset.from_dict(rows).cast_column("images", List(Image()))


if __name__ == "__main__":
    main(Trl)
