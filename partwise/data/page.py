"""Rows of training data as one HTML page: what the model reads, what of it is trained, and the images.

In: rows and the ChatFormat of the run. Out: one text of HTML that needs nothing else: the images are data
URLs, and there is no script. A row that is dropped or broken is shown with the reason. No file is written.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from PIL import Image as PILImage

from partwise.data.chat import ChatFormat, read_pictures
from partwise.data.preview import Segment, example_segments
from partwise.data.rows import count_images, row_name
from partwise.errors import DataError
from partwise.records import Conversation, Dropped

# An image is shown smaller than this; the page stays small enough to be sent to someone.
SHOWN_PIXELS = 480

STYLE = """
:root { color-scheme: light dark; --page: #f5f5f3; --card: #fff; --text: #1d1d1b; --dim: #6b6b66;
  --line: #dededa; --trained: #cdefd3; --trained-text: #0b4d1d; --image: #ece3fa; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --page: #171716; --card: #21211f; --text: #ecece8;
  --dim: #a0a09a; --line: #3a3a37; --trained: #1d4a2a; --trained-text: #b9f0c5; --image: #3b2f52;
  --bad: #ff8a80; } }
body { margin: 0 auto; max-width: 60rem; padding: 1.5rem; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.4rem; margin: 0 0 .25rem; }
h2 { font-size: 1rem; margin: 0; overflow-wrap: anywhere; }
p { margin: .25rem 0; color: var(--dim); overflow-wrap: anywhere; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 1rem;
  margin: 1rem 0; }
pre { margin: .75rem 0 0; white-space: pre-wrap; overflow-wrap: anywhere;
  font: 14px/1.7 ui-monospace, monospace; }
mark { background: var(--trained); color: var(--trained-text); font-weight: 600; }
.media { background: var(--image); border-radius: 4px; padding: 0 .4em; }
.bad { color: var(--bad); }
.images { display: flex; flex-wrap: wrap; gap: .75rem; margin-top: .75rem; }
figure { margin: 0; max-width: 100%; }
img { display: block; max-width: 100%; max-height: 15rem; min-width: 4rem; border: 1px solid var(--line);
  border-radius: 4px; background: #fff; }
figcaption { color: var(--dim); font-size: .85rem; overflow-wrap: anywhere; max-width: 20rem; }
"""


@dataclass(frozen=True)
class PageRow:
    """One row. `dropped` says why training leaves it out, `fault` why it cannot be used; else they are empty.

    `num_tokens` are those of the whole row, of which `num_kept_tokens` are left at max_seq_len.
    """

    name: str
    segments: Sequence[Segment] = ()
    pictures: Sequence[tuple[str, PILImage.Image]] = ()
    num_tokens: int = 0
    num_kept_tokens: int = 0
    num_target_tokens: int = 0
    dropped: str = ""
    fault: str = ""


def read_page_row(rows: Sequence[Conversation], chat_format: ChatFormat, index: int) -> PageRow:
    """What the page shows of rows[index]; a DataError becomes its `fault`."""
    try:
        conversation = rows[index]
        pictures = [picture.pixels for picture in read_pictures(conversation)]
        encoded = chat_format.encode(conversation)
        result = chat_format.fit(encoded)
    except DataError as error:
        return PageRow(f"row {index}", fault=str(error))
    is_dropped = isinstance(result, Dropped)
    shown = encoded.example if isinstance(result, Dropped) else result
    sizes = [picture.size for picture in pictures]
    return PageRow(
        name=row_name(conversation.source, conversation.row),
        segments=example_segments(chat_format.processor, shown, chat_format.media_token_ids, sizes),
        pictures=[(i.where, p) for i, p in zip(conversation.images, pictures, strict=True)],
        num_tokens=len(encoded.example.input_ids),
        num_kept_tokens=0 if is_dropped else len(shown.input_ids),
        num_target_tokens=shown.num_target_tokens,
        dropped=result.reason if isinstance(result, Dropped) else "",
    )


def preview_page(title: str, rows: Sequence[PageRow]) -> str:
    """The page of these rows."""
    explained = (
        "<p>The text is what the model reads. <mark>Marked tokens</mark> are trained, all others are not; "
        '<span class="media">image tokens</span> are shown as their number.</p>'
    )
    return whole_page(title, [explained, *map(_section, rows)])


def whole_page(title: str, blocks: Iterable[str], style: str = "") -> str:
    """The blocks of HTML as a page; `style` is added to that of all pages."""
    name, body = html.escape(title), "\n".join(blocks)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{name}</title>\n<style>{STYLE}{style}</style>\n</head>\n<body>\n<h1>{name}</h1>\n"
        f"{body}\n</body>\n</html>\n"
    )


def _section(row: PageRow) -> str:
    head = f"<h2>{html.escape(row.name)}</h2>"
    if row.fault:
        return f'<section>\n{head}\n<p class="bad">cannot be used: {html.escape(row.fault)}</p>\n</section>'
    lines = [f"<section>\n{head}\n<p>{html.escape(describe_counts(row))}</p>"]
    if row.dropped:
        lines.append(f'<p class="bad">training drops this row: {html.escape(row.dropped)}</p>')
    lines.append(f"<pre>{''.join(map(_segment, row.segments))}</pre>")
    if row.pictures:
        lines.append(images_block(row.pictures))
    return "\n".join([*lines, "</section>"])


def describe_counts(row: PageRow) -> str:
    cut = f", cut to {row.num_kept_tokens}" if 0 < row.num_kept_tokens < row.num_tokens else ""
    return f"{row.num_tokens} tokens{cut}, {row.num_target_tokens} trained, {count_images(len(row.pictures))}"


def _segment(segment: Segment) -> str:
    text = html.escape(segment.text)
    if segment.kind == "image":
        return f'<span class="media">{text}</span>'
    return f"<mark>{text}</mark>" if segment.kind == "trained" else text


def images_block(pictures: Sequence[tuple[str, PILImage.Image]]) -> str:
    """The pictures beside each other, each with its number, size and name."""
    figures = "\n".join(_figure(i, *named) for i, named in enumerate(pictures, start=1))
    return f'<div class="images">\n{figures}\n</div>'


def _figure(number: int, name: str, picture: PILImage.Image) -> str:
    caption = f"{number}: {picture.width}x{picture.height} px, {name}"
    return (
        f'<figure><img alt="image {number}" src="{_data_url(picture)}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def _data_url(picture: PILImage.Image) -> str:
    shown = picture.copy()  # thumbnail works in place
    shown.thumbnail((SHOWN_PIXELS, SHOWN_PIXELS))
    file = io.BytesIO()
    # A photograph is much smaller as JPEG; drawings of few pixels stay as they are.
    kind = "PNG" if shown.width * shown.height < 128 * 128 else "JPEG"
    shown.save(file, kind, quality=85)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"
