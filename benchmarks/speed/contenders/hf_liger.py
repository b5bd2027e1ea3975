"""The plain loop with Liger's kernels on the model: norms, rotations, gated layers, head and loss in one."""

from __future__ import annotations

from torch import nn

from benchmarks.speed.contenders.hf import Loop
from benchmarks.speed.contenders.measure import main


class LigerLoop(Loop):
    def adjust(self) -> None:
        apply_liger(getattr(self.model, "base_model", self.model), self.job.cell.model.family)


def apply_liger(model: nn.Module, family: str) -> None:
    """Through Liger's own function for the family, on the opened model below any adapters."""
    from liger_kernel.transformers import apply_liger_kernel_to_gemma3, apply_liger_kernel_to_llama

    apply = {"gemma3": apply_liger_kernel_to_gemma3, "llama": apply_liger_kernel_to_llama}[family]
    apply(model=getattr(model, "model", model) if type(model).__name__ == "LoraModel" else model)


if __name__ == "__main__":
    main(LigerLoop)
