"""An example as text: what the model reads, and which of it are labels.

In: the processor, a conversation and its example. Out: segments of text by kind, or rich Text of them:
trained tokens are green, and each run of image tokens is one "[image 1: 56x56 px, 16 tokens]". Nothing is
printed here.
"""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any, Literal, NamedTuple

from rich.text import Text

from partwise.data.images import decode_image
from partwise.data.rows import count_images, row_name
from partwise.data.template import tokenizer_of
from partwise.records import IGNORE_INDEX, Conversation, Example

STYLES = {"text": "", "trained": "bold green", "image": "magenta"}


class Segment(NamedTuple):
    """Tokens of one kind in a row."""

    text: str
    kind: Literal["text", "trained", "image"]


def preview_example(
    processor: Any, conversation: Conversation, example: Example, media_token_ids: frozenset[int]
) -> Text:
    """The example's tokens as text and a line of counts."""
    row = row_name(conversation.source, conversation.row)
    sizes = [decode_image(image, row).size for image in conversation.images]
    text = Text()
    for segment in example_segments(processor, example, media_token_ids, sizes):
        text.append(segment.text, style=STYLES[segment.kind])
    text.append(
        f"\n{row_name(example.source, example.row)}: {len(example.input_ids)} tokens, "
        f"{example.num_target_tokens} of them trained (green), {count_images(len(conversation.images))}\n",
        style="dim",
    )
    return text


def example_segments(
    processor: Any, example: Example, media_token_ids: frozenset[int], sizes: list[tuple[int, int]]
) -> list[Segment]:
    """The example's tokens as text; `sizes` are the (width, height) of its images."""
    tokenizer = tokenizer_of(processor)
    kinds = [
        (token in media_token_ids, label != IGNORE_INDEX)
        for token, label in zip(example.input_ids.tolist(), example.labels.tolist(), strict=True)
    ]
    runs = [
        (kind, [i for i, _ in run])
        for kind, run in itertools.groupby(enumerate(kinds), key=lambda pair: pair[1])
    ]
    names = _image_names(sizes, num_runs=sum(is_media for (is_media, _), _ in runs))
    segments: list[Segment] = []
    for (is_media, is_trained), positions in runs:
        if is_media:
            # The commonest id is the image's own token; begin and end marks stand beside it.
            _, num_tokens = Counter(example.input_ids[positions].tolist()).most_common(1)[0]
            segments.append(Segment(f"[image{next(names)}{num_tokens} tokens]", "image"))
        else:
            decoded = tokenizer.decode(example.input_ids[positions], clean_up_tokenization_spaces=False)
            segments.append(Segment(decoded, "trained" if is_trained else "text"))
    return segments


def _image_names(sizes: list[tuple[int, int]], num_runs: int) -> itertools.chain[str]:
    """What stands before each run's token count: number and size, where runs and images are one to one."""
    known = sizes if num_runs == len(sizes) else []
    named = (f" {i + 1}: {width}x{height} px, " for i, (width, height) in enumerate(known))
    return itertools.chain(named, itertools.repeat(": "))
