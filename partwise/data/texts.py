"""Raw text -> Examples: every token is a label, and a long document is split instead of cut.

In: a Conversation of one message, as documents.py reads it. Out: its pieces of at most max_seq_len tokens,
which become documents of packs like any others. No chat template writes anything; images stand where the text
has them, marked as the model's own template marks one. Each token but the first trains once: a piece begins
with the begin-of-sequence token, or where there is none with the token before it, which is then no label.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from partwise.data.chat import ChatFormat, Encoded, Rendered
from partwise.data.rows import row_name
from partwise.data.template import render, tokenizer_of
from partwise.data.tokens import check_control_tokens
from partwise.errors import DataError
from partwise.records import IGNORE_INDEX, Conversation, Dropped, Example, Image, Message, Span, Text

GRID = "image_grid_thw"  # where an image is many patches, how many: time x height x width


class TextFormat(ChatFormat):
    """Turns raw text into Examples of at most `max_seq_len` tokens. May be sent to other processes."""

    needs_template = False
    splits = True

    @cached_property
    def image_mark(self) -> str:
        """What the chat template writes for an image.

        Raises:
            ConfigError: the model has none.
        """
        plain, shown = (
            render(self.processor, (Message("user", (*image, Text("@"))),), "an image and a text")
            for image in ((), (Image("", "an image"),))
        )
        start = next(i for i, (a, b) in enumerate(zip(plain, shown, strict=False)) if a != b)
        return shown[start : start + len(shown) - len(plain)].strip()

    def render(self, conversation: Conversation) -> Rendered:
        """The text with the end-of-sequence token after it, all of which trains.

        Raises:
            DataError: the text holds one of the model's control tokens.
        """
        check_control_tokens(conversation, self.control, row_name(conversation.source, conversation.row))
        contents = conversation.messages[0].contents
        text = "".join(c.text if isinstance(c, Text) else self.image_mark for c in contents)
        text += tokenizer_of(self.processor).eos_token or ""
        return text, [(0, len(text))]

    def examples(self, conversation: Conversation) -> list[Example] | Dropped:
        """All pieces of the document. Raises: DataError as `encode`, or images cannot be told apart."""
        encoded = self.encode(conversation)
        pieces = self.split(encoded.example)
        source, row = conversation.source, conversation.row
        if not pieces:
            return Dropped("image would be cut", source, row)
        return [p for p in pieces if p.num_target_tokens] or Dropped("no target token", source, row)

    def fit(self, encoded: Encoded) -> Example | Dropped:
        """The first piece, which stands for the document in checks."""
        pieces = self.split(encoded.example)
        source, row = encoded.example.source, encoded.example.row
        if not pieces:
            return Dropped("image would be cut", source, row)
        return pieces[0] if pieces[0].num_target_tokens else Dropped("no target token", source, row)

    def split(self, example: Example) -> list[Example]:
        """Pieces of at most max_seq_len tokens; none where an image alone is longer than that."""
        if len(example.input_ids) <= self.max_seq_len:
            return [example]
        images = image_spans(example)
        media = split_media(example, images)
        cuts = cut_points(len(example.input_ids), images, self.max_seq_len)
        if not cuts:
            return []
        pieces = []
        for start, end in itertools.pairwise([0, *cuts]):
            shown = [i for i, (first, _) in enumerate(images) if start <= first < end]
            pieces.append(self.piece(example, start, end, join_media([media[i] for i in shown])))
        return pieces

    def piece(self, example: Example, start: int, end: int, media: dict[str, Tensor]) -> Example:
        """The tokens from start to end, behind the one that each piece begins with."""
        ids, labels, fields = example.input_ids, example.labels, example.token_fields
        lead = [] if start == 0 else [self.lead(ids, labels, start)]
        new_labels = torch.cat([labels.new_full((len(lead),), IGNORE_INDEX), labels[start:end]])
        return replace(
            example,
            input_ids=torch.cat([ids.new_tensor(lead), ids[start:end]]),
            labels=new_labels,
            token_fields={n: torch.cat([f.new_zeros(len(lead)), f[start:end]]) for n, f in fields.items()},
            media=media,
            num_target_tokens=int((new_labels != IGNORE_INDEX).sum()),
            pixels=example.pixels if media else None,
        )

    def lead(self, ids: Tensor, labels: Tensor, start: int) -> int:
        bos = tokenizer_of(self.processor).bos_token_id
        return int(ids[0]) if bos is not None and ids[0] == bos else int(ids[start - 1])


def image_spans(example: Example) -> list[Span]:
    """Where images stand: runs of tokens that do not train, behind the first token."""
    is_image = (example.labels == IGNORE_INDEX).tolist()
    is_image[0] = False
    spans = []
    for key, run in itertools.groupby(range(len(is_image)), key=is_image.__getitem__):
        places = list(run)
        if key:
            spans.append((places[0], places[-1] + 1))
    return spans


def split_media(example: Example, images: list[Span]) -> list[dict[str, Tensor]]:
    """The media of each image.

    Raises:
        DataError: their number is not that of the runs of image tokens.
    """
    media = example.media
    number = len(media[GRID]) if GRID in media else len(next(iter(media.values()))) if media else 0
    if number != len(images):
        raise DataError(
            f"{row_name(example.source, example.row)}: the document is longer than data.max_seq_len and "
            f"cannot be split: {number} images stand in {len(images)} places. Put text between images that "
            "stand side by side, or raise the limit."
        )
    patches = media[GRID].prod(-1).tolist() if GRID in media else []
    parts = {
        name: tensor.split(patches if patches and len(tensor) == sum(patches) else 1)
        for name, tensor in media.items()
    }
    return [{name: part[i] for name, part in parts.items()} for i in range(number)]


def join_media(media: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    names = media[0] if media else ()
    return {name: torch.cat([one[name] for one in media]) for name in names}


def cut_points(num_tokens: int, images: list[Span], limit: int) -> list[int]:
    """Where each piece ends, none inside an image; empty where an image alone is too long.

    The first piece has room for `limit` tokens, later ones for one less. A piece never begins right behind an
    image: what it begins with may be the token before.
    Example: 10 tokens, an image at (3, 6), limit 5 -> 3, 7, 10.
    """
    ends: list[int] = []
    while not ends or ends[-1] < num_tokens:
        start = ends[-1] if ends else 0
        end = min(start + limit - bool(ends), num_tokens)
        for first, last in images:
            if end < num_tokens and first < end <= last:
                end = first
        if end <= start:
            return []
        ends.append(end)
    return ends
