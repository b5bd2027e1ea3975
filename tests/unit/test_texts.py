"""Raw text: every token trains once, and each piece of a long document is a whole input."""

from __future__ import annotations

import itertools

import pytest
import torch

from partwise.data.collate import collate
from partwise.data.documents import read_document
from partwise.data.sources import READS
from partwise.data.texts import TextFormat, cut_points
from partwise.errors import DataError
from partwise.model.load import load_processor, media_token_ids
from partwise.records import IGNORE_INDEX, Dropped
from partwise.training.step import batch_loss_sum

WORDS = "a red disc on a white ground, and then one more of them "


def text_format(model, folder, max_seq_len):
    processor = load_processor(folder)
    return TextFormat(processor, media_token_ids(model.config, processor), max_seq_len, "error")


def document(*parts):
    """Texts, and images between them."""
    text = "".join(part if isinstance(part, str) else "<image>" for part in parts)
    images = [part for part in parts if not isinstance(part, str)]
    return read_document({"text": text, **({"images": images} if images else {})}, "docs.jsonl", 0)


@pytest.mark.parametrize("family", ["llama", "gemma3", "llava", "llava-next", "qwen2.5-vl"])
def test_pieces_hold_every_token_and_image_once(family, load_tiny, tiny_folder, make_image):
    model, folder = load_tiny(family), tiny_folder(family)
    if family == "llama":
        conversation = document(WORDS * 6)
    else:
        shown = make_image(), make_image((84, 56), "blue"), make_image(color="green")
        conversation = document(WORDS * 2, shown[0], WORDS * 3, shown[1], WORDS, shown[2], WORDS)
    whole = text_format(model, folder, 4096).encode(conversation).example
    media_ids = torch.tensor(sorted(media_token_ids(model.config, load_processor(folder))))
    trained = whole.labels[1:] != IGNORE_INDEX
    assert trained.sum() > 50 and not torch.isin(whole.labels[1:][trained], media_ids).any()
    if family == "llama":
        assert trained.all()
    longest = 64 if family != "llava-next" else 256
    limit = min(longest, len(whole.input_ids) // 2)
    pieces = text_format(model, folder, limit).examples(conversation)
    assert len(pieces) > 1 and all(len(piece.input_ids) <= limit for piece in pieces)
    labels = torch.cat([piece.labels[piece.labels != IGNORE_INDEX] for piece in pieces])
    assert torch.equal(labels, whole.labels[whole.labels != IGNORE_INDEX])
    num_targets = sum(piece.num_target_tokens for piece in pieces)
    assert num_targets == whole.num_target_tokens
    for name, tensor in whole.media.items():
        assert torch.equal(torch.cat([p.media[name] for p in pieces if name in p.media]), tensor), name
    for piece in pieces:
        assert batch_loss_sum(model, collate([piece], 0), torch.device("cpu")).isfinite()


def test_cuts_stand_before_images_and_never_right_behind_one():
    assert cut_points(10, [(3, 6)], 5) == [3, 7, 10]
    assert cut_points(9, [], 4) == [4, 7, 9]
    assert cut_points(12, [(2, 9)], 6) == []
    for start, end in itertools.product(range(1, 20), repeat=2):
        if start < end:
            cuts = cut_points(24, [(start, end)], 9)
            assert not any(start < cut <= end for cut in cuts[:-1])
            assert all(b - a <= 9 - bool(a) for a, b in itertools.pairwise([0, *cuts]))


def test_an_image_that_no_piece_holds_drops_the_document(load_tiny, tiny_folder, make_image):
    conversation = document(WORDS, make_image(), WORDS)
    result = text_format(load_tiny("gemma3"), tiny_folder("gemma3"), 8).examples(conversation)
    assert result == Dropped("image would be cut", "docs.jsonl", 0)


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"messages": []}, "the keys are messages, and objective.loss text learns raw text"),
        ({"text": " "}, '"text" is empty'),
        ({"text": 3}, '"text" is a int, and'),
        ({"text": "a <image> b"}, "0 images given, 1 <image>"),
    ],
)
def test_faults_name_the_row(row, text):
    with pytest.raises(DataError, match=f"^docs.jsonl:3: {text}"):
        READS["texts"](row, "docs.jsonl", 2)


def test_images_side_by_side_are_not_told_apart(load_tiny, tiny_folder, make_image):
    conversation = document(WORDS * 3, make_image(), make_image(color="blue"), WORDS * 3)
    with pytest.raises(DataError, match="2 images stand in 1 places"):
        text_format(load_tiny("gemma3"), tiny_folder("gemma3"), 60).examples(conversation)
