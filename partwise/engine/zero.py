"""Optimizer, gradients and, in stage 3, weights in shards: DeepSpeed's ZeRO.

In: the model that the plan trains. Out: the same losses as one process. DeepSpeed does what shards need: it
sums gradients into this rank's fp32 shards, and gathers weights. The update is Partwise's own: a master is a
view of DeepSpeed's fp32 shard, and AdamW, clipping and norms work on masters as they do in one process. All
ranks must run the same modules in every micro-batch. This is the only file that imports deepspeed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import deepspeed
import torch
from deepspeed.ops import __compatible_ops__
from torch import Tensor, nn

from partwise.engine.ranks import Ranks
from partwise.engine.single import Engine, Stretch
from partwise.model.head import TokenLoss

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from partwise.records import PartsPlan

# Elements that are summed or gathered at a time: 200 MB in fp32.
BUCKET_ELEMENTS = 50_000_000


class Zero(Engine):
    """ZeRO of stage 2 (`zero2`) or 3 (`zero3`)."""

    def __init__(self, stage: int, ranks: Ranks) -> None:
        super().__init__(ranks)
        self.stage = stage
        self.name = f"zero{stage}"
        self.shards_weights = stage == 3
        self.reached: set[str] = set()

    def spread(self, model: PreTrainedModel, plan: PartsPlan, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.module = TokenLoss(model)

    def make_masters(
        self, parameters: Mapping[str, nn.Parameter], make_adamw: Callable[[Mapping[str, Tensor]], Any]
    ) -> tuple[dict[str, Tensor], Any]:
        self.parameters = dict(parameters)
        for name, parameter in parameters.items():
            parameter.register_post_accumulate_grad_hook(partial(self._note_reached, name))
        # Without this, DeepSpeed compiles a kernel for minutes that gloo does without.
        __compatible_ops__["deepspeed_shm_comm"] = False
        self.deepspeed, *_ = deepspeed.initialize(
            model=self.module, optimizer=Untouched(parameters.values()), config=self._config()
        )
        # Not the last micro-batch: finish_gradients says when a step's gradients are complete.
        self.deepspeed.set_gradient_accumulation_boundary(False)
        masters = {name: self._master(parameter) for name, parameter in parameters.items()}
        return masters, make_adamw(masters)

    def _config(self) -> dict[str, Any]:
        """DeepSpeed's settings: fp32 sums; no clipping, scaling and schedule of its own."""
        stage_2 = {"compute_grad_norm": False} if self.stage == 2 else {}
        return {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 0.0,
            "bf16": {"enabled": self.dtype == torch.bfloat16, "check_grad_overflow": False},
            "communication_data_type": "fp32",
            "data_types": {"grad_accum_dtype": "fp32"},
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {
                "stage": self.stage,
                "reduce_bucket_size": BUCKET_ELEMENTS,
                "allgather_bucket_size": BUCKET_ELEMENTS,
                **stage_2,
            },
        }

    def _note_reached(self, name: str, parameter: nn.Parameter) -> None:
        self.reached.add(name)

    def loss_sum(self, model: PreTrainedModel, inputs: dict[str, Any], labels: Tensor) -> Tensor:
        return self.deepspeed(inputs, labels)

    def logits(self, model: PreTrainedModel, inputs: dict[str, Any]) -> Tensor:
        return self.deepspeed(inputs, None)

    def backward(self, loss: Tensor) -> None:
        # DeepSpeed takes the mean over ranks; shares of a mean are to be summed.
        if loss.grad_fn is not None:
            self.deepspeed.backward(loss * self.ranks.size)

    def finish_gradients(self, masters: Mapping[str, Tensor]) -> set[str]:
        flags = self.ranks.any_of([name in self.reached for name in masters])
        reached = {name for name, flag in zip(masters, flags, strict=True) if flag}
        self.reached.clear()
        if reached:
            self.deepspeed.optimizer.finalize_gradient_accumulation_boundary()
        for name in reached:
            masters[name].grad = self._gradient(self.parameters[name], masters[name])
        return reached

    def update(self, adamw: Any, masters: Mapping[str, Tensor], max_grad_norm: float, norm: Tensor) -> None:
        if all(master.grad is None for master in masters.values()):
            return
        super().update(adamw, masters, max_grad_norm, norm)
        # Its own optimizer does nothing: what is left is to round masters into weights and gather these.
        self.deepspeed.set_gradient_accumulation_boundary(True)
        self.deepspeed.step()
        self.deepspeed.set_gradient_accumulation_boundary(False)

    def _master(self, parameter: Any) -> Tensor:
        """This rank's fp32 shard; empty where another rank has all of the tensor."""
        mapping = parameter._hp_mapping
        if mapping is None:
            return parameter.new_empty(0, dtype=torch.float32, requires_grad=False)
        return mapping.get_hp_fragment().detach()

    def _gradient(self, parameter: Any, master: Tensor) -> Tensor:
        mapping = parameter._hp_mapping
        if mapping is None:
            return torch.empty_like(master)
        return mapping.get_lp_grad_fragment(parameter._index_in_param_group).reshape(-1)

    def stretch(self, name: str, parameter: Any) -> Stretch:
        mapping = getattr(parameter, "_hp_mapping", None)
        start = mapping.lp_fragment_address.start if mapping is not None else 0
        return Stretch(start, tuple(parameter.shape))

    def write_weight(self, parameter: nn.Parameter, master: Tensor) -> None:
        """Nothing: `update` and `finish_load` write all weights at once."""

    def finish_load(self) -> None:
        """The weights as the masters rounded, after something else than `update` wrote to the masters."""
        self.deepspeed.optimizer.update_lp_params()

    def total(self, values: Tensor) -> Tensor:
        return self.ranks.sum(values)

    def total_norms(self, norms: Tensor) -> Tensor:
        return self.ranks.sum(norms.double().square()).sqrt().to(norms.dtype)


class Untouched(torch.optim.Optimizer):
    """The optimizer that DeepSpeed shards and calls: Partwise's AdamW has already updated the shards."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(list(parameters), {"lr": 0.0})

    def step(self, closure: None = None) -> None:
        """Nothing."""
