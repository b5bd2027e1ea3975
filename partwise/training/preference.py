"""Losses of a preference step: which of two answers is better, or whether an answer is good.

In: the log-probability of each answer under the model, and where a loss has one under the reference. Out: the
step's loss and what is told of its answers. Each micro-batch gives sums, which are divided by the pairs, or
answers, of the whole step, so that any split into micro-batches and over ranks gives the same loss and
gradients. The formulas are functions of log-probabilities alone.

Letters: P pairs or answers of a micro-batch.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from partwise.config import ObjectiveConfig
from partwise.engine.single import Engine
from partwise.model.parts import adapters_off
from partwise.model.transfer import to_device
from partwise.records import IGNORE_INDEX, Batch, StepData
from partwise.training.step import eval_mode, model_inputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from partwise.data.loader import StepLoader
    from partwise.training.share import Shares

# What is summed over a step's answers, and what is told of it.
SUMS = (
    *("answer_loss", "token_loss", "right"),
    *("chosen_reward", "rejected_reward", "chosen_log_prob", "rejected_log_prob"),
)
METRICS = (
    *("reward_margin", "reward_accuracy"),
    *("chosen_reward", "rejected_reward", "chosen_log_prob", "rejected_log_prob"),
)


Source = Literal["none", "adapter_off", "copy", "precomputed"]


class Answers(NamedTuple):
    """Log-probabilities of answers (P,), under the model and the reference, and their lengths in tokens.

    Without a reference, `reference` is 0.
    """

    policy: Tensor
    reference: Tensor
    lengths: Tensor

    @property
    def ratios(self) -> Tensor:
        return self.policy - self.reference

    @property
    def means(self) -> Tensor:
        """The model's log-probability of a token of the answer, averaged over its tokens."""
        return self.policy / self.lengths


def dpo_sigmoid(chosen: Answers, rejected: Answers, objective: ObjectiveConfig) -> Tensor:
    """-(1 - e) log s(b h) - e log s(-b h), with h the difference of the log-ratios and e the label smoothing.

    Source: Rafailov et al. 2023, eq. 7 (arXiv 2305.18290); cDPO: Mitchell 2023, eq. 3.
    """
    scaled = objective.strength * (chosen.ratios - rejected.ratios)
    wrong = objective.label_smoothing
    return -(1 - wrong) * logsigmoid(scaled) - wrong * logsigmoid(-scaled)


def dpo_hinge(chosen: Answers, rejected: Answers, objective: ObjectiveConfig) -> Tensor:
    """max(0, 1 - b h).

    Source: Zhao et al. 2023 (SLiC-HF, arXiv 2305.10425), as Liu et al. 2023 write it (RSO, arXiv 2309.06657).
    """
    return relu(1 - objective.strength * (chosen.ratios - rejected.ratios))


def dpo_ipo(chosen: Answers, rejected: Answers, objective: ObjectiveConfig) -> Tensor:
    """(h - 1 / (2 b))^2, with log-ratios averaged over each answer's tokens.

    Source: Azar et al. 2023, eq. 17 (arXiv 2310.12036). The paper does not say that they are averages; its
    authors told TRL so (trl 1.16, dpo_trainer.py).
    """
    margin_P = chosen.ratios / chosen.lengths - rejected.ratios / rejected.lengths
    return (margin_P - 1 / (2 * objective.strength)) ** 2


def simpo(chosen: Answers, rejected: Answers, objective: ObjectiveConfig) -> Tensor:
    """-log s(b (mean log-probability of chosen - of rejected) - gamma), smoothed as dpo_sigmoid.

    Source: Meng et al. 2024, eq. 6 (arXiv 2405.14734).
    """
    scaled = objective.strength * (chosen.means - rejected.means) - objective.gamma
    wrong = objective.label_smoothing
    return -(1 - wrong) * logsigmoid(scaled) - wrong * logsigmoid(-scaled)


def orpo(chosen: Answers, rejected: Answers, objective: ObjectiveConfig) -> Tensor:
    """-b log s(log odds of chosen - of rejected), odds = p / (1 - p) of p = exp(mean log-probability).

    Source: Hong et al. 2024, eqs. 4 and 7 (arXiv 2403.07691). The token loss beside it is added elsewhere.
    """
    odds_P = [a.means - log_one_minus_exp(a.means) for a in (chosen, rejected)]
    return -objective.strength * logsigmoid(odds_P[0] - odds_P[1])


