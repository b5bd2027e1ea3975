"""Pixels in 8 bits, restored on the device: the processor's own numbers, padding included."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

from partwise.data.align import align_batches
from partwise.data.chat import ChatFormat
from partwise.data.collate import collate, filler_batch
from partwise.data.packing import PackFormat
from partwise.data.pixels import PIXELS, REAL_TILES, find_pixel_table, restore_pixels, with_own_pixels
from partwise.data.template import tokenizer_of
from partwise.model.load import load_model_config, load_processor, media_token_ids
from partwise.records import Conversation, Image, Message, Text

IN_BYTES = ("gemma3", "llava", "llava-next")
IN_FLOATS = ("qwen2-vl", "qwen2.5-vl")


@pytest.fixture
def open_format(tiny_folder):
    def open_family(family: str) -> ChatFormat:
        folder = tiny_folder(family)
        processor = load_processor(folder)
        return ChatFormat(processor, media_token_ids(load_model_config(folder), processor), 999, "error")

    return open_family


def conversation(sizes: list[tuple[int, int]], seed: int = 0) -> Conversation:
    """A row with pictures of (width, height): noise, and black in a half, as letters on a dark page have."""
    rng = np.random.default_rng(seed)
    pictures = []
    for width, height in sizes:
        values = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        values[: height // 2] = 0
        pictures.append(PILImage.fromarray(values))
    user = (*(Image(picture, f"image {i}") for i, picture in enumerate(pictures)), Text("Which?"))
    return Conversation((Message("user", user), Message("assistant", (Text("red"),))), "rows.jsonl", seed)


def own_media(chat_format: ChatFormat, row: Conversation) -> dict[str, torch.Tensor]:
    """What the processor makes of the row when it is not asked for anything else."""
    whole = ChatFormat(chat_format.processor, chat_format.media_token_ids, 999, "error")
    whole.pixels = None
    return whole(row).media


SIZES = {"one": [(60, 60)], "alike": [(90, 40)] * 2, "wide beside square": [(200, 30), (56, 56), (30, 100)]}


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("family", IN_BYTES)
def test_restored_pixels_are_the_processors_own(family, sizes, open_format):
    chat_format = open_format(family)
    example = chat_format(conversation(SIZES[sizes]))
    own = own_media(chat_format, conversation(SIZES[sizes]))
    assert example.media[PIXELS].dtype == torch.uint8 and own[PIXELS].dtype == torch.float32
    for dtype in (torch.float32, torch.bfloat16):
        restored = restore_pixels(example.media, example.pixels, dtype)
        assert restored.keys() == own.keys()
        for name, tensor in own.items():
            wanted = tensor.to(dtype) if tensor.is_floating_point() else tensor
            assert torch.equal(restored[name], wanted), name
    again = with_own_pixels(example)
    assert again.pixels is None and torch.equal(again.media[PIXELS], own[PIXELS])


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("family", IN_BYTES)
def test_batches_of_bytes_are_batches_of_the_processors_pixels(family, is_packed, open_format):
    """Padded tiles of unlike rows stay nothing, and black ones black."""
    chat_format = open_format(family)
    rows = [conversation(sizes, seed) for seed, sizes in enumerate(([], *SIZES.values()))]
    examples = [chat_format(row) for row in rows]
    packs = PackFormat(2000) if is_packed else None
    batch = collate(examples, 0, packs)
    expected = collate([with_own_pixels(example) for example in examples], 0, packs)
    assert batch.media[PIXELS].dtype == torch.uint8 and expected.pixels is None
    restored = restore_pixels(batch.media, batch.pixels, torch.float32)
    assert restored.keys() == expected.media.keys()
    assert all(torch.equal(restored[name], expected.media[name]) for name in restored)
    sent = pickle.loads(pickle.dumps(batch))
    assert sent.pixels == batch.pixels


@pytest.mark.parametrize("family", IN_BYTES)
def test_a_filler_is_black_and_a_text_batch_gets_its_table(family, open_format):
    chat_format = open_format(family)
    with_image, text = (chat_format(conversation(sizes)) for sizes in ([(60, 60)], []))
    filler = filler_batch(with_image, 0)
    assert not filler.media[PIXELS].any() and filler.pixels == with_image.pixels
    if family == "llava-next":
        assert torch.equal(filler.media[REAL_TILES], with_image.media[REAL_TILES])
    plain = collate([text], 0)
    assert plain.pixels is None and not plain.media
    (joined,) = align_batches([plain], [True], text, with_image, 0)
    assert joined.pixels == with_image.pixels and not joined.media[PIXELS].any()


@pytest.mark.parametrize("family", [*IN_FLOATS, "llama"])
def test_processors_of_another_kind_keep_their_pixels(family, open_format):
    """Patches that are flat already; no images at all."""
    chat_format = open_format(family)
    assert chat_format.pixels is None
    if family in IN_FLOATS:
        example = chat_format(conversation([(60, 60)]))
        assert example.pixels is None and example.media[PIXELS].dtype == torch.float32


class Changed:
    """A processor whose image processor changes its numbers once more."""

    def __init__(self, processor, change) -> None:
        self.inner, self.change = processor.image_processor, change

    @property
    def image_processor(self):
        def call(**options):
            made = self.inner(**options)
            if "do_rescale" not in options:
                made[PIXELS] = self.change(made[PIXELS])
            return made

        return call


def test_what_is_no_table_is_not_taken_for_one(open_format):
    processor = open_format("gemma3").processor
    assert find_pixel_table(Changed(processor, lambda pixels: pixels)) is not None
    assert find_pixel_table(Changed(processor, lambda pixels: 3 * pixels)) is not None  # a table, too
    by_picture = lambda pixels: pixels - pixels.mean(dim=(1, 2, 3), keepdim=True)  # noqa: E731
    assert find_pixel_table(Changed(processor, by_picture)) is None
    by_place = lambda pixels: pixels + torch.linspace(0, 1, pixels.shape[-1])  # noqa: E731
    assert find_pixel_table(Changed(processor, by_place)) is None
    assert find_pixel_table(Changed(processor, lambda pixels: pixels.flatten(2))) is None


def test_a_processor_that_cannot_be_tried_keeps_its_pixels(open_format):
    processor = open_format("gemma3").processor

    def refuse(pixels):
        raise RuntimeError("no such picture")

    assert find_pixel_table(Changed(processor, refuse)) is None
    assert find_pixel_table(tokenizer_of(processor)) is None
