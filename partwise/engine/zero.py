"""Optimizer and gradients in shards, in stage 3 weights as well: DeepSpeed's ZeRO.

In: the model that the plan trains. Out: the same losses as one process. DeepSpeed sums gradients into fp32
shards, rounds masters into weights and gathers these. The update is Partwise's own: a master is a view of
DeepSpeed's fp32 shard, so AdamW, norms and clipping are those of one process. All ranks must run the same
modules in every micro-batch; with a frozen vision side, stage 3 lets a rank without an image skip it.

Some attributes of DeepSpeed that are used here are not public; they are those of 0.19.8.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any
from warnings import filterwarnings

import deepspeed
import torch
from deepspeed.ops import __compatible_ops__
from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_grad
from torch import Tensor, nn

from partwise.engine.partition import hidden, partition
from partwise.engine.ranks import Ranks
from partwise.engine.single import Engine, Stretch, frozen_vision
from partwise.model.head import TokenLoss
from partwise.model.shares import BUCKET_ELEMENTS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from partwise.records import PartsPlan

# Tensors of at most so many elements are gathered once a step and then kept: norms, biases, small adapters.
KEPT_ELEMENTS = 100_000


class Zero(Engine):
    """What the two stages have in common."""

    stage: int
    runs_together = True
    shards_masters = True

    def __init__(self, ranks: Ranks) -> None:
        super().__init__(ranks)
        self.reached: set[str] = set()
        self.kept_whole: list[nn.Module] = []
        # Of names that DeepSpeed 0.19.8 uses and newer torch has others for: a line for each call and rank.
        filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
        # DeepSpeed would compile a kernel for minutes before the first step on a CPU, and gloo is enough.
        __compatible_ops__["deepspeed_shm_comm"] = False

    def spread(
        self, model: PreTrainedModel, plan: PartsPlan, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.module, self.dtype, self.device = TokenLoss(model), dtype, device
        self.runs_vision = plan.trains_vision

    def make_masters(
        self, parameters: Mapping[str, nn.Parameter], make_adamw: Callable[[Mapping[str, Tensor]], Any]
    ) -> tuple[dict[str, Tensor], Any]:
        self.parameters = dict(parameters)
        for name, parameter in parameters.items():
            parameter.register_post_accumulate_grad_hook(partial(self._note_reached, name))
        with hidden(self.module, self.kept_whole):
            self.deepspeed, *_ = deepspeed.initialize(
                model=self.module, optimizer=Untouched(parameters.values()), config=self._config()
            )
        # No micro-batch is the last one before finish_gradients says so.
        self.deepspeed.set_gradient_accumulation_boundary(False)
        masters = {name: self._master(parameter) for name, parameter in parameters.items()}
        return masters, make_adamw(masters)

    def _config(self) -> dict[str, Any]:
        """DeepSpeed's settings: sums in fp32, nothing that changes gradients, and few words."""
        return {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 0.0,
            "bf16": {"enabled": self.dtype == torch.bfloat16, "check_grad_overflow": False},
            "communication_data_type": "fp32",
            "data_types": {"grad_accum_dtype": "fp32"},
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": self.stage, "reduce_bucket_size": BUCKET_ELEMENTS},
            "log_level": "error",
        }

    def _note_reached(self, name: str, parameter: nn.Parameter) -> None:
        self.reached.add(name)

    def loss_sum(self, model: PreTrainedModel, inputs: dict[str, Any], labels: Tensor) -> Tensor:
        return self.deepspeed(inputs, labels)

    def token_losses(self, model: PreTrainedModel, inputs: dict[str, Any], labels: Tensor) -> Tensor:
        return self.deepspeed(inputs, labels, True)

    def logits(self, model: PreTrainedModel, inputs: dict[str, Any]) -> Tensor:
        return self.deepspeed(inputs, None)

    def backward(self, loss: Tensor) -> None:
        # DeepSpeed takes the mean over ranks, but shares of a mean are to be summed.
        if loss.grad_fn is not None:
            self.deepspeed.backward(loss * self.ranks.size)

    def finish_gradients(self, masters: Mapping[str, Tensor]) -> set[str]:
        flags = self.ranks.any_of([name in self.reached for name in masters])
        reached = {name for name, is_reached in zip(masters, flags, strict=True) if is_reached}
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
        # Masters are new already; to DeepSpeed it is left to round them into weights and to gather these.
        self.deepspeed.set_gradient_accumulation_boundary(True)
        with hidden(self.module, self.kept_whole):
            self.deepspeed.step()
        self.deepspeed.set_gradient_accumulation_boundary(False)

    def _master(self, parameter: Any) -> Tensor:
        """A view of this rank's fp32 shard; (0,) where it has none of the tensor."""
        raise NotImplementedError

    def _gradient(self, parameter: Any, master: Tensor) -> Tensor:
        """A view of the summed gradient of the shard."""
        raise NotImplementedError

    def write_weights(self, parameters: Sequence[nn.Parameter], masters: Sequence[Tensor]) -> None:
        """Nothing: `update` and `finish_load` write all weights together."""

    def total(self, values: Tensor) -> Tensor:
        return self.ranks.sum(values)

    def total_norms(self, norms: Tensor) -> Tensor:
        return self.ranks.sum(norms.double().square()).sqrt().to(norms.dtype)


