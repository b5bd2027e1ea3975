"""Examples -> Batch: rows padded on the right or packed into one, images of all rows one after the other.

In: examples of any lengths, with and without images. Out: a step's micro-batches, or one; two of them joined,
or one that counts nothing. Rows are not cut here. Shapes: B rows, T tokens of the longest row or of the pack.
Each function takes `packs`, the model's PackFormat, where a micro-batch is to be a pack.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F  # noqa: N812 - the name everyone reads
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from partwise.data.packing import PackFormat, find_pack, plan_packs
from partwise.data.pixels import holds_pixels
from partwise.data.rows import row_name
from partwise.records import IGNORE_INDEX, Batch, Example, PixelTable


def micro_batches(
    examples: Sequence[Example],
    pad_token_id: int,
    micro_batch_size: int,
    packs: PackFormat | None = None,
    per_row: int = 1,
) -> tuple[Batch, ...]:
    """The examples as a step's micro-batches, the longest first. `per_row` neighbours are never parted."""
    rows = [examples[i : i + per_row] for i in range(0, len(examples), per_row)]
    lengths = [sum(len(example.input_ids) for example in row) for row in rows]
    groups = group_rows(lengths, micro_batch_size, packs)
    return tuple(
        collate([example for i in group for example in rows[i]], pad_token_id, packs) for group in groups
    )


def group_rows(
    lengths: Sequence[int], micro_batch_size: int, packs: PackFormat | None = None
) -> list[list[int]]:
    """For each micro-batch of a step its positions in `lengths`, the longest first.

    Rows of like length share one, which leaves less padding; packs hold as many rows as they have room for.
    """
    if packs is not None:
        return plan_packs(lengths, packs.max_tokens)
    order = sorted(range(len(lengths)), key=lambda position: -lengths[position])
    return [order[i : i + micro_batch_size] for i in range(0, len(order), micro_batch_size)]


def collate(examples: Sequence[Example], pad_token_id: int, packs: PackFormat | None = None) -> Batch:
    """The micro-batch of `examples`; there must be at least one.

    Media tensors are concatenated on their first axis. Where the other axes differ, as the number of
    LLaVA-NeXT's patches does, the smaller ones are filled with zeros, as its own processor does in a batch.
    A token field that an example lacks is zero there.
    """
    if packs is not None:
        return _pack([_document(example, packs) for example in examples], pad_token_id, packs)
    fields = sorted({name for example in examples for name in example.token_fields})
    media = sorted({name for example in examples for name in example.media})
    return Batch(
        input_ids=_pad([e.input_ids for e in examples], pad_token_id),
        labels=_pad([e.labels for e in examples], IGNORE_INDEX),
        document_ids=_pad([torch.full_like(e.input_ids, i) for i, e in enumerate(examples)], -1),
        token_fields={
            name: _pad([_field(e.token_fields, name, e.input_ids) for e in examples], 0) for name in fields
        },
        media={name: concatenate([e.media[name] for e in examples if name in e.media]) for name in media},
        num_target_tokens=sum(e.num_target_tokens for e in examples),
        num_input_tokens=sum(len(e.input_ids) for e in examples),
        rows=row_names(examples),
        pixels=_pixels(examples),
        sides=tuple(e.side for e in examples),
        references=tuple(e.reference for e in examples),
    )


def join_batches(first: Batch, second: Batch, pad_token_id: int, packs: PackFormat | None = None) -> Batch:
    """The rows of both in one micro-batch, as `collate` makes it of all their examples."""
    if packs is not None:
        return _pack([first, second], pad_token_id, packs)
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
        media={name: concatenate([b.media[name] for b in both if name in b.media]) for name in media},
        num_target_tokens=first.num_target_tokens + second.num_target_tokens,
        num_input_tokens=first.num_input_tokens + second.num_input_tokens,
        rows=first.rows + second.rows,
        pixels=_pixels(both),
        sides=first.sides + second.sides,
        references=first.references + second.references,
    )


def filler_batch(example: Example, pad_token_id: int, packs: PackFormat | None = None) -> Batch:
    """A micro-batch of one row that counts nothing: no label, no token, no name, and black images.

    With it a rank runs the same modules as the others where its own rows do not reach them.
    """
    media = {name: torch.zeros_like(t) if holds_pixels(t) else t for name, t in example.media.items()}
    labels = torch.full_like(example.labels, IGNORE_INDEX)
    silent = replace(example, labels=labels, media=media, num_target_tokens=0, side="", reference=None)
    return replace(collate([silent], pad_token_id, packs), num_input_tokens=0, rows=())


