"""Hidden states and labels -> the summed token loss, or the loss of each token.

In: the decoder's last hidden states, unshifted labels and the output head. Out: one scalar, the sum over
target tokens in nats; the caller divides, so any split of a step into micro-batches gives the same loss.
Only rows with a label meet the head, a chunk at a time: the full (B, T, V) logits never exist. Under a plain
linear head a chunk's logits become their own gradient at once, and the backward pass only scales what came
of it. Any other head is called as a module, and a chunk's logits are computed again in the backward pass.

Letters: B rows, T tokens, D hidden width, V vocabulary, N target tokens, C rows of a chunk.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from partwise.families import LOGIT_SOFTCAP_TYPES
from partwise.model.transfer import to_device
from partwise.records import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# They bound the logits: 2048 rows of a 262,144-token vocabulary are 2 GiB in fp32, and 1 GiB in 16 bits.
CHUNK_ROWS = 2048
MODULE_CHUNK_ROWS = 1024


class TokenLoss(nn.Module):
    """A model as a step runs it: inputs and labels -> summed token loss, everything in one forward.

    What shards a model gathers weights around a module's forward, so the head has to be inside of one.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: dict[str, Any], labels: Tensor | None, each: bool = False) -> Tensor:
        """The scalar loss sum, or `each` token's loss; without labels the model's own logits, (B, T, V)."""
        if labels is None:
            return self.model(**inputs).logits
        hidden = self.model.base_model(**inputs).last_hidden_state
        losses = token_losses if each else token_loss_sum
        return losses(hidden, labels, self.model.get_output_embeddings(), logit_softcap(self.model))


def token_loss_sum(
    hidden_BTD: Tensor, labels_BT: Tensor, head: nn.Module, softcap: float | None = None
) -> Tensor:
    """Cross-entropy summed over target tokens: scalar, fp32 (fp64 when the hidden states are fp64).

    The shift is made here: hidden_BTD[:, t] predicts labels_BT[:, t + 1], so labels_BT[:, 0] never counts.
    Labels may lie on the CPU while `hidden_BTD` is on a device: nothing then waits for the device.
    Without any target token the sum is 0 and its gradients are 0.
    `softcap` c squashes logits to c * tanh(logits / c), for models whose own forward does.

    Worked example, T = 4: labels [-100, -100, 7, 2] -> hidden[1] predicts 7, hidden[2] predicts 2.
    """
    sum_rows = linear_loss_sum if is_plain_linear(head) else module_loss_sum
    return sum_rows(*target_rows(hidden_BTD, labels_BT), head, softcap)


def token_losses(
    hidden_BTD: Tensor, labels_BT: Tensor, head: nn.Module, softcap: float | None = None
) -> Tensor:
    """Cross-entropy of each target token, (N,), row by row, which `token_loss_sum` is the sum of.

    For losses that weigh each answer by all of its tokens: what a token weighs is known only when all are, so
    the backward pass computes each chunk's logits again.
    """
    hidden_ND, targets_N = target_rows(hidden_BTD, labels_BT)
    if is_plain_linear(head):
        return LinearLosses.apply(hidden_ND, head.weight, head.bias, targets_N, softcap)
    return torch.cat(module_losses(hidden_ND, targets_N, head, softcap))


def target_rows(hidden_BTD: Tensor, labels_BT: Tensor) -> tuple[Tensor, Tensor]:
    """The hidden states that predict a target token, (N, D), and these tokens, (N,)."""
    num_tokens = labels_BT.shape[1]
    targets_BT = labels_BT[:, 1:]
    rows_N, positions_N = (targets_BT != IGNORE_INDEX).nonzero(as_tuple=True)
    targets_N = to_device(targets_BT[rows_N, positions_N], hidden_BTD.device)
    index_N = to_device(rows_N * num_tokens + positions_N, hidden_BTD.device)
    return hidden_BTD.flatten(0, 1).index_select(0, index_N), targets_N


def is_plain_linear(head: nn.Module) -> bool:
    """Whether the head's weight, as it lies there, says all that calling the head would do.

    Not that of an adapter or of a layer in 4 bits, which are other classes; nor with hooks, by which ZeRO-3
    gathers a weight around its module's forward and a search for a fault looks at each output.
    """
    return type(head) is nn.Linear and not (head._forward_hooks or head._forward_pre_hooks)


