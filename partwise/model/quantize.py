"""Weights held in 4 bits: the ONLY file that imports bitsandbytes.

In: a model with its weights, and the linear layers that a plan quantises. Out: the same model with
bitsandbytes' Linear4bit in their places, or plain layers again with the weights that those compute with.
Which layers is decided in model/plan.py, when in training/job.py.

Source: NF4 and double quantisation, arXiv 2305.14314.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from partwise.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from transformers import PreTrainedModel

    from partwise.records import PartsPlan, Quantization

NF4_BLOCK = 64  # weights with one scale
SCALE_BLOCK = 256  # scales with one scale of their own, where quantisation is double

# What bitsandbytes holds beside the weights of each layer: the 16 values of NF4, and in double quantisation
# the 256 values of its scales' codes and their mean; fp32 each.
NF4_TABLE_BYTES = 4 * 16
SCALE_TABLE_BYTES = 4 * (256 + 1)


def require_bitsandbytes(what: str) -> None:
    """Raises: ConfigError where bitsandbytes is not installed; `what` needs it."""
    if find_spec("bitsandbytes") is None:
        raise ConfigError(
            f'{what} needs the package bitsandbytes, which is not installed. pip install "partwise[quant]".'
        )


def quantize_parts(model: PreTrainedModel, plan: PartsPlan, device: torch.device) -> None:
    """Puts the planned layers into 4 bits on `device`, one at a time; the rest of the model stays put."""
    for part in plan.parts:
        if part.quantization:
            quantize_linears(model, part.quantization, device)


def quantize_linears(
    model: PreTrainedModel,
    quantization: Quantization,
    device: str | torch.device = "cpu",
    compute_dtype: torch.dtype | None = None,
) -> None:
    """Puts these layers into 4 bits. They multiply in `compute_dtype`, by default in their own type.

    Raises:
        ConfigError: bitsandbytes is not installed.
    """
    require_bitsandbytes(f"quantization: {quantization.kind}")
    for name in quantization.modules:
        linear = model.get_submodule(name)
        dtype = compute_dtype or linear.weight.dtype
        replace_module(model, name, quantize_linear(linear, quantization.is_double, device, dtype))
    model.is_loaded_in_4bit = True  # PEFT asks for it, and wraps Linear4bit as a plain layer otherwise


def quantize_linear(
    linear: nn.Linear, is_double: bool, device: str | torch.device, compute_dtype: torch.dtype
) -> nn.Linear:
    from bitsandbytes.nn import Linear4bit, Params4bit

    quantized = Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=compute_dtype,
        device="meta",
    )
    weight = Params4bit(linear.weight.data, compress_statistics=is_double, quant_type="nf4", module=quantized)
    quantized.weight = weight.to(torch.device(device))  # here the weights become 4-bit codes
    quantized.bias = linear.bias
    # Else an evaluation on some CPUs lays the weights out anew, with scales rounded to bfloat16.
    quantized.support_avx512bf16_for_cpu = False
    return quantized.train(linear.training)


def dequantize_linears(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Puts plain layers in the places of quantised ones, with the weights that those compute with."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and hasattr(module.weight, "quant_state"):
            linear = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
            linear.weight = nn.Parameter(dequantized(module.weight, dtype), requires_grad=False)
            linear.bias = module.bias
            replace_module(model, name, linear.train(module.training))
    model.is_loaded_in_4bit = False  # as quantize_linears said


def dequantized(weight: Any, dtype: torch.dtype) -> Tensor:
    """What a layer multiplies by: code value times scale, (out_features, in_features)."""
    from bitsandbytes.functional import dequantize_4bit

    state = copy(weight.quant_state)
    state.dtype = dtype
    return dequantize_4bit(weight.data, state)


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, module)


def plain_arguments(model: PreTrainedModel, quantized: Iterable[str], is_double: bool) -> dict[str, Any]:
    """What transformers' BitsAndBytesConfig must be told to quantise these layers and no others."""
    linears = {
        name.removesuffix(".base_layer")
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".lora_" not in name
    }
    return {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": is_double,
        "llm_int8_skip_modules": sorted(linears - set(quantized)),
    }


def quantization_of(model: PreTrainedModel, plan: PartsPlan) -> dict[str, Any] | None:
    """`plain_arguments` of a model in training; None where nothing of it is quantised."""
    found = [part.quantization for part in plan.parts if part.quantization]
    names = [name for quantization in found for name in quantization.modules]
    return plain_arguments(model, names, any(q.is_double for q in found)) if found else None


def num_elements(parameter: Tensor) -> int:
    """How many weights a parameter stands for; a packed one holds two in a byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()


def weight_type(parameter: Tensor) -> str:
    """ "bfloat16", "float32", "nf4"."""
    state = getattr(parameter, "quant_state", None)
    return str(parameter.dtype).removeprefix("torch.") if state is None else str(state.quant_type)


def scale_tensors(parameters: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The scales of quantised parameters, by name: they make up the weights as much as the codes do."""
    for name, parameter in parameters:
        state = getattr(parameter, "quant_state", None)
        if state is None:
            continue
        yield f"{name}.absmax", state.absmax
        if state.nested:
            yield f"{name}.nested_absmax", state.state2.absmax
            yield f"{name}.nested_offset", state.offset


def nf4_bytes(num_weights: int, is_double: bool) -> int:
    """The bytes of one quantised tensor: codes, scales, tables."""
    num_scales = -(-num_weights // NF4_BLOCK)
    size = num_weights // 2 + NF4_TABLE_BYTES
    if not is_double:
        return size + 4 * num_scales
    return size + num_scales + 4 * -(-num_scales // SCALE_BLOCK) + SCALE_TABLE_BYTES
