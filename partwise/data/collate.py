"""Examples -> Batch: padding on the right, images of all rows one after the other.

In: examples of any lengths, with and without images. Out: one micro-batch; two of them joined, or one that
counts nothing. Rows are neither cut nor reordered here. Shapes: B rows, T tokens of the longest row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F  # noqa: N812 - the name everyone reads
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from partwise.data.rows import row_name
from partwise.records import IGNORE_INDEX, Batch, Example


def collate(examples: Sequence[Example], pad_token_id: int) -> Batch:
    """The micro-batch of `examples`; there must be at least one.

    Media tensors are concatenated on their first axis. Where the other axes differ, as the number of
    LLaVA-NeXT's patches does, the smaller ones are filled with zeros, as its own processor does in a batch.
    A token field that an example lacks is zero there.
    """
    fields = sorted({name for example in examples for name in example.token_fields})
    media = sorted({name for example in examples for name in example.media})
    return Batch(
        input_ids=_pad([e.input_ids for e in examples], pad_token_id),
        labels=_pad([e.labels for e in examples], IGNORE_INDEX),
        document_ids=_pad([torch.full_like(e.input_ids, i) for i, e in enumerate(examples)], -1),
        token_fields={
            name: _pad([_field(e.token_fields, name, e.input_ids) for e in examples], 0) for name in fields
        },
        media={name: _concatenate([e.media[name] for e in examples if name in e.media]) for name in media},
        num_target_tokens=sum(e.num_target_tokens for e in examples),
        num_input_tokens=sum(len(e.input_ids) for e in examples),
        rows=tuple(row_name(e.source, e.row) for e in examples),
    )


def join_batches(first: Batch, second: Batch, pad_token_id: int) -> Batch:
    """The rows of both in one micro-batch, as `collate` makes it of all their examples."""
    num_documents = int(first.document_ids.max()) + 1
    second_ids = second.document_ids.where(second.document_ids < 0, second.document_ids + num_documents)
    fields = sorted(first.token_fields.keys() | second.token_fields.keys())
    media = sorted(first.media.keys() | second.media.keys())
    both = (first, second)
    return Batch(
        input_ids=_pad([*first.input_ids, *second.input_ids], pad_token_id),
        labels=_pad([*first.labels, *second.labels], IGNORE_INDEX),
        document_ids=_pad([*first.document_ids, *second_ids], -1),
        token_fields={
            name: _pad([row for b in both for row in _field(b.token_fields, name, b.input_ids)], 0)
            for name in fields
        },
        media={name: _concatenate([b.media[name] for b in both if name in b.media]) for name in media},
        num_target_tokens=first.num_target_tokens + second.num_target_tokens,
        num_input_tokens=first.num_input_tokens + second.num_input_tokens,
        rows=first.rows + second.rows,
    )


def filler_batch(example: Example, pad_token_id: int) -> Batch:
    """A micro-batch of one row that counts nothing: no label, no token, no name, and black images.

    With it a rank runs the same modules as the others where its own rows do not reach them.
    """
    media = {name: torch.zeros_like(t) if t.is_floating_point() else t for name, t in example.media.items()}
    labels = torch.full_like(example.labels, IGNORE_INDEX)
    silent = replace(example, labels=labels, media=media, num_target_tokens=0)
    return replace(collate([silent], pad_token_id), num_input_tokens=0, rows=())


def _field(fields: dict[str, Tensor], name: str, input_ids: Tensor) -> Tensor:
    """One of the token fields; zeros where the row or batch has none."""
    return fields[name] if name in fields else torch.zeros_like(input_ids)


def _pad(tensors: Sequence[Tensor], value: int) -> Tensor:
    """(B, T) from tensors (T_i,)."""
    return pad_sequence(tensors, batch_first=True, padding_value=value)


def _concatenate(tensors: list[Tensor]) -> Tensor:
    """Along the first axis; other axes grow to the largest, with zeros at the end."""
    sizes = [max(axis) for axis in zip(*(t.shape[1:] for t in tensors), strict=True)]
    return torch.cat([_grow(t, sizes) for t in tensors])


def _grow(tensor: Tensor, sizes: list[int]) -> Tensor:
    missing = [wanted - size for wanted, size in zip(sizes, tensor.shape[1:], strict=True)]
    return F.pad(tensor, [n for size in reversed(missing) for n in (0, size)]) if any(missing) else tensor