def linear_loss_sum(hidden_ND: Tensor, targets_N: Tensor, head: nn.Module, softcap: float | None) -> Tensor:
    """The summed loss of target rows, with the gradients of what needs one: scalar."""
    tensors = (hidden_ND, head.weight, head.bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return LinearLoss.apply(*tensors, targets_N, softcap)
    with torch.no_grad():
        return sum_chunks(*tensors, targets_N, softcap, (False, False, False))[0].sum()


class LinearLoss(torch.autograd.Function):
    """The summed loss of target rows under a linear head; its gradients are made in the forward pass.

    Nothing of the head is kept for the backward pass: its weight may be sharded again by then.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets_N: Tensor,
        softcap: float | None,
    ) -> Tensor:
        tensors = (hidden_ND, weight_VD, bias_V)
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in tensors]
        losses_N, gradients = sum_chunks(*tensors, targets_N, softcap, ctx.needs_input_grad[:3])
        ctx.save_for_backward(*gradients)
        return losses_N.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        # In place: another (V, D) would not fit. A second backward pass fails, because autograd sees that
        # what it saved has changed.
        scaled = (
            None if gradient is None else gradient.mul_(scale).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return (*scaled, None, None)


class LinearLosses(torch.autograd.Function):
    """The loss of each target row under a linear head, (N,); logits are computed again in the backward pass.

    Its weight is kept as a linear layer's is, so what shards it gathers it again before.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets_N: Tensor,
        softcap: float | None,
    ) -> Tensor:
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, targets_N)
        ctx.softcap = softcap
        return sum_chunks(hidden_ND, weight_VD, bias_V, targets_N, softcap, (False, False, False))[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scales_N: Tensor) -> tuple[Tensor | None, ...]:
        hidden_ND, weight_VD, bias_V, targets_N = ctx.saved_tensors
        tensors = (hidden_ND, weight_VD, bias_V)
        needs_gradient = ctx.needs_input_grad[:3]
        _, gradients = sum_chunks(*tensors, targets_N, ctx.softcap, needs_gradient, scales_N)
        typed = (
            None if gradient is None else gradient.to(tensor.dtype)
            for gradient, tensor in zip(gradients, tensors, strict=True)
        )
        return (*typed, None, None)


def sum_chunks(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets_N: Tensor,
    softcap: float | None,
    needs_gradient: tuple[bool, ...],
    scales_N: Tensor | None = None,
) -> tuple[Tensor, list[Tensor | None]]:
    """The losses, (N,), and the gradients of hidden states, weight and bias, None where none is needed.

    All are in fp32. Gradients are of the losses' sum, in which each counts `scales_N` times where these are
    given. With 16-bit weights a chunk exists once in fp32 and, as what is multiplied with, once in 16 bits.
    """
    wide = torch.promote_types(hidden_ND.dtype, torch.float32)
    # Only CUDA multiplies 16-bit matrices to an fp32 one; elsewhere they are widened first.
    narrow = hidden_ND.dtype if hidden_ND.is_cuda else wide
    tensors = (hidden_ND, weight_VD, bias_V)
    gradients = [
        torch.zeros_like(tensor, dtype=wide) if is_needed and tensor is not None else None
        for tensor, is_needed in zip(tensors, needs_gradient, strict=True)
    ]
    hidden_ND, weight_VD = hidden_ND.to(narrow), weight_VD.to(narrow)
    losses_N = hidden_ND.new_zeros(len(targets_N), dtype=wide)
    room = (min(CHUNK_ROWS, len(targets_N)), len(weight_VD))
    logits_room = hidden_ND.new_empty(room, dtype=wide)
    gradient_room = hidden_ND.new_empty(room) if any(needs_gradient) and narrow != wide else logits_room
    for start in range(0, len(targets_N), CHUNK_ROWS):
        here = slice(start, start + CHUNK_ROWS)
        hidden_CD, targets_C = hidden_ND[here], targets_N[here]
        logits_CV, gradient_CV = logits_room[: len(targets_C)], gradient_room[: len(targets_C)]
        multiply(hidden_CD, weight_VD.T, out=logits_CV, keep=0)
        if bias_V is not None:
            logits_CV += bias_V
        losses_N[here] = chunk_losses(
            logits_CV, targets_C, softcap, gradient_CV if any(needs_gradient) else None
        )
        if scales_N is not None and any(needs_gradient):
            gradient_CV *= scales_N[here, None]
        of_hidden_ND, of_weight_VD, of_bias_V = gradients
        if of_hidden_ND is not None:
            multiply(gradient_CV, weight_VD, out=of_hidden_ND[here], keep=0)
        if of_weight_VD is not None:
            multiply(gradient_CV.T, hidden_CD, out=of_weight_VD, keep=1)
        if of_bias_V is not None:
            of_bias_V += gradient_CV.sum(0, dtype=wide)
    return losses_N, gradients


