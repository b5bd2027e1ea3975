"""Batches of examples: padding, what counts, and images of unequal shapes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image as PILImage

from partwise.data.align import align_batches
from partwise.data.chat import ChatFormat
from partwise.data.collate import collate, filler_batch, join_batches
from partwise.data.pixels import with_own_pixels
from partwise.data.template import render
from partwise.errors import DataError
from partwise.model.load import load_model_config, load_processor, media_token_ids
from partwise.records import IGNORE_INDEX, Batch, Conversation, Example, Image, Message, Text


def example(
    num_tokens: int, row: int, media: dict[str, torch.Tensor] | None = None, **fields: int
) -> Example:
    """Ids 10, 11, ...; all but the first are labels; each field has the given value in every token."""
    ids = torch.arange(10, 10 + num_tokens)
    labels = ids.clone()
    labels[0] = IGNORE_INDEX
    token_fields = {name: torch.full_like(ids, value) for name, value in fields.items()}
    return Example(ids, labels, token_fields, media or {}, num_tokens - 1, "a.jsonl", row)


def test_short_rows_are_padded_on_the_right() -> None:
    batch = collate([example(2, 0, token_type_ids=1), example(4, 1, token_type_ids=1)], pad_token_id=7)
    assert batch.input_ids.tolist() == [[10, 11, 7, 7], [10, 11, 12, 13]]
    assert batch.labels.tolist() == [[-100, 11, -100, -100], [-100, 11, 12, 13]]
    assert batch.document_ids.tolist() == [[0, 0, -1, -1], [1, 1, 1, 1]]
    assert batch.token_fields["token_type_ids"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert (batch.num_target_tokens, batch.num_input_tokens) == (4, 6)
    assert batch.rows == ("a.jsonl:1", "a.jsonl:2")
    assert batch.media == {}


def test_padding_is_no_label_where_the_pad_token_is_one() -> None:
    batch = collate([example(2, 0), example(3, 1)], pad_token_id=11)
    assert batch.labels[0].tolist() == [-100, 11, -100]


def test_images_stand_in_row_order_and_text_rows_have_none() -> None:
    rows = [
        example(2, 0, {"pixel_values": torch.full((1, 3, 2, 2), 1.0)}),
        example(2, 1),
        example(2, 2, {"pixel_values": torch.full((2, 3, 2, 2), 2.0)}),
    ]
    pixels = collate(rows, pad_token_id=0).media["pixel_values"]
    assert pixels[:, 0, 0, 0].tolist() == [1.0, 2.0, 2.0]


def test_missing_patches_are_zeros_at_the_end() -> None:
    rows = [
        example(
            2, 0, {"pixel_values": torch.full((1, 2, 3, 4, 4), 1.0), "image_sizes": torch.tensor([[4, 8]])}
        ),
        example(
            2, 1, {"pixel_values": torch.full((1, 3, 3, 4, 4), 2.0), "image_sizes": torch.tensor([[8, 8]])}
        ),
    ]
    media = collate(rows, pad_token_id=0).media
    assert media["pixel_values"].shape == (2, 3, 3, 4, 4)
    assert media["pixel_values"][:, :, 0, 0, 0].tolist() == [[1.0, 1.0, 0.0], [2.0, 2.0, 2.0]]
    assert media["image_sizes"].tolist() == [[4, 8], [8, 8]]


def tensors_of(batch: Batch) -> dict[str, torch.Tensor]:
    own = {"input_ids": batch.input_ids, "labels": batch.labels, "document_ids": batch.document_ids}
    return own | batch.token_fields | batch.media


def assert_same(batch: Batch, expected: Batch) -> None:
    ours, theirs = tensors_of(batch), tensors_of(expected)
    assert list(ours) == list(theirs)
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]) and tensor.dtype == theirs[name].dtype, name
    assert (batch.num_target_tokens, batch.num_input_tokens, batch.rows) == (
        expected.num_target_tokens,
        expected.num_input_tokens,
        expected.rows,
    )


def tiles(num_tiles: int, value: float) -> dict[str, torch.Tensor]:
    return {
        "pixel_values": torch.full((1, num_tiles, 3, 4, 4), value),
        "image_sizes": torch.tensor([[4, 4 * num_tiles]]),
    }


@pytest.mark.parametrize("split", [1, 2, 3, 4])
def test_joined_batches_are_those_of_all_examples(split: int) -> None:
    """With images of unlike sizes on both sides, and a token field and a media tensor on one of them."""
    rows = [
        example(3, 0, tiles(1, 1.0)),
        example(2, 1),
        example(5, 2, tiles(3, 2.0) | {"mask": torch.ones(1, 3)}, token_type_ids=1),
        example(4, 3, tiles(2, 3.0), token_type_ids=2),
        example(1, 4, token_type_ids=3),
    ]
    joined = join_batches(collate(rows[:split], 7), collate(rows[split:], 7), 7)
    assert_same(joined, collate(rows, 7))
    assert joined.document_ids.amax(1).tolist() == [0, 1, 2, 3, 4]


def test_a_token_field_that_an_example_lacks_is_zero() -> None:
    batch = collate([example(2, 0), example(3, 1, token_type_ids=1)], 7)
    assert batch.token_fields["token_type_ids"].tolist() == [[0, 0, 0], [1, 1, 1]]


def test_a_filler_counts_nothing_and_is_black() -> None:
    filler = filler_batch(example(3, 0, tiles(2, 1.5), token_type_ids=1), 7)
    assert filler.input_ids.tolist() == [[10, 11, 12]] and filler.token_fields["token_type_ids"].all()
    assert (filler.labels == IGNORE_INDEX).all() and (filler.document_ids == 0).all()
    assert (filler.num_target_tokens, filler.num_input_tokens, filler.rows) == (0, 0, ())
    assert filler.media["pixel_values"].shape == (1, 2, 3, 4, 4) and not filler.media["pixel_values"].any()
    assert filler.media["image_sizes"].tolist() == [[4, 8]]


def test_aligned_batches_are_as_many_as_asked_with_images_where_asked() -> None:
    text, picture = example(2, 8), example(3, 9, tiles(1, 1.0))
    batches = [collate([example(2, 0, tiles(1, 2.0))], 7), collate([example(4, 1)], 7)]
    aligned = align_batches(batches, [True, True, False, True], text, picture, 7)
    assert aligned[0] is batches[0]
    assert aligned[1].input_ids.tolist() == [[10, 11, 12, 13], [10, 11, 12, 7]]
    assert aligned[1].rows == ("a.jsonl:2",) and not aligned[1].media["pixel_values"].any()
    assert aligned[2].input_ids.tolist() == [[10, 11]] and not aligned[2].media
    assert aligned[3].input_ids.tolist() == [[10, 11, 12]] and aligned[3].media
    counted = [(batch.num_target_tokens, batch.num_input_tokens) for batch in aligned]
    assert counted == [(1, 2), (3, 4), (0, 0), (0, 0)]


def test_without_a_filler_that_has_an_image_there_is_an_error_only_where_one_is_needed() -> None:
    text, batches = example(2, 8), [collate([example(4, 1)], 7)]
    assert align_batches(batches, [False], text, None, 7) == tuple(batches)
    with pytest.raises(DataError, match="none was found among the first rows"):
        align_batches(batches, [True], text, None, 7)


@pytest.mark.parametrize("family", ["gemma3", "llava", "llava-next", "qwen2-vl", "qwen2.5-vl"])
def test_a_batch_is_what_the_processor_makes_of_all_rows(
    family: str, tiny_folder: Callable[[str], Path], make_image: Callable[..., PILImage.Image]
) -> None:
    folder = tiny_folder(family)
    processor = load_processor(folder)
    pictures = [make_image((56, 56)), make_image((112, 56), "blue"), make_image((112, 112), "green")]
    contents = [
        (Image(pictures[0], "a"), Text("What is this?")),
        (Image(pictures[1], "b"), Text("And"), Image(pictures[2], "c"), Text("what are these?")),
    ]
    conversations = [
        Conversation(
            (Message("user", content, False), Message("assistant", (Text("A circle."),))), "a.jsonl", i
        )
        for i, content in enumerate(contents)
    ]
    chat_format = ChatFormat(processor, media_token_ids(load_model_config(folder), processor), 999, "error")
    batch = collate(
        [chat_format(conversation) for conversation in conversations], processor.tokenizer.pad_token_id
    )
    texts = [render(processor, conversation.messages, "") for conversation in conversations]
    reference = processor(
        text=texts,
        images=[[image.source for image in conversation.images] for conversation in conversations],
        add_special_tokens=not texts[0].startswith(processor.tokenizer.bos_token or "\0"),
        padding=True,
        padding_side="right",
        return_tensors="pt",
    )
    ours = {"input_ids": batch.input_ids, "attention_mask": (batch.document_ids >= 0).long()}
    ours |= batch.token_fields | with_own_pixels(batch).media
    assert set(ours) == set(reference)
    for name, tensor in ours.items():
        assert torch.equal(tensor, reference[name]), name
