"""Plain transformers and PEFT: the loop that a careful user writes.

SDPA attention with the model's own mask, fused AdamW on the weights as they are, gradients clipped, rows of a
step sorted by length so that padding is least, batches prepared ahead by worker processes and sent from
pinned memory. The loss is the mean over the step's targets, so that accumulation changes nothing.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.speed.contenders.batch import Collate, Sample, probe_first_row, sent
from benchmarks.speed.contenders.measure import Job, Setting, Step, main
from benchmarks.speed.contenders.model import open_model, open_optimizer, open_processor


class Loop:
    def __init__(self, job: Job, attention: str = "sdpa") -> None:
        self.job = job
        self.model = open_model(job, attention)
        self.adjust()
        self.collate = Collate(open_processor(job))
        self.samples = job.samples()
        self.optimizer = open_optimizer(job, self.model)
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.precision = f"AdamW on {str(job.dtype).removeprefix('torch.')} weights"

    def adjust(self) -> None:
        """What a contender does to the opened model."""

    def run(self, setting: Setting, num_steps: int) -> Iterator[Step]:
        switch_checkpointing(self.model, setting.gradient_checkpointing)
        self.optimizer.zero_grad()  # what a run left that was out of memory
        steps = [self.micro_batches(step, setting.micro_batch_size) for step in range(num_steps)]
        batches = iter(self.load([rows for step in steps for rows in step]))
        start = time.perf_counter()
        for step in steps:
            num_targets = sum(sample["num_targets"] for rows in step for sample in rows)
            num_tokens, loss = self.train_step([batches] * len(step), num_targets)
            now = time.perf_counter()
            yield Step(num_tokens, now - start, loss)
            start = now

    def micro_batches(self, step: int, size: int) -> list[list[Sample]]:
        first = step * self.job.rows_per_step
        rows = self.samples[first : first + self.job.rows_per_step]
        rows = sorted(rows, key=lambda sample: -sample["num_tokens"])
        return [rows[start : start + size] for start in range(0, len(rows), size)]

    def load(self, micro_batches: list[list[Sample]]) -> DataLoader:
        workers = self.job.num_workers
        return DataLoader(
            micro_batches,
            batch_size=None,
            collate_fn=self.collate,
            num_workers=workers,
            prefetch_factor=4 if workers else None,
            pin_memory=self.job.device.type == "cuda",
        )

    def train_step(
        self, micro_batches: list[Iterator[dict[str, Tensor]]], num_targets: int
    ) -> tuple[int, float]:
        """Tokens of the step, and its mean loss over its targets."""
        losses, num_tokens = [], 0
        for batches in micro_batches:
            batch = next(batches)
            num_tokens += int(batch["attention_mask"].sum())
            loss = self.model(**sent(batch, self.job), num_items_in_batch=num_targets).loss
            loss.backward()
            losses.append(loss.detach())
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return num_tokens, float(torch.stack(losses).sum())

    def mask(self) -> tuple[bool | None, str]:
        return probe_first_row(self.job, self.model)


def switch_checkpointing(model: nn.Module, on: bool) -> None:
    if on:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_disable()


if __name__ == "__main__":
    main(Loop)