def chunk_losses(
    logits_CV: Tensor, targets_C: Tensor, softcap: float | None, gradient_CV: Tensor | None
) -> Tensor:
    """The losses of a chunk, (C,). Its logits are lost, and their gradient is written where asked for.

    `gradient_CV` may be `logits_CV` itself.
    """
    index_C1 = targets_C[:, None]
    slope_CV = None
    if softcap is not None:
        logits_CV.div_(softcap).tanh_()
        slope_CV = None if gradient_CV is None else 1 - logits_CV.square()
        logits_CV.mul_(softcap)
    torch.log_softmax(logits_CV, -1, out=logits_CV)
    log_probs_C1 = logits_CV.gather(1, index_C1)
    if gradient_CV is not None:
        # The probability less one, without its rounding to 16 bits: a token that is all but sure is near 0.
        of_targets_C1 = log_probs_C1.expm1()
        if slope_CV is None:
            torch.exp(logits_CV, out=gradient_CV)
        else:
            of_targets_C1 *= slope_CV.gather(1, index_C1)
            torch.mul(logits_CV.exp_(), slope_CV, out=gradient_CV)
        gradient_CV.scatter_(1, index_C1, of_targets_C1.to(gradient_CV.dtype))
    return -log_probs_C1[:, 0]


def multiply(a: Tensor, b: Tensor, out: Tensor, keep: int) -> None:
    """out = keep * out + a @ b, with sums in out's type, which may be wider than that of both."""
    if a.dtype == out.dtype:
        out.addmm_(a, b, beta=keep)
    else:
        torch.addmm(out, a, b, out_dtype=out.dtype, beta=keep, out=out)


def module_loss_sum(hidden_ND: Tensor, targets_N: Tensor, head: nn.Module, softcap: float | None) -> Tensor:
    """The summed loss of target rows under any head: scalar."""
    return torch.stack([some.sum() for some in module_losses(hidden_ND, targets_N, head, softcap)]).sum()


def module_losses(
    hidden_ND: Tensor, targets_N: Tensor, head: nn.Module, softcap: float | None
) -> list[Tensor]:
    """The losses of target rows under any head, a chunk of logits at a time, which is computed twice."""
    chunks = zip(hidden_ND.split(MODULE_CHUNK_ROWS), targets_N.split(MODULE_CHUNK_ROWS), strict=True)
    return [
        checkpoint(
            module_chunk_losses,
            hidden_CD,
            targets_C,
            head,
            softcap,
            use_reentrant=False,
            preserve_rng_state=False,
        )
        for hidden_CD, targets_C in chunks
    ]


def module_chunk_losses(
    hidden_CD: Tensor, targets_C: Tensor, head: nn.Module, softcap: float | None
) -> Tensor:
    """The losses of one chunk of target rows, (C,)."""
    logits_CV = head(hidden_CD)
    if logits_CV.dtype != torch.float64:
        logits_CV = logits_CV.float()
    if softcap is not None:
        logits_CV = softcap * torch.tanh(logits_CV / softcap)
    return nn.functional.cross_entropy(logits_CV, targets_C, reduction="none")


class Chunk(NamedTuple):
    """How many rows of logits exist at a time, and the bytes of each logit at the widest moment."""

    num_rows: int
    logit_bytes: int


# The saved probabilities and two gradients of the backward pass, fp32 each.
MODULE_CHUNK = Chunk(MODULE_CHUNK_ROWS, 12)


def chunk_of(head: nn.Module, softcap: float | None) -> Chunk:
    """The chunks of a head on a GPU."""
    if not is_plain_linear(head):
        return MODULE_CHUNK
    itemsize = head.weight.dtype.itemsize
    wide = max(4, itemsize)
    return Chunk(CHUNK_ROWS, wide + itemsize % wide + (0 if softcap is None else wide))


def logit_softcap(model: PreTrainedModel) -> float | None:
    """The softcap that the model's own forward puts on its logits; None for most models."""
    if model.config.model_type not in LOGIT_SOFTCAP_TYPES:
        return None
    return model.config.get_text_config().final_logit_softcapping