def _document(example: Example, packs: PackFormat) -> Batch:
    """The example alone in a row, without padding."""
    return Batch(
        input_ids=example.input_ids[None],
        labels=example.labels[None],
        document_ids=torch.zeros_like(example.input_ids)[None],
        token_fields={name: field[None] for name, field in example.token_fields.items()},
        media=example.media,
        num_target_tokens=example.num_target_tokens,
        num_input_tokens=len(example.input_ids),
        rows=(row_name(example.source, example.row),),
        position_ids=packs.position_ids(example),
        pixels=example.pixels,
        sides=(example.side,),
        references=(example.reference,),
    )


def _pack(batches: Sequence[Batch], pad_token_id: int, packs: PackFormat) -> Batch:
    """The documents of all, each batch of one row, in one row with padding at its end."""
    counts = [int(batch.document_ids.max()) + 1 for batch in batches]
    firsts = [sum(counts[:i]) for i in range(len(counts))]
    fields = sorted({name for batch in batches for name in batch.token_fields})
    media = sorted({name for batch in batches for name in batch.media})
    num_tokens = sum(int((batch.document_ids >= 0).sum()) for batch in batches)
    num_missing = packs.padded_length(num_tokens) - num_tokens

    def lay_out(tensors: Iterable[Tensor], value: int) -> Tensor:
        real = [t[..., b.document_ids[0] >= 0] for t, b in zip(tensors, batches, strict=True)]
        return F.pad(torch.cat(real, dim=-1), (0, num_missing), value=value)

    document_ids = lay_out((b.document_ids + n for b, n in zip(batches, firsts, strict=True)), -1)
    token_fields = {
        name: lay_out((_field(b.token_fields, name, b.input_ids) for b in batches), 0) for name in fields
    }
    is_image = token_fields[packs.image_field][0] == 1 if packs.image_field in token_fields else None
    return Batch(
        input_ids=lay_out((b.input_ids for b in batches), pad_token_id),
        labels=lay_out((b.labels for b in batches), IGNORE_INDEX),
        document_ids=document_ids,
        token_fields=token_fields,
        media={name: concatenate([b.media[name] for b in batches if name in b.media]) for name in media},
        num_target_tokens=sum(batch.num_target_tokens for batch in batches),
        num_input_tokens=sum(batch.num_input_tokens for batch in batches),
        rows=tuple(dict.fromkeys(row for batch in batches for row in batch.rows)),
        position_ids=lay_out((b.position_ids for b in batches if b.position_ids is not None), 0),
        pack=find_pack(document_ids[0], is_image),
        pixels=_pixels(batches),
        sides=tuple(side for batch in batches for side in batch.sides),
        references=tuple(reference for batch in batches for reference in batch.references),
    )


def row_names(examples: Sequence[Example]) -> tuple[str, ...]:
    """The names of their rows, each once."""
    return tuple(dict.fromkeys(row_name(example.source, example.row) for example in examples))


def _pixels(those: Sequence[Example | Batch]) -> PixelTable | None:
    """The table of their pixels, which is the same for all that have images."""
    tables = {one.pixels for one in those if one.media}
    assert len(tables) <= 1, "pixels in 8 bits and pixels as numbers in one batch"
    return next(iter(tables), None)


def _field(fields: dict[str, Tensor], name: str, input_ids: Tensor) -> Tensor:
    """One of the token fields; zeros where the row or batch has none."""
    return fields[name] if name in fields else torch.zeros_like(input_ids)


def _pad(tensors: Sequence[Tensor], value: int) -> Tensor:
    """(B, T) from tensors (T_i,)."""
    return pad_sequence(tensors, batch_first=True, padding_value=value)


def concatenate(tensors: list[Tensor]) -> Tensor:
    """Along the first axis; other axes grow to the largest, with zeros at the end."""
    sizes = [max(axis) for axis in zip(*(t.shape[1:] for t in tensors), strict=True)]
    return torch.cat([_grow(t, sizes) for t in tensors])


def _grow(tensor: Tensor, sizes: list[int]) -> Tensor:
    missing = [wanted - size for wanted, size in zip(sizes, tensor.shape[1:], strict=True)]
    return F.pad(tensor, [n for size in reversed(missing) for n in (0, size)]) if any(missing) else tensor
