"""Hidden states and labels -> the summed token loss.

In: the decoder's last hidden states, unshifted labels and the output head. Out: one scalar, the sum over
target tokens in nats; the caller divides, so any split of a step into micro-batches gives the same loss.
Only rows with a label meet the head, a chunk at a time, and a chunk's logits are computed again in the
backward pass: the full (B, T, V) logits never exist.

Letters: B rows, T tokens, D hidden width, V vocabulary, N target tokens, C rows of a chunk.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from partwise.families import LOGIT_SOFTCAP_TYPES
from partwise.records import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Bounds the logits in memory: 1024 rows of a 262,144-token vocabulary are 1 GiB in fp32.
CHUNK_ROWS = 1024


class TokenLoss(nn.Module):
    """A model as a step runs it: inputs and labels -> summed token loss, everything in one forward.

    What shards a model gathers weights around a module's forward, so the head has to be inside of one.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: dict[str, Any], labels: Tensor | None) -> Tensor:
        """The scalar loss sum; without labels the model's own logits, (B, T, V)."""
        if labels is None:
            return self.model(**inputs).logits
        hidden = self.model.base_model(**inputs).last_hidden_state
        return token_loss_sum(hidden, labels, self.model.get_output_embeddings(), logit_softcap(self.model))


def token_loss_sum(
    hidden_BTD: Tensor, labels_BT: Tensor, head: nn.Module, softcap: float | None = None
) -> Tensor:
    """Cross-entropy summed over target tokens: scalar, fp32 (fp64 when the logits are fp64).

    The shift is made here: hidden_BTD[:, t] predicts labels_BT[:, t + 1], so labels_BT[:, 0] never counts.
    Labels may lie on the CPU while `hidden_BTD` is on a device: nothing then waits for the device.
    Without any target token the sum is 0 and its gradients are 0.
    `softcap` c squashes logits to c * tanh(logits / c), for models whose own forward does.

    Worked example, T = 4: labels [-100, -100, 7, 2] -> hidden[1] predicts 7, hidden[2] predicts 2.
    """
    num_tokens = labels_BT.shape[1]
    targets_BT = labels_BT[:, 1:]
    rows_N, positions_N = (targets_BT != IGNORE_INDEX).nonzero(as_tuple=True)
    targets_N = targets_BT[rows_N, positions_N].to(hidden_BTD.device, non_blocking=True)
    index_N = (rows_N * num_tokens + positions_N).to(hidden_BTD.device, non_blocking=True)
    hidden_ND = hidden_BTD.flatten(0, 1).index_select(0, index_N)

    sums = [
        checkpoint(
            chunk_loss_sum, hidden_CD, targets_C, head, softcap, use_reentrant=False, preserve_rng_state=False
        )
        for hidden_CD, targets_C in zip(hidden_ND.split(CHUNK_ROWS), targets_N.split(CHUNK_ROWS), strict=True)
    ]
    return torch.stack(sums).sum()


def chunk_loss_sum(hidden_CD: Tensor, targets_C: Tensor, head: nn.Module, softcap: float | None) -> Tensor:
    """The summed loss of one chunk of target rows: scalar."""
    logits_CV = head(hidden_CD)
    if logits_CV.dtype != torch.float64:
        logits_CV = logits_CV.float()
    if softcap is not None:
        logits_CV = softcap * torch.tanh(logits_CV / softcap)
    return nn.functional.cross_entropy(logits_CV, targets_C, reduction="sum")


def logit_softcap(model: PreTrainedModel) -> float | None:
    """The softcap that the model's own forward puts on its logits; None for most models."""
    if model.config.model_type not in LOGIT_SOFTCAP_TYPES:
        return None
    return model.config.get_text_config().final_logit_softcapping
