"""An example as coloured text: what the model reads, and which of it are labels.

In: the processor, a conversation and its example. Out: rich Text; trained tokens are green, and each run
of image tokens is one "[image 1: 56x56 px, 16 tokens]". Nothing is printed here.
"""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

from rich.text import Text

from partwise.data.images import decode_image
from partwise.data.rows import count_images, row_name
from partwise.data.template import tokenizer_of
from partwise.records import IGNORE_INDEX, Conversation, Example

TRAINED_STYLE = "bold green"
IMAGE_STYLE = "magenta"


def preview_example(
    processor: Any, conversation: Conversation, example: Example, media_token_ids: frozenset[int]
) -> Text:
    """The example's tokens as text and a line of counts."""
    tokenizer = tokenizer_of(processor)
    kinds = [
        (token in media_token_ids, label != IGNORE_INDEX)
        for token, label in zip(example.input_ids.tolist(), example.labels.tolist(), strict=True)
    ]
    runs = [
        (kind, [i for i, _ in run])
        for kind, run in itertools.groupby(enumerate(kinds), key=lambda pair: pair[1])
    ]
    sizes = _image_sizes(conversation, num_runs=sum(is_media for (is_media, _), _ in runs))
    text = Text()
    for (is_media, is_trained), positions in runs:
        if is_media:
            # The commonest id is the image's own token; begin and end marks stand beside it.
            _, num_tokens = Counter(example.input_ids[positions].tolist()).most_common(1)[0]
            text.append(f"[image{next(sizes)}{num_tokens} tokens]", style=IMAGE_STYLE)
        else:
            decoded = tokenizer.decode(example.input_ids[positions], clean_up_tokenization_spaces=False)
            text.append(decoded, style=TRAINED_STYLE if is_trained else "")
    text.append(
        f"\n{row_name(example.source, example.row)}: {len(example.input_ids)} tokens, "
        f"{example.num_target_tokens} of them trained (green), {count_images(len(conversation.images))}\n",
        style="dim",
    )
    return text


def _image_sizes(conversation: Conversation, num_runs: int) -> itertools.chain[str]:
    """What stands before each run's token count: number and size, where runs and images are one to one."""
    row = row_name(conversation.source, conversation.row)
    images = conversation.images if num_runs == len(conversation.images) else ()
    pictures = (decode_image(image, row) for image in images)
    named = (f" {i + 1}: {p.width}x{p.height} px, " for i, p in enumerate(pictures))
    return itertools.chain(named, itertools.repeat(": "))
