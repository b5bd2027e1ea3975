"""Pairs and labelled answers on tiny models, and an independent fp64 reference of each published formula.

The reference runs plain transformers on each answer alone, without padding, and writes the formulas as their
papers do. Nothing of the training code is used in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from partwise.data.collate import micro_batches
from partwise.data.packing import PackFormat
from partwise.data.preferences import with_answer_of
from partwise.data.sources import READS
from partwise.records import IGNORE_INDEX, Example, StepData

PAD = 0
PAIRS = (
    ("What is this?", "7", "a red disc, I think"),
    ("Name the colour, please.", "It is as red as can be, and round.", "blue"),
    ("Which digit do you see in it?", "the number 3", "one or two"),
    ("And here?", "I see a disc.", "nothing"),
    ("Is it odd or even?", "even", "It may well be odd."),
)


def pair_rows(images: Sequence[Any]) -> list[dict[str, Any]]:
    """One row per entry of `images`, which is None or a PIL image."""
    rows = []
    for i, image in enumerate(images):
        prompt, chosen, rejected = PAIRS[i % len(PAIRS)]
        shown = {"images": [image]} if image is not None else {}
        mark = "<image>" if image is not None else ""
        rows.append({"prompt": mark + prompt, "chosen": chosen, "rejected": rejected, **shown})
    return rows


def label_rows(images: Sequence[Any]) -> list[dict[str, Any]]:
    """Good and bad answers by turns."""
    return [
        {
            "prompt": row["prompt"],
            "completion": row["rejected" if i % 2 else "chosen"],
            "label": i % 2 == 0,
            **{k: v for k, v in row.items() if k == "images"},
        }
        for i, row in enumerate(pair_rows(images))
    ]


def encode(chat_format, rows: Sequence[dict], shape: str) -> list[Example]:
    conversations = [c for i, row in enumerate(rows) for c in READS[shape](row, "rows.jsonl", i)]
    return [chat_format(conversation) for conversation in conversations]


def encode_others(chat_format, rows: Sequence[dict]) -> list[Example]:
    own = [READS["labels"](row, "rows.jsonl", i)[0] for i, row in enumerate(rows)]
    half = len(own) // 2
    return [chat_format(with_answer_of(c, own[(i + half) % len(own)])) for i, c in enumerate(own)]


def make_step(
    examples: Sequence[Example],
    size: int,
    packs: PackFormat | None,
    per_row: int,
    others: Sequence[Example] = (),
) -> StepData:
    return StepData(
        0,
        micro_batches(examples, PAD, size, packs, per_row),
        others=micro_batches(others, PAD, size, packs) if others else (),
    )


def plain_log_probs(model, examples: Sequence[Example]) -> list[Tensor]:
    """Of each answer alone the log-probabilities of its tokens, from the model's own logits."""
    log_probs = []
    for example in examples:
        inputs: dict[str, Tensor] = {"input_ids": example.input_ids[None], **example.media}
        inputs |= {name: field[None] for name, field in example.token_fields.items()}
        inputs = {n: t.to(model.dtype) if t.is_floating_point() else t for n, t in inputs.items()}
        logits = model(**inputs, use_cache=False).logits[0, :-1].double()
        targets = example.labels[1:]
        kept = targets != IGNORE_INDEX
        log_probs.append(logits.log_softmax(-1)[kept].gather(1, targets[kept][:, None])[:, 0])
    return log_probs


def published_loss(loss: str, policy: list[Tensor], reference: list[Tensor], keys: dict[str, Any]) -> Tensor:
    """The mean over pairs, as the papers write it: chosen and rejected by turns."""
    beta, total = keys["beta"], torch.zeros((), dtype=torch.float64)
    for i in range(0, len(policy), 2):
        w, v, rw, rv = policy[i], policy[i + 1], reference[i], reference[i + 1]
        h = (w.sum() - rw.sum()) - (v.sum() - rv.sum())
        if loss == "sigmoid":
            smooth = keys.get("label_smoothing", 0.0)
            total = total - (1 - smooth) * torch.log(torch.sigmoid(beta * h))
            total = total - smooth * torch.log(torch.sigmoid(-beta * h))
        elif loss == "hinge":
            total = total + torch.clamp(1 - beta * h, min=0)
        elif loss == "ipo":
            h = (w.mean() - rw.mean()) - (v.mean() - rv.mean())
            total = total + (h - 1 / (2 * beta)) ** 2
        elif loss == "simpo":
            total = total - torch.log(torch.sigmoid(beta * (w.mean() - v.mean()) - keys["gamma"]))
        elif loss == "orpo":
            odds = [p.mean().exp() / (1 - p.mean().exp()) for p in (w, v)]
            total = total - beta * torch.log(torch.sigmoid(torch.log(odds[0] / odds[1])))
    total = total / (len(policy) // 2)
    weight = 1.0 if loss == "orpo" else keys.get("sft_weight", 0.0)
    return total - weight * torch.cat(policy[::2]).mean()


def published_kto(
    policy: list[Tensor], reference: list[Tensor], labels: list[bool], z: Tensor, keys: dict[str, Any]
) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for p, r, is_good in zip(policy, reference, labels, strict=True):
        ratio = p.sum() - r.sum()
        if is_good:
            total = total + keys["good"] * (1 - torch.sigmoid(keys["beta"] * (ratio - z)))
        else:
            total = total + keys["bad"] * (1 - torch.sigmoid(keys["beta"] * (z - ratio)))
    return total / len(policy)
