"""Rows -> batches as plain transformers takes them: padded, by one call of the model's own processor."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks.speed.contenders.mask import probe_mask
from benchmarks.speed.contenders.measure import Job
from benchmarks.speed.contenders.model import open_processor, tokenizer_of

IGNORE_INDEX = -100
Sample = dict[str, Any]


class Collate:
    """Samples -> a padded batch, by one call of the model's own processor; may be sent to other processes."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.pad_token_id = tokenizer_of(processor).pad_token_id

    def __call__(self, samples: list[Sample]) -> dict[str, Tensor]:
        texts = [sample["prompt"] + sample["completion"] for sample in samples]
        settings = {"padding": True, "return_tensors": "pt", "add_special_tokens": False}
        if any(sample["images"] for sample in samples):
            settings["images"] = [[Image.open(path) for path in sample["images"]] for sample in samples]
        batch = dict(self.processor(text=texts, **settings))
        labels = torch.full_like(batch["input_ids"], IGNORE_INDEX)
        for row, sample in enumerate(samples):
            # What the template writes after the end of the turn is no target.
            end = self.num_tokens_before(sample)
            assert int(batch["attention_mask"][row].sum()) == sample["num_tokens"], "another tokenisation"
            targets = slice(end, end + sample["num_targets"])
            labels[row, targets] = batch["input_ids"][row, targets]
        return {**batch, "labels": labels}

    def num_tokens_before(self, sample: Sample) -> int:
        answer = tokenizer_of(self.processor).encode(sample["completion"], add_special_tokens=False)
        return sample["num_tokens"] - len(answer)


def sent(batch: dict[str, Tensor], job: Job) -> dict[str, Tensor]:
    """On the job's device, floating-point inputs in the model's type."""
    moved = {name: value.to(job.device, non_blocking=True) for name, value in batch.items()}
    return {k: v.to(job.dtype) if v.is_floating_point() else v for k, v in moved.items()}


def probe_first_row(job: Job, model: nn.Module) -> tuple[bool | None, str]:
    """Whether the model's mask is right, tried on the job's first row."""
    batch = sent(Collate(open_processor(job))(job.samples()[:1]), job)
    del batch["labels"]
    return probe_mask(model, batch)
