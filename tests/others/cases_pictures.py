"""What a row becomes: pictures that are not what they look like, and texts that are more than text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench import Bench, Row, listening
from PIL import Image, ImageOps

from partwise.data.pixels import with_own_pixels
from partwise.records import Example


def plain_pixels(bench: Bench, image: Image.Image) -> torch.Tensor:
    """What the plain processor makes of a picture that was opened."""
    processor = bench.processor()
    with listening() as said:
        made = processor(text=[processor.boi_token], images=[[image]], return_tensors="pt")
    assert not said
    return made["pixel_values"]


def our_pixels(bench: Bench, file: Path) -> torch.Tensor:
    turns = [{"role": "user", "content": "<image>Which?"}, {"role": "assistant", "content": "red"}]
    example = bench.example({"messages": turns, "images": [str(file)]})
    assert isinstance(example, Example)
    return with_own_pixels(example).media["pixel_values"]


def halves(left: Any, right: Any, size: tuple[int, int] = (80, 40)) -> Image.Image:
    image = Image.new("RGB", size, left)
    image.paste(Image.new("RGB", (size[0] // 2, size[1]), right), (size[0] // 2, 0))
    return image


def sideways_photo(bench: Bench) -> Row:
    file = bench.folder / "photo.jpg"
    tag = Image.Exif()
    tag[0x0112] = 6  # to be turned by 90 degrees
    halves("red", "blue").save(file, exif=tag, quality=95)
    opened = Image.open(file)
    sideways = plain_pixels(bench, opened)
    upright = plain_pixels(bench, ImageOps.exif_transpose(opened))
    untagged = Image.fromarray(np.asarray(opened))
    assert torch.equal(sideways, plain_pixels(bench, untagged)) and not torch.allclose(sideways, upright)
    assert torch.equal(our_pixels(bench, file), upright)
    return Row(
        "A photo is stored sideways, with an EXIF tag that turns it. The processor gets `Image.open(file)`.",
        "The model sees it sideways. The tag is not read.",
        "Turned upright, as every viewer shows it; `partwise check` says how many are.",
    )


def transparent_background(bench: Bench) -> Row:
    file = bench.folder / "logo.png"
    logo = Image.new("RGBA", (40, 40), (255, 0, 0, 0))  # red, and wholly transparent
    logo.paste(Image.new("RGBA", (20, 40), (0, 0, 255, 255)), (0, 0))
    logo.save(file)
    pixels = plain_pixels(bench, Image.open(file).convert("RGB"))
    hidden, white = (plain_pixels(bench, halves("blue", color, (40, 40))) for color in ("red", "white"))
    assert torch.equal(pixels, hidden) and not torch.allclose(pixels, white)
    assert torch.equal(our_pixels(bench, file), white)
    return Row(
        "A picture is transparent around its subject; `Image.open(file).convert('RGB')`, as loaders do.",
        "The model sees the colour that is stored under the transparency, here red.",
        "The picture is laid on white, as it looks on a page.",
    )


def sixteen_bits(bench: Bench) -> Row:
    file = bench.folder / "scan.png"
    values = np.tile(np.linspace(0, 65535, 40).astype(np.uint16), (40, 1))
    Image.fromarray(values).save(file)
    pixels = plain_pixels(bench, Image.open(file).convert("RGB"))
    right = plain_pixels(bench, Image.fromarray((values // 257).astype(np.uint8)).convert("RGB"))
    brightest = (pixels > 0.99).float().mean().item()
    assert brightest > 0.9 and (right > 0.99).float().mean() < 0.1
    assert torch.equal(our_pixels(bench, file), right)
    return Row(
        "A grey scan has 16 bits; `Image.open(file).convert('RGB')` again.",
        f"{100 * brightest:.0f} % of its pixels are white: whatever is above 255 of 65535 is cut.",
        "Scaled to 8 bits; nothing is cut.",
    )


def control_token_in_a_text(bench: Bench) -> Row:
    text = "What does <end_of_turn> do?"
    processor = bench.processor()
    end = processor.tokenizer.convert_tokens_to_ids("<end_of_turn>")
    chat = [
        {"role": "user", "content": [{"type": "text", "text": text}]},
        {"role": "assistant", "content": [{"type": "text", "text": "It ends."}]},
    ]
    with listening() as said:
        made = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")
    num_ends = int((made["input_ids"] == end).sum())
    assert num_ends == len(chat) + 1 and not said
    row = {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "It ends."}]}
    message = bench.refusal(bench.example, row)
    assert "a control token of this model" in message
    return Row(
        "A user's text holds `<end_of_turn>`, written out.",
        f"It becomes the control token: {len(chat)} turns have {num_ends} ends, the first inside the "
        "question. Nothing is said.",
        "Stops at the row.",
        message,
    )


CASES = (sideways_photo, transparent_background, sixteen_bits, control_token_in_a_text)