def log_one_minus_exp(values: Tensor) -> Tensor:
    """log(1 - exp(values)) of negative values, exact near 0 and far from it."""
    is_near = values > -math.log(2)
    near, far = values.where(is_near, -1.0), values.where(~is_near, -1.0)
    return torch.where(is_near, torch.log(-torch.expm1(near)), torch.log1p(-torch.exp(far)))


PairLoss = Callable[[Answers, Answers, ObjectiveConfig], Tensor]
DPO_VARIANTS: dict[str, PairLoss] = {"sigmoid": dpo_sigmoid, "hinge": dpo_hinge, "ipo": dpo_ipo}
PAIR_LOSSES: dict[str, PairLoss] = {"simpo": simpo, "orpo": orpo}


def kto(answers: Answers, is_good_P: Tensor, divergence: Tensor, objective: ObjectiveConfig) -> Tensor:
    """w (1 - s(b (r - z))) of a good answer, w (1 - s(b (z - r))) of a bad one, r its log-ratio.

    `divergence` z is an estimate of the KL divergence from the reference, without gradient.
    Source: Ethayarajh et al. 2024, eqs. 7 and 8 (arXiv 2402.01306).
    """
    signed = torch.where(is_good_P, 1.0, -1.0) * (answers.ratios - divergence)
    weights = torch.where(is_good_P, objective.desirable_weight, objective.undesirable_weight)
    return weights * (1 - torch.sigmoid(objective.strength * signed))


class Evaluated(NamedTuple):
    """The mean loss over held-out rows, and what a preference loss tells of their answers."""

    loss: float
    preference: dict[str, float]


