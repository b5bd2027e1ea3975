"""Examples -> Batch: padding on the right, images of all rows one after the other.

In: examples of any lengths, with and without images. Out: one micro-batch. Rows are neither cut nor
reordered here. Shapes: B rows, T tokens of the longest row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812 - the name everyone reads
from torch.nn.utils.rnn import pad_sequence

from partwise.data.rows import row_name
from partwise.records import IGNORE_INDEX, Batch, Example


def collate(examples: Sequence[Example], pad_token_id: int) -> Batch:
    """The micro-batch of `examples`; there must be at least one.

    Media tensors are concatenated on their first axis. Where the other axes differ, as the number of
    LLaVA-NeXT's patches does, the smaller ones are filled with zeros, as its own processor does in a batch.
    """
    fields = sorted({name for example in examples for name in example.token_fields})
    media = sorted({name for example in examples for name in example.media})
    return Batch(
        input_ids=_pad([e.input_ids for e in examples], pad_token_id),
        labels=_pad([e.labels for e in examples], IGNORE_INDEX),
        document_ids=_pad([torch.full_like(e.input_ids, i) for i, e in enumerate(examples)], -1),
        token_fields={name: _pad([e.token_fields[name] for e in examples], 0) for name in fields},
        media={name: _concatenate([e.media[name] for e in examples if name in e.media]) for name in media},
        num_target_tokens=sum(e.num_target_tokens for e in examples),
        num_input_tokens=sum(len(e.input_ids) for e in examples),
        rows=tuple(row_name(e.source, e.row) for e in examples),
    )


def _pad(tensors: list[torch.Tensor], value: int) -> torch.Tensor:
    """(B, T) from tensors (T_i,)."""
    return pad_sequence(tensors, batch_first=True, padding_value=value)


def _concatenate(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Along the first axis; other axes grow to the largest, with zeros at the end."""
    sizes = [max(axis) for axis in zip(*(t.shape[1:] for t in tensors), strict=True)]
    return torch.cat([_grow(t, sizes) for t in tensors])


def _grow(tensor: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    missing = [wanted - size for wanted, size in zip(sizes, tensor.shape[1:], strict=True)]
    return F.pad(tensor, [n for size in reversed(missing) for n in (0, size)]) if any(missing) else tensor
