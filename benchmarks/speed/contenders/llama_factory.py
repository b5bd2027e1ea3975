"""LLaMA-Factory through its own `run_exp`, with its template of the family, SDPA and rows in their order.

It opens the model anew for each setting that is tried; only steps are measured. Packing is left off: its
packs of Gemma-3 keep neither the window nor the images' blocks.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llamafactory.train.tuner import run_exp
from torch import nn

from benchmarks.speed.cells import LORA_RANK
from benchmarks.speed.contenders.batch import probe_first_row
from benchmarks.speed.contenders.measure import Job, Setting, Step, main
from benchmarks.speed.contenders.trainer import Meter, trainer_settings

TEMPLATES = {"gemma3": "gemma3", "llama": "llama3"}
# Of tower, projector and language model, which are frozen.
FROZEN = {
    "projector": (True, False, True),
    "full with vision": (False, False, False),
}


class Prober(Meter):
    """Probes the mask of the model that is about to train, too; nobody else gets hold of it."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self.job = job

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **fields: Any) -> None:
        self.found = probe_first_row(self.job, model)
        super().on_train_begin(args, state, control, model, **fields)


class LlamaFactory:
    def __init__(self, job: Job) -> None:
        self.job = job
        write_dataset(job)
        self.precision = f"AdamW on {str(job.dtype).removeprefix('torch.')} weights"

    def run(self, setting: Setting, num_steps: int) -> Iterator[Step]:
        settings = trainer_settings(self.job, setting, num_steps)
        # It has its own switch, and its own checkpointing behind it.
        del settings["gradient_checkpointing"]
        settings["disable_gradient_checkpointing"] = not setting.gradient_checkpointing
        self.prober = Prober(self.job)
        run_exp({**settings, **model_settings(self.job)}, callbacks=[self.prober])
        shutil.rmtree(settings["output_dir"], ignore_errors=True)
        yield from self.prober.steps()

    def mask(self) -> tuple[bool | None, str]:
        return self.prober.found


def model_settings(job: Job) -> dict[str, Any]:
    cell = job.cell
    tower, projector, language = FROZEN.get(cell.method, (True, True, False))
    settings: dict[str, Any] = {
        "stage": "sft",
        "do_train": True,
        "model_name_or_path": str(job.base),
        "template": TEMPLATES[cell.model.family],
        "finetuning_type": "lora" if cell.method in ("lora", "qlora") else "full",
        "freeze_vision_tower": tower,
        "freeze_multi_modal_projector": projector,
        "freeze_language_model": language,
        "flash_attn": "sdpa",
        "dataset": "rows",
        "dataset_dir": str(job.folder / "llama_factory"),
        "cutoff_len": cell.max_seq_len,
        "disable_shuffling": True,
        "overwrite_cache": True,
        "pure_bf16": job.device.type == "cuda",
    }
    if settings["finetuning_type"] == "lora":
        settings |= {"lora_rank": LORA_RANK, "lora_alpha": 2 * LORA_RANK, "lora_target": "all"}
    if cell.method == "qlora":
        settings |= {"quantization_bit": 4, "quantization_method": "bnb"}
    return settings


def write_dataset(job: Job) -> Path:
    folder = job.folder / "llama_factory"
    folder.mkdir(exist_ok=True)
    columns = {"messages": "messages"}
    samples = job.samples()
    if any(sample["images"] for sample in samples):
        columns["images"] = "images"
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    facts = {"file_name": "rows.jsonl", "formatting": "sharegpt", "columns": columns, "tags": tags}
    (folder / "dataset_info.json").write_text(json.dumps({"rows": facts}))
    lines = [json.dumps({name: sample[name] for name in columns}) for sample in samples]
    (folder / "rows.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return folder


if __name__ == "__main__":
    main(LlamaFactory)