@dataclass(frozen=True)
class Preference:
    """The preference loss of a run. `source` says where its reference is; of "copy", `copy` is the model.

    All ranks must have the same source: the model is asked once more where it is its own reference.
    """

    objective: ObjectiveConfig
    source: Source = "adapter_off"
    copy: PreTrainedModel | None = None
    metrics = METRICS

    def accumulate(
        self, model: PreTrainedModel, step_data: StepData, device: torch.device, engine: Engine
    ) -> Tensor:
        """Forward and, where there is a graph, backward over micro-batches: the step's loss and METRICS,
        (1 + METRICS,), fp64, the same on all ranks."""
        divergence = self.divergence(model, step_data, device, engine)
        divisors = self.divisors(step_data.counts, device)
        total = torch.zeros(len(SUMS), device=device, dtype=torch.float64)
        for batch in step_data.batches:
            means = self.sums(model, batch, divergence, device, engine) / divisors
            engine.backward(loss_of(means))
            total += means.detach()
        return told(engine.ranks.sum(total))

    @torch.no_grad()
    def evaluate(
        self,
        model: PreTrainedModel,
        loader: StepLoader | Shares,
        device: torch.device,
        is_stopped: Callable[[], bool] = lambda: False,
        engine: Engine | None = None,
    ) -> Evaluated | None:
        """Loss and METRICS over the answers of all of the loader's rows; None where `is_stopped` said so.

        Raises:
            DataError: a step of the loader has no target token.
        """
        engine = engine or Engine()
        total, counts = torch.zeros(len(SUMS), device=device, dtype=torch.float64), Counter[str]()
        with eval_mode(model):
            for step_data in loader.iterate(0, loader.steps_per_epoch):
                if engine.ranks.any(is_stopped()):
                    return None
                divergence = self.divergence(model, step_data, device, engine)
                for batch in step_data.batches:
                    total += self.sums(model, batch, divergence, device, engine)
                counts += step_data.counts
        loss, *metrics = told(engine.ranks.sum(total) / self.divisors(counts, device)).tolist()
        return Evaluated(loss, dict(zip(METRICS, metrics, strict=True)))

    def divergence(
        self, model: PreTrainedModel, step_data: StepData, device: torch.device, engine: Engine
    ) -> Tensor | None:
        """KTO's z of the whole step: the mean log-ratio of other rows' answers, at least 0; else None."""
        if self.objective.loss != "kto":
            return None
        total = torch.zeros((), device=device, dtype=torch.float64)
        with torch.no_grad():
            for batch in step_data.others:
                total += self.answers(model, batch, device, engine).ratios.sum()
        return (engine.ranks.sum(total) / max(1, step_data.counts["other"])).clamp(min=0)

    def divisors(self, counts: Counter[str], device: torch.device) -> Tensor:
        """What each of SUMS is divided by, for means over all that was counted."""
        good, bad = max(1, counts["chosen"]), max(1, counts["rejected"])
        number = good if self.objective.shape == "pairs" else max(1, counts["chosen"] + counts["rejected"])
        values = (number, max(1, counts["chosen tokens"]), number, good, bad, good, bad)
        return to_device(torch.tensor(values, dtype=torch.float64), device)

    def sums(
        self,
        model: PreTrainedModel,
        batch: Batch,
        divergence: Tensor | None,
        device: torch.device,
        engine: Engine,
    ) -> Tensor:
        """SUMS over the answers of one micro-batch, (SUMS,), fp64; the losses with their graph."""
        answers = self.answers(model, batch, device, engine)
        is_good_P = to_device(torch.tensor([side == "chosen" for side in batch.sides if side]).bool(), device)
        chosen, rejected = (Answers(*(t[is_side] for t in answers)) for is_side in (is_good_P, ~is_good_P))
        token_loss = -self.token_weight * chosen.policy.sum()
        if divergence is not None:
            answer_loss = kto(answers, is_good_P, divergence, self.objective).sum()
        else:
            answer_loss = self.pair_losses(chosen, rejected, self.objective).sum()
        with torch.no_grad():
            rewards = self.rewards(chosen), self.rewards(rejected)
            if self.objective.shape == "pairs":
                right = (rewards[0] > rewards[1]).sum()
            else:  # no two answers make a pair
                right = (rewards[0] > 0).sum() + (rewards[1] < 0).sum()
            log_probs = chosen.policy.sum(), rejected.policy.sum()
            facts = torch.stack([right.double(), rewards[0].sum(), rewards[1].sum(), *log_probs])
        return torch.cat([torch.stack([answer_loss, token_loss]), facts])

    @property
    def pair_losses(self) -> PairLoss:
        return PAIR_LOSSES.get(self.objective.loss) or DPO_VARIANTS[self.objective.variant]

    @property
    def token_weight(self) -> float:
        """What the token loss of the chosen answers weighs."""
        return 1.0 if self.objective.loss == "orpo" else self.objective.sft_weight

    def rewards(self, answers: Answers) -> Tensor:
        """The implicit reward of each answer: beta times its log-ratio, or without a reference its mean."""
        values = answers.ratios if self.objective.has_reference else answers.means
        return self.objective.strength * values

    def answers(
        self,
        model: PreTrainedModel,
        batch: Batch,
        device: torch.device,
        engine: Engine,
    ) -> Answers:
        """The micro-batch's answers, in the order of its documents; fillers are none."""
        wanted = [i for i, side in enumerate(batch.sides) if side]
        reference = self.reference_log_probs(model, batch, device, engine)
        policy = answer_log_probs(model, batch, device, engine)
        index = to_device(torch.tensor(wanted, dtype=torch.long), device)
        lengths = to_device(answer_lengths(batch), device).double()
        return Answers(policy[index], reference[index], lengths[index])

    @torch.no_grad()
    def reference_log_probs(
        self, model: PreTrainedModel, batch: Batch, device: torch.device, engine: Engine
    ) -> Tensor:
        """Of each document, (documents,); zeros of fillers, and where the loss has no reference."""
        if self.source == "none":
            return torch.zeros(len(batch.sides), device=device, dtype=torch.float64)
        if self.source == "precomputed":
            known = [reference or 0.0 for reference in batch.references]
            return to_device(torch.tensor(known, dtype=torch.float64), device)
        if self.copy is not None:
            return answer_log_probs(self.copy, batch, device, engine)
        with adapters_off(model), eval_mode(model):
            return answer_log_probs(model, batch, device, engine)


def loss_of(means: Tensor) -> Tensor:
    """The loss that has these means of SUMS."""
    return means[0] + means[1]


def told(means: Tensor) -> Tensor:
    """The loss and METRICS of means of SUMS."""
    right, chosen, rejected = means[2:5]
    return torch.cat([torch.stack([loss_of(means), chosen - rejected, right]), means[3:]])


def answer_log_probs(model: PreTrainedModel, batch: Batch, device: torch.device, engine: Engine) -> Tensor:
    """The log-probability of each document's labels, summed over them: (documents,), fp64."""
    inputs = model_inputs(model, batch, device, engine.dtype)
    losses_N = engine.token_losses(model, inputs, batch.labels).double()
    is_target = batch.labels[:, 1:] != IGNORE_INDEX
    documents_N = to_device(batch.document_ids[:, 1:][is_target], device)
    return losses_N.new_zeros(len(batch.sides)).index_add(0, documents_N, -losses_N)


def answer_lengths(batch: Batch) -> Tensor:
    """How many labels each document has, (documents,); at least 1, for fillers, which have none."""
    documents = batch.document_ids[batch.labels != IGNORE_INDEX]
    return torch.bincount(documents, minlength=len(batch.sides)).clamp(min=1)
