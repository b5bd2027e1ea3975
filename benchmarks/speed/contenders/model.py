"""The model as a user of plain transformers and PEFT opens it for a method, and its optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from benchmarks.speed.cells import LORA_RANK
from benchmarks.speed.contenders.measure import LEARNING_RATE, Job

LINEAR_LAYERS = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"


def open_model(job: Job, attention: str = "sdpa") -> nn.Module:
    """On the device, with what the cell's method trains open and all else frozen."""
    cell = job.cell
    opens = AutoModelForImageTextToText if cell.model.sees_images else AutoModelForCausalLM
    settings: dict[str, Any] = {"dtype": job.dtype, "attn_implementation": attention}
    if job.device.type == "cuda":
        settings["device_map"] = {"": 0}
    if cell.method == "qlora":
        settings["quantization_config"] = four_bits(job.dtype)
    model = opens.from_pretrained(job.base, **settings)
    model.config.get_text_config().use_cache = False
    model.requires_grad_(False)
    if cell.method in ("lora", "qlora"):
        model = add_adapters(model, within="language_model" if cell.model.sees_images else "layers")
    elif cell.method == "full with vision":
        model.requires_grad_(True)
    elif cell.method == "projector":
        model.model.multi_modal_projector.requires_grad_(True)
    else:
        (model.model.language_model if cell.model.sees_images else model).requires_grad_(True)
    return model.train()


def four_bits(dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=["vision_tower", "multi_modal_projector", "lm_head"],
    )


def add_adapters(model: nn.Module, within: str) -> nn.Module:
    """Adapters in the model's own type: PEFT's default, float32, is slower here."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=LORA_RANK,
        lora_alpha=2 * LORA_RANK,
        target_modules=rf".*{within}\..*\.({LINEAR_LAYERS})",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config, autocast_adapter_dtype=False)


def open_processor(job: Job) -> Any:
    """Its tokenizer pads on the right, as for training."""
    processor = (AutoProcessor if job.cell.model.sees_images else AutoTokenizer).from_pretrained(job.base)
    tokenizer_of(processor).padding_side = "right"
    return processor


def tokenizer_of(processor: Any) -> Any:
    return getattr(processor, "tokenizer", processor)


def open_optimizer(job: Job, model: nn.Module) -> torch.optim.Optimizer:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if job.cell.eight_bit_states:
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(trained, lr=LEARNING_RATE, weight_decay=0.0)
    return torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0, fused=job.device.type == "cuda")
