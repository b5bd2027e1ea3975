"""The optimizer: AdamW on fp32 masters, one learning rate per part, clipping by the global norm.

In: a model with the plan applied. Each backward pass adds gradients to the masters in fp32; `step` clips,
updates the masters and rounds them into the weights. fp32 (and fp64) weights are their own masters.
A loss or norm that is not finite stops all updates from then on, on the device; that it stops the run is
step.py's business, and which parameters train is the plan's.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor, nn

from partwise.config import TrainConfig
from partwise.engine.single import Engine, Stretch
from partwise.errors import CheckpointError, PlanError
from partwise.records import PartsPlan
from partwise.training.adamw import PIECE, PLAIN_KINDS, PackedAdamW, is_packed, moments, packed_state
from partwise.training.state import MASTER, SavedState


class Optimizer:
    """Masters, parameter groups and schedule of the parts that train.

    The schedule has `num_steps` steps and begins at the run's step `first_step`.
    `masters` holds, by parameter name, the tensor that AdamW updates. `stopped` is 1.0 from the first step on
    whose loss or gradient norm was not finite: masters, moments and weights stay as before it. It lies beside
    the masters, and so do norms: on the device, or on the host where the engine keeps them there.

    Raises:
        PlanError: nothing trains.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: PartsPlan,
        train: TrainConfig,
        num_steps: int,
        engine: Engine | None = None,
        first_step: int = 0,
    ) -> None:
        parameters = dict(model.named_parameters())
        self.engine = engine or Engine()
        if not plan.trainable:
            raise PlanError("nothing would train: every part is frozen. Set a part's mode to lora or full.")
        self.parameters: dict[str, nn.Parameter] = {name: parameters[name] for name in plan.trainable}
        self.names = {part.part: part.trainable for part in plan.parts if part.trainable}
        self.max_grad_norm = train.max_grad_norm
        self.num_steps = num_steps
        self.first_step = first_step
        self.train = train
        self.never_reached = set(self.parameters)
        self.num_updates: Counter[str] = Counter()  # on the host; AdamW has its own beside the moments
        self.stopped = torch.zeros((), device=next(iter(self.parameters.values())).device)
        self.masters, self.adamw = self.engine.make_masters(
            self.parameters, lambda tensors: self._make_adamw(model, plan, tensors)
        )
        self.groups = {name: group for group in self.adamw.param_groups for name in group["names"]}

    def _make_adamw(self, model: nn.Module, plan: PartsPlan, tensors: Mapping[str, Tensor]) -> Any:
        make = torch.optim.AdamW if self.train.optimizer_states == "float32" else PackedAdamW
        groups = self._groups(model, plan, tensors)
        adamw = make(groups, betas=self.train.adam_betas, eps=self.train.adam_eps, fused=True)
        # The fused kernel reads this one from the device and skips its update where it is 1.
        adamw.found_inf = self.stopped
        return adamw

    def _groups(self, model: nn.Module, plan: PartsPlan, tensors: Mapping[str, Tensor]) -> list[dict]:
        """Per part one group that decays and one that does not, for each rate; empty ones are left out."""
        spared = undecayed_names(model, self.engine)
        groups = []
        for part in plan.parts:
            alike: dict[tuple[float, bool], list[str]] = {}
            for name in part.trainable:
                key = part.rate_fractions.get(name, 1.0), name in spared
                alike.setdefault(key, []).append(name)
            for (fraction, is_spared), names in sorted(alike.items()):
                rate = part.learning_rate * fraction
                groups.append(
                    {
                        "params": [tensors[name] for name in names],
                        "names": names,
                        "part": part.part,
                        "peak": rate,
                        "lr": rate,
                        "weight_decay": 0.0 if is_spared else part.weight_decay,
                    }
                )
        return groups

    def learning_rates(self, step: int) -> dict[str, float]:
        """Learning rate of each part that trains, at a zero-based step of the run; of its fastest layer."""
        factor, rates = self._factor(step), dict[str, float]()
        for group in self.adamw.param_groups:
            rates[group["part"]] = max(group["peak"] * factor, rates.get(group["part"], 0.0))
        return rates

    def _factor(self, step: int) -> float:
        return learning_rate_factor(step - self.first_step, self.num_steps, self.train)

    def step(self, step: int, loss: Tensor | None = None) -> dict[str, Tensor]:
        """`collect` and `update` in one."""
        self.collect()
        return self.update(step, loss)

    @torch.no_grad()
    def collect(self) -> None:
        """After the last backward pass: the masters' gradients, summed over ranks."""
        self.never_reached -= self.engine.finish_gradients(self.masters)

    @torch.no_grad()
    def update(self, step: int, loss: Tensor | None = None) -> dict[str, Tensor]:
        """One update; the gradient norm of each part before clipping, as scalars beside the masters.

        Gradients are gone afterwards. A tensor without gradient is left as it is, moments included; so are
        all when a norm or `loss` (scalar) is not finite, now or at an earlier step.
        """
        norms = self._grad_norms()
        norm = global_norm(norms.values())
        judged = norm.double() if loss is None else norm.double() + loss.to(norm.device)
        self.stopped.copy_(torch.maximum(self.stopped, (~judged.isfinite()).float()))
        factor = self._factor(step)
        for group in self.adamw.param_groups:
            group["lr"] = group["peak"] * factor
        self.engine.update(self.adamw, self.masters, self.max_grad_norm, norm)
        updated = {name: master for name, master in self.masters.items() if master.grad is not None}
        self.engine.write_weights([self.parameters[name] for name in updated], list(updated.values()))
        for master in updated.values():
            master.grad = None
        self.num_updates.update(updated.keys())
        return norms

    def _grad_norms(self) -> dict[str, Tensor]:
        norms = [self._grad_norm(names) for names in self.names.values()]
        return dict(zip(self.names, self.engine.total_norms(torch.stack(norms)), strict=True))

    def _grad_norm(self, names: Iterable[str]) -> Tensor:
        gradients = [self.masters[name].grad for name in names if self.masters[name].grad is not None]
        return torch.nn.utils.get_total_norm(gradients) if gradients else torch.zeros_like(self.stopped)

    def state(self, name: str) -> dict[str, Tensor]:
        """AdamW's state of one tensor, as far as it lies on this rank; empty before its first update."""
        return self.engine.state(self.adamw, name, self.masters[name])

    def directions(self, name: str) -> Iterator[Tensor]:
        """What AdamW moved one tensor along in the last step, in pieces: flat, without rate and decay."""
        state, (beta, beta_sq) = self.state(name), self.train.adam_betas
        scale, scale_sq = 1 - beta ** state["step"], (1 - beta_sq ** state["step"]).sqrt()
        for mean, square in moments(state):
            yield mean / square.sqrt().div_(scale_sq).add_(self.train.adam_eps).mul_(scale)

    def update_norm(self, names: Sequence[str]) -> Tensor:
        """Norm of what AdamW moved these tensors by in the last step, without decay; on this rank, scalar.

        Many tensors at a time: an adapter is hundreds of small ones.
        """
        beta, beta_sq = self.train.adam_betas
        norms = []
        for (step, rate), some in self._alike(names).items():
            scale, scale_sq = 1 - beta**step, math.sqrt(1 - beta_sq**step)
            for means, squares in self._moments(some):
                roots = torch._foreach_sqrt(squares)
                torch._foreach_div_(roots, scale_sq)
                torch._foreach_add_(roots, self.train.adam_eps)
                moved = torch._foreach_norm(torch._foreach_div(means, roots))
                norms.append(torch.linalg.vector_norm(torch.stack(moved)) * (rate / scale))
        return torch.linalg.vector_norm(torch.stack(norms))

    def _alike(self, names: Iterable[str]) -> dict[tuple[int, float], list[str]]:
        """The names by number of updates and learning rate."""
        alike: dict[tuple[int, float], list[str]] = defaultdict(list)
        for name in names:
            alike[self.num_updates[name], self.groups[name]["lr"]].append(name)
        return alike

    def _moments(self, names: Iterable[str]) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        """Both moments of the tensors, in pieces: about PIECE elements at a time."""
        means: list[Tensor] = []
        squares: list[Tensor] = []
        size = 0
        for mean, square in (pair for name in names for pair in moments(self.state(name))):
            means.append(mean)
            squares.append(square)
            size += mean.numel()
            if size >= PIECE:
                yield means, squares
                means, squares, size = [], [], 0
        if means:
            yield means, squares

    def state_dict(self) -> dict[str, Tensor]:
        """What training changed on this rank, as "kind/parameter name": masters, moments, step counts."""
        state = {f"{MASTER}/{name}": master.detach() for name, master in self.masters.items()}
        for name in self.masters:
            for kind, value in self.state(name).items():
                state[f"{kind}/{name}"] = value
        return state

    def stretches(self) -> dict[str, Stretch]:
        """Where in its parameter each master lies; empty where all are whole."""
        if not self.engine.shards_masters:
            return {}
        return {name: self.engine.stretch(name, parameter) for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def load(self, saved: SavedState, is_new_stage: bool = False) -> None:
        """Take over a saved state: masters, moments, and the weights as the masters rounded.

        Bit for bit, except for moments in 8 bits whose shards were others. In a new stage, tensors that did
        not train in the one before start afresh, and what trained there alone is left.

        Raises:
            CheckpointError: the state is of other trainable tensors, or of other shapes.
        """
        if not is_new_stage:
            self._check_names(saved.names)
        names = saved.names
        for name, master in self.masters.items():
            if name not in names:
                continue
            stretch = self.engine.stretch(name, self.parameters[name])
            flat = saved.master(name, stretch.start, master.numel())
            if saved.shape(name) != stretch.shape or flat.numel() != master.numel():
                raise CheckpointError(
                    f"the saved state of {name} is {saved.shape(name)}, but this run's is {stretch.shape}. "
                    "Resume with the config of the run."
                )
            if flat.numel() and flat.dtype != master.dtype:
                raise CheckpointError(
                    f"the saved state of {name} is {flat.dtype}, but this run's is {master.dtype}. Resume "
                    "with the model.dtype of the run."
                )
            master.copy_(flat.view_as(master))
            self.engine.write_weights([self.parameters[name]], [master])
            if state := saved.state(name, stretch.start, master.numel()):
                self.num_updates[name] = int(state["step"])
                self.engine.load_state(self.adamw, name, master, self._fitting(master, state))
        self.engine.finish_load()

    def _fitting(self, master: Tensor, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The state as this run's AdamW keeps it; saved moments are flat."""
        state = {kind: value.to(master.device, copy=True) for kind, value in state.items()}
        if "exp_avg" in state and isinstance(self.adamw, PackedAdamW) and is_packed(master):
            return {"step": state["step"], **packed_state(state["exp_avg"], state["exp_avg_sq"])}
        return {kind: v.view_as(master) if kind in PLAIN_KINDS else v for kind, v in state.items()}

    def _check_names(self, saved: Set[str]) -> None:
        missing, unknown = sorted(set(self.masters) - saved), sorted(saved - set(self.masters))
        if missing or unknown:
            raise CheckpointError(
                f"the saved state does not fit the plan: {len(missing)} tensors that train now are not in it "
                f"({', '.join(missing[:3]) or 'none'}), {len(unknown)} in it do not train now "
                f"({', '.join(unknown[:3]) or 'none'}). Resume with the parts that the run was started with."
            )


def undecayed_names(model: nn.Module, engine: Engine) -> set[str]:
    """Names of the parameters without weight decay: norms, biases and embeddings."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return {
        name
        for name, p in model.named_parameters()
        if id(p) in embeddings or len(engine.stretch(name, p).shape) <= 1
    }


def global_norm(norms: Iterable[Tensor]) -> Tensor:
    return torch.linalg.vector_norm(torch.stack(list(norms)))


def learning_rate_factor(step: int, num_steps: int, train: TrainConfig) -> float:
    """The part of the peak learning rate that a zero-based step uses.

    Warm-up ends on the peak at step warmup_steps - 1; the schedule would reach its end at step num_steps.
    So no step is spent at a rate of zero.
    """
    if step < train.warmup_steps:
        return (step + 1) / train.warmup_steps
    progress = (step - train.warmup_steps) / max(1, num_steps - train.warmup_steps)
    least = train.min_learning_rate_fraction
    return least + (1 - least) * SCHEDULES[train.learning_rate_schedule](progress)


# From 1 at the start to 0 at the end of training; progress is in [0, 1).
SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda progress: (1 + math.cos(math.pi * progress)) / 2,
    "linear": lambda progress: 1 - progress,
    "constant": lambda progress: 1.0,
}
