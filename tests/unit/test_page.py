"""The page of `partwise preview --html`: one file that shows rows as they are trained, escaped and whole."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image as PILImage

from partwise.config import load_config
from partwise.data.chat import ChatFormat
from partwise.data.page import PageRow, preview_page, read_page_row
from partwise.data.sources import Rows, open_rows
from partwise.errors import ConfigError, DataError
from partwise.model.load import load_model_config, load_processor, media_token_ids
from partwise.show import PAGE_ROWS, write_preview

OPEN_TAGS = ("meta", "img")


class Page(HTMLParser):
    """Text by tag, and every attribute; a tag that is not closed in its place is an error."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs
        if tag not in OPEN_TAGS:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.setdefault(self.open[-1] if self.open else "", []).append(data)


def row(*turns: str, images: tuple[str, ...] = ()) -> dict:
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    return {"messages": messages, "images": list(images)}


@pytest.fixture
def rows(tmp_path: Path, make_image: Callable) -> Rows:
    make_image((300, 600)).save(tmp_path / "tall.png")
    make_image((28, 28)).save(tmp_path / "small.png")
    lines = [
        row("<image>a <b> & c", "red </pre>", "<image>", "no", images=("tall.png", "small.png")),
        row("word " * 20, "left"),
        row("word " * 80, "nothing left"),
        row("<image>", "gone", images=("gone.png",)),
        *[row("what?", str(i)) for i in range(8)],
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return open_rows([path])


@pytest.fixture
def chat_format(tiny_folder: Callable[[str], Path]) -> ChatFormat:
    folder = tiny_folder("gemma3")
    processor = load_processor(folder)
    return ChatFormat(processor, media_token_ids(load_model_config(folder), processor), 64, "truncate")


def test_trained_tokens_are_marked_and_texts_are_escaped(rows: Rows, chat_format: ChatFormat) -> None:
    text = preview_page("a <title>", [read_page_row(rows, ChatFormat(*settings(chat_format, 400)), 0)])
    page = Page(text)
    assert page.texts["mark"] == ["Marked tokens", "red </pre><end_of_turn>", "no<end_of_turn>"]
    assert page.texts["h1"] == ["a <title>"]
    spans = page.texts["span"]
    assert spans == ["image tokens", "[image 1: 300x600 px, 4 tokens]", "[image 2: 28x28 px, 4 tokens]"]
    assert any("a <b> & c" in piece for piece in page.texts["pre"])


def settings(chat_format: ChatFormat, max_seq_len: int) -> tuple:
    return chat_format.processor, chat_format.media_token_ids, max_seq_len, "truncate"


def test_images_are_in_the_page_and_nothing_is_fetched(rows: Rows, chat_format: ChatFormat) -> None:
    text = preview_page("t", [read_page_row(rows, ChatFormat(*settings(chat_format, 400)), 0)])
    sources = [value for name, value in Page(text).attributes if name in ("src", "href")]
    assert len(sources) == 2
    sizes = []
    for source in sources:
        data = re.fullmatch(r"data:image/(png|jpeg);base64,(.*)", source or "")
        assert data
        sizes.append(PILImage.open(io.BytesIO(base64.b64decode(data[2]))).size)
    assert sizes == [(240, 480), (28, 28)]
    assert not re.search(r"https?://|url\(|@import|<script|<link", text)


def test_cut_dropped_and_broken_rows_say_so(rows: Rows, chat_format: ChatFormat) -> None:
    short = ChatFormat(*settings(chat_format, 32))
    whole = read_page_row(rows, chat_format, 1)
    assert (whole.num_tokens, whole.dropped, whole.fault) == (whole.num_kept_tokens, "", "")
    limit = whole.num_tokens - 2  # the line break after the turn is no target
    cut = preview_page("t", [read_page_row(rows, ChatFormat(*settings(chat_format, limit)), 1)])
    assert f"{limit + 2} tokens, cut to {limit}, {whole.num_target_tokens - 1} trained, 0 images" in cut
    dropped = preview_page("t", [read_page_row(rows, short, 2)])
    assert "training drops this row: no target token" in dropped
    assert Page(dropped).texts["mark"][1:] == ["nothing left<end_of_turn>"]
    broken = preview_page("t", [read_page_row(rows, short, 3)])
    assert "cannot be used" in broken and "gone.png" in broken


def test_a_row_without_images_has_no_figure() -> None:
    assert "<figure" not in preview_page("t", [PageRow("a.jsonl:1")])


def test_the_command_writes_the_first_rows_or_the_chosen_ones(
    rows: Rows, tmp_path: Path, tiny_folder: Callable[[str], Path]
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(
        f"model: {{path: {tiny_folder('gemma3')}}}\nparts: {{language_model: full}}\n"
        f"data: {{train: {tmp_path}/rows.jsonl, max_seq_len: 64}}\noutput: {tmp_path}/run\n"
    )
    page = tmp_path / "page.html"
    write_preview(load_config(config), [], page)
    assert page.read_text().count("<section>") == PAGE_ROWS
    write_preview(load_config(config), [11, 4], page)
    names = Page(page.read_text()).texts["h2"]
    assert [name.rpartition(":")[2] for name in names] == ["12", "5"]
    with pytest.raises(DataError, match="--row 12: the training data has 12 rows"):
        write_preview(load_config(config), [12], tmp_path / "other.html")
    assert not (tmp_path / "other.html").exists() and not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match="cannot be written"):
        write_preview(load_config(config), [0], tmp_path)
