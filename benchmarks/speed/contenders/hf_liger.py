"""The plain loop with Liger's kernels on the model: norms, rotations, gated layers, head and loss in one."""

from __future__ import annotations

from torch import nn

from benchmarks.speed.contenders.hf import Loop
from benchmarks.speed.contenders.measure import main


class LigerLoop(Loop):
    def adjust(self) -> None:
        # Below any adapters: its function looks at the family's own class.
        model = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        apply_liger(model, self.job.cell.model.family)


def apply_liger(model: nn.Module, family: str) -> None:
    """Through Liger's own function for the family, on the opened model."""
    from liger_kernel.transformers import apply_liger_kernel_to_gemma3, apply_liger_kernel_to_llama

    {"gemma3": apply_liger_kernel_to_gemma3, "llama": apply_liger_kernel_to_llama}[family](model=model)


if __name__ == "__main__":
    main(LigerLoop)