class Zero2(Zero):
    """Every rank has all weights; a shard is a piece of all tensors in a row, cut anywhere."""

    name = "zero2"
    stage = 2

    def _config(self) -> dict[str, Any]:
        config = super()._config()
        config["zero_optimization"] |= {
            "allgather_bucket_size": BUCKET_ELEMENTS,
            "compute_grad_norm": False,
        }
        return config

    def _master(self, parameter: Any) -> Tensor:
        mapping = parameter._hp_mapping
        return torch.empty(0, device=parameter.device) if mapping is None else mapping.hp_fragment.detach()

    def _gradient(self, parameter: Any, master: Tensor) -> Tensor:
        mapping = parameter._hp_mapping
        if mapping is None:
            return torch.empty_like(master)
        return mapping.get_lp_grad_fragment(parameter._index_in_param_group).view(-1)

    def stretch(self, name: str, parameter: Any) -> Stretch:
        mapping = getattr(parameter, "_hp_mapping", None)
        start = 0 if mapping is None else mapping.lp_fragment_address.start
        return Stretch(start, tuple(parameter.shape))

    def finish_load(self) -> None:
        self.deepspeed.optimizer.update_lp_params()


class Zero3(Zero):
    """A rank has an equal piece of each tensor, padded at the end; a module that runs gathers its weights."""

    name = "zero3"
    stage = 3
    shards_weights = True

    def spread(
        self, model: PreTrainedModel, plan: PartsPlan, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().spread(model, plan, dtype, device)
        self.kept_whole = frozen_vision(model, plan)
        partition(model, self.kept_whole, self.ranks, device, self._config())

    def _config(self) -> dict[str, Any]:
        config = super()._config()
        # It would replace torch's linear in the whole process by one that rounds 16-bit products once more.
        config["zero_optimization"] |= {
            "memory_efficient_linear": False,
            "stage3_prefetch_bucket_size": BUCKET_ELEMENTS,
            "sub_group_size": BUCKET_ELEMENTS,
            "stage3_param_persistence_threshold": KEPT_ELEMENTS,
        }
        return config

    def update(self, adamw: Any, masters: Mapping[str, Tensor], max_grad_norm: float, norm: Tensor) -> None:
        super().update(adamw, masters, max_grad_norm, norm)
        # Only a step's first micro-batch overwrites what is there, and only for the tensors that it reaches.
        self.deepspeed.optimizer.grad_partitions_flat_buffer.zero_()

    def _master(self, parameter: Any) -> Tensor:
        return unpadded(parameter, safe_get_local_fp32_param(parameter).detach())

    def _gradient(self, parameter: Any, master: Tensor) -> Tensor:
        shard = safe_get_local_grad(parameter)
        # DeepSpeed sums uninitialised padding, and would skip the step where its norm of that is not finite.
        shard[master.numel() :].zero_()
        return shard[: master.numel()]

    def stretch(self, name: str, parameter: Any) -> Stretch:
        if not is_partitioned(parameter):
            return Stretch(0, tuple(parameter.shape))
        return Stretch(shard_start(parameter), tuple(parameter.ds_shape))

    def local(self, tensor: Any) -> Tensor:
        return unpadded(tensor, tensor.ds_tensor) if is_partitioned(tensor) else tensor.detach()

    def finish_load(self) -> None:
        optimizer = self.deepspeed.optimizer
        with hidden(self.module, self.kept_whole):
            optimizer._partition_all_parameters()
        for index in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(index)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)

    def whole(self, tensor: Tensor) -> Tensor:
        if not is_partitioned(tensor):
            return super().whole(tensor)
        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().to("cpu", copy=True)


def is_partitioned(tensor: Any) -> bool:
    return hasattr(tensor, "ds_tensor")


def shard_start(parameter: Any) -> int:
    """Where this rank's piece begins in the flattened tensor; at its end where there is none."""
    return min(parameter.ds_zero_partition_rank * parameter.partition_numel(), parameter.ds_numel)


def unpadded(parameter: Any, shard: Tensor) -> Tensor:
    """A shard without the padding that makes all ranks' shards equally long."""
    return shard[: parameter.ds_numel - shard_start(parameter)]


class Untouched(torch.optim.Optimizer):
    """The optimizer that DeepSpeed shards: its step does nothing, because AdamW has updated the masters."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(list(parameters), {"lr": 0.0})

    def step(self, closure: None = None) -> None:
        """Nothing."""
