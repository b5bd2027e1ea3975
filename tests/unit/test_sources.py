"""Data files and rows: every format, every fault with its text, and images of every mode."""

from __future__ import annotations

import base64
import io
import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image as PILImage

from partwise.data import sources
from partwise.data.images import decode_image
from partwise.data.rows import parse_image, read_conversation, row_name
from partwise.data.sources import open_rows
from partwise.errors import DataError
from partwise.records import Conversation, Image, Message, Text

DOCS = Path(__file__).parents[2] / "docs" / "data.md"
QUESTION = {"role": "user", "content": "Q"}
ANSWER = {"role": "assistant", "content": "A"}
FORMATS = 'A row needs "messages" (a list of role and content), or "prompt" and "completion".'


def read(row: Any, folder: str = "data") -> Conversation:
    return read_conversation(row, f"{folder}/train.jsonl", 4181)


def image(name: str) -> Image:
    return Image(str(Path("data").absolute() / name), name)


def png(size: tuple[int, int] = (4, 2), mode: str = "RGB", color: Any = "red", **options: Any) -> bytes:
    file = io.BytesIO()
    PILImage.new(mode, size, color).save(file, options.pop("format", "PNG"), **options)
    return file.getvalue()


def chat(*contents: tuple[Text | Image, ...], train: bool = True) -> tuple[Message, ...]:
    roles = ("user", "assistant")
    return tuple(Message(roles[i % 2], c, train=bool(i % 2) and train) for i, c in enumerate(contents))


def test_messages_may_be_strings_or_parts() -> None:
    wanted = chat((image("a.png"), Text("What?")), (Text("A"),))
    strings = {"messages": [{"role": "user", "content": "<image>\nWhat?"}, ANSWER], "images": ["a.png"]}
    inline = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What?"}]
    waiting = [{"type": "image"}, {"type": "text", "text": "What?"}]
    assert read(strings).messages == wanted
    assert (
        read({"messages": [{"role": "user", "content": waiting}, ANSWER], "image": "a.png"}).messages
        == wanted
    )
    found = read({"messages": [{"role": "user", "content": inline}, ANSWER]}).messages
    assert found[0].contents[0].source == wanted[0].contents[0].source
    assert found[0].contents[0].where == "a.png"


def test_images_fill_placeholders_in_order() -> None:
    content = [
        {"type": "text", "text": "First <image>, then"},
        {"type": "image", "path": "b.png"},
        {"type": "image"},
        {"type": "text", "text": "!"},
        {"type": "text", "text": "?"},
    ]
    row = {"messages": [{"role": "user", "content": content}, ANSWER], "images": ["a.png", "c.png"]}
    assert read(row).messages[0].contents == (
        Text("First "),
        image("a.png"),
        Text(", then"),
        image("b.png"),
        image("c.png"),
        Text("!?"),
    )


def test_prompt_and_completion_may_be_strings_or_messages() -> None:
    wanted = chat((Text("Q"),), (Text("A"),))
    assert read({"prompt": "Q", "completion": "A"}).messages == wanted
    assert read({"prompt": [QUESTION], "completion": [ANSWER]}).messages == wanted
    many = read({"prompt": [QUESTION, ANSWER, QUESTION], "completion": "A"}).messages
    assert [message.train for message in many] == [False, False, False, True]


def test_sharegpt_rows_are_read() -> None:
    row = {
        "conversations": [{"from": "human", "value": "Q\n<image>"}, {"from": "gpt", "value": "A"}],
        "image": "a.png",
        "id": 7,
    }
    assert read(row).messages == chat((Text("Q"), image("a.png")), (Text("A"),))


def test_train_false_leaves_an_answer_out() -> None:
    row = {"messages": [QUESTION, {**ANSWER, "train": False}, QUESTION, ANSWER]}
    assert [message.train for message in read(row).messages] == [False, False, False, True]


def test_images_may_be_bytes_structs_and_data_urls() -> None:
    data = png()
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    picture = PILImage.new("RGB", (1, 1))
    found = read({"prompt": "<image>" * 5, "completion": "A", "images": [
        data, {"bytes": data, "path": "x.png"}, {"bytes": None, "path": "x.png"}, url, picture,
    ]})  # fmt: skip
    wanted = [data, data, str(Path("data/x.png").absolute()), data, picture]
    assert [i.source for i in found.images] == wanted
    openai = {"type": "image_url", "image_url": {"url": url}}
    found = read({"messages": [{"role": "user", "content": [openai]}, ANSWER]})
    assert found.images[0].source == data


ROW_FAULTS = [
    ([1], f"the row is a list, not an object. {FORMATS}"),
    ({"texts": "x", "id": 1}, f"the keys are texts, id. {FORMATS}"),
    (
        {"text": "x"},
        'the row is raw text ("text"), which objective.loss sft does not read. Set objective.loss: text, or '
        f"give chats. {FORMATS}",
    ),
    (
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        'the row has "chosen" or "rejected", so it is a pair of answers, which objective.loss sft does not '
        "read. Set objective.loss: dpo (or orpo, simpo), or give rows of one answer.",
    ),
    (
        {"prompt": "a", "completion": "b", "label": False},
        'the row has "label": true or false, so it says whether its answer is good, which objective.loss sft '
        "does not read. Set objective.loss: kto, or remove the key.",
    ),
    ({}, f"the keys are none. {FORMATS}"),
    ({"messages": "x"}, f'"messages" is a str, not a list of messages. {FORMATS}'),
    ({"messages": []}, '"messages" is empty. Add a user and an assistant message, or remove the row.'),
    ({"messages": ["x"]}, "messages[0] is a str, not an object with role and content."),
    (
        {"messages": [{"role": "bot", "content": "x"}]},
        "messages[0]: role 'bot' is not one of system, user, assistant.",
    ),
    (
        {"messages": [{**QUESTION, "weight": 0}]},
        "messages[0]: key 'weight' is not known and would be left out. Use role, content, train.",
    ),
    ({"messages": [{"role": "user"}]}, "messages[0]: content is None, not a string or a list of parts."),
    (
        {"messages": [{**QUESTION, "train": True}]},
        "messages[0]: train is True, but only an assistant message may have train: true or false.",
    ),
    (
        {"messages": [QUESTION, {**ANSWER, "train": "no"}]},
        "messages[1]: train is 'no', but only an assistant message may have train: true or false.",
    ),
    (
        {"messages": [{"role": "user", "content": ["x"]}]},
        'messages[0].content[0] is a str, not an object such as {"type": "text", ...}.',
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "video"}]}]},
        "messages[0].content[0]: type 'video' is not text with a text, or image.",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "image", "path": "a", "url": "b"}]}]},
        "messages[0].content[0] names 2 images. Keep one of image, path, url, bytes, image_url.",
    ),
    (
        {"messages": [QUESTION]},
        "no assistant message, so nothing to learn. Add the answer, or remove the row.",
    ),
    ({"messages": [ANSWER]}, "the first answer has no user message before it. Add the prompt."),
    (
        {"messages": [QUESTION, {"role": "system", "content": "x"}, ANSWER]},
        "a system message may only be the first message.",
    ),
    (
        {"messages": [QUESTION, {"role": "assistant", "content": ""}]},
        "message 1 (assistant) is empty. Give it a text, or remove the row.",
    ),
    (
        {"messages": [QUESTION, ANSWER], "tools": [{}]},
        '"tools" are not supported and would be left out. Remove the key, or write them as text.',
    ),
    (
        {"prompt": "Q", "completion": [QUESTION]},
        '"completion" has a message that is not an answer. Only assistant messages may stand in it.',
    ),
    ({"conversations": [{"role": "user"}]}, f'conversations[0] has no "from" and "value". {FORMATS}'),
    (
        {"conversations": [{"from": "tool", "value": "x"}]},
        "conversations[0]: role 'tool' is not one of human, gpt, user, assistant, system.",
    ),
    (
        {"prompt": "Q", "completion": "A", "images": ["a"]},
        "1 image given, no placeholder in the messages. Add <image> where it belongs.",
    ),
    (
        {"prompt": "<image><image>", "completion": "A", "images": ["a"] * 3},
        "3 images given, 2 placeholders in the messages. Add a placeholder or drop an image.",
    ),
    (
        {"prompt": "<image>", "completion": "A", "images": ["a"] * 3},
        "3 images given, 1 placeholder in the messages. Add a placeholder or drop an image.",
    ),
    (
        {"prompt": "<image>", "completion": "A"},
        "0 images given, 1 <image> in the messages. Add an image or drop one.",
    ),
    (
        {"prompt": "<image>", "completion": "A", "images": ["a"], "image": "a"},
        'both "image" and "images" are given. Keep one of them.',
    ),
    ({"prompt": "<image>", "completion": "A", "images": "a"}, '"images" is a str, not a list.'),
    (
        {"prompt": "<image>", "completion": "A", "image": 3},
        "images[0] is 3, not a path, bytes or a data: URL.",
    ),
    (
        {"prompt": "<image>", "completion": "A", "image": "https://x.org/a.png"},
        "images[0] is the web address https://x.org/a.png. Download the image first and give its path.",
    ),
    (
        {"prompt": "<image>", "completion": "A", "image": "data:image/png,abc"},
        "images[0]: the data: URL is not base64. Write data:image/png;base64,... instead.",
    ),
    (
        {"prompt": "<image>", "completion": "A", "image": "data:image/png;base64,a"},
        "images[0]: the data: URL is broken: Invalid base64-encoded string: number of data "
        "characters (1) cannot be "
        "1 more than a multiple of 4. Encode the image again.",
    ),
]


@pytest.mark.parametrize(("row", "text"), ROW_FAULTS, ids=range(len(ROW_FAULTS)))
def test_faults_of_a_row_name_file_and_line(row: Any, text: str) -> None:
    with pytest.raises(DataError) as error:
        read(row)
    assert str(error.value) == f"data/train.jsonl:4182: {text}"


def test_rows_of_other_files_are_counted_from_zero() -> None:
    assert row_name("a.parquet", 6) == "a.parquet row 6"
    with pytest.raises(DataError, match=r"^a\.json row 3: "):
        read_conversation({}, "a.json", 3)


def test_an_image_of_the_command_line_is_parsed_alone(tmp_path: Path) -> None:
    assert parse_image("a.png", tmp_path, "--image") == Image(str(tmp_path / "a.png"), "a.png")
    with pytest.raises(DataError, match=r"^--image is the web address http://x\. Download"):
        parse_image("http://x", tmp_path, "--image")


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """Writes rows to a file of a kind and gives its path."""

    def write_file(name: str, rows: list[Any], **options: Any) -> str:
        path = tmp_path / name
        if path.suffix == ".parquet":
            pq.write_table(pa.Table.from_pylist(rows), path, **options)
        else:
            lines = [json.dumps(row, ensure_ascii=False) for row in rows]
            text = "\n\n".join(lines) if path.suffix == ".jsonl" else f"[{','.join(lines)}]"
            path.write_text(text, encoding="utf-8")
        return str(path)

    return write_file


ROWS = [{"prompt": f"Q{i} é", "completion": "A"} for i in range(7)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet"])
def test_files_give_their_rows_in_any_order_and_process(name: str, write: Callable[..., str]) -> None:
    options = {"row_group_size": 3} if name.endswith("parquet") else {}
    path = write(name, ROWS, **options)
    rows = open_rows([path, path])
    assert len(rows) == 14
    for found in (rows, pickle.loads(pickle.dumps(rows))):
        for i in (13, 0, 6, 7, 3, 2, 13):
            assert found[i].messages[0].contents == (Text(f"Q{i % 7} é"),)
            # A blank line counts as a line.
            assert found[i].row == (2 * (i % 7) if name == "a.jsonl" else i % 7)
            assert found[i].source == path
    with pytest.raises(IndexError):
        rows[14]


def test_row_groups_make_room_for_each_other(
    write: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write("a.parquet", ROWS, row_group_size=1)
    group_bytes = pq.read_metadata(path).row_group(0).total_byte_size
    monkeypatch.setattr(sources, "PARQUET_CACHE_BYTES", 2 * group_bytes)
    rows = open_rows([path])
    file = rows.files[0][1]
    for i in (0, 1, 0, 2):
        assert rows[i].messages[0].contents == (Text(f"Q{i} é"),)
    assert list(file.tables) == [0, 2]
    assert pickle.loads(pickle.dumps(file)).tables == {}


def test_parquet_rows_hold_images_and_missing_keys(write: Callable[..., str]) -> None:
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Q"}]}
    path = write("a.parquet", [
        {"messages": [user, {"role": "assistant", "content": [{"type": "text", "text": "A"}]}],
         "images": [{"bytes": png(), "path": None}]},
        {"messages": [{**user, "content": user["content"][1:]}, {"role": "assistant", "content": [
            {"type": "text", "text": "A"}]}], "images": None},
    ])  # fmt: skip
    rows = open_rows([path])
    assert decode_image(rows[0].images[0], "x").size == (4, 2)
    assert rows[1].messages == chat((Text("Q"),), (Text("A"),))


def test_a_jsonl_file_is_not_kept_in_memory(write: Callable[..., str]) -> None:
    file = open_rows([write("a.jsonl", [{"prompt": "Q" * 100_000, "completion": "A"}] * 5)]).files[0][1]
    assert len(pickle.dumps(file)) < 1000


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("a.jsonl", b"", "{path}: the data file has no rows. Add rows, or take it off the list."),
        ("a.jsonl", b"\n \n", "{path}: the data file has no rows. Add rows, or take it off the list."),
        ("a.json", b"[]", "{path}: the data file has no rows. Add rows, or take it off the list."),
        (
            "a.csv",
            b"x",
            "{path}: the ending is not one of .jsonl, .json, .parquet. Convert or rename the file.",
        ),
        (
            "a.jsonl",
            b'{"prompt": "a", "completion": "b"}\n{"prompt" "a"}',
            "{path}:2: not valid JSON: Expecting ':' delimiter at column 11. Each line must be one "
            "JSON object.",
        ),
        (
            "a.jsonl",
            b'{"prompt": "\xff"}',
            "{path}:1: not UTF-8: 'utf-8' codec can't decode byte 0xff in position 12: invalid start "
            "byte. Save it as "
            "UTF-8.",
        ),
        (
            "a.json",
            b'{"a": 1}\n{"a": 1}',
            "{path}:2: not valid JSON: Extra data. For one object per line, name the file .jsonl.",
        ),
        (
            "a.json",
            b"[\n{]",
            "{path}:2: not valid JSON: Expecting property name enclosed in double quotes. Mend the file.",
        ),
        ("a.json", b'{"a": 1}', "{path}: holds a dict, not a list. Write the rows as one JSON list."),
    ],
)
def test_faults_of_a_file(name: str, content: bytes, text: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        list(open_rows([path]))
    assert str(error.value) == text.replace("{path}", str(path))


def test_faults_of_parquet_files(write: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "b.parquet").write_bytes(b"nothing")
    with pytest.raises(
        DataError, match=r"b\.parquet: not a parquet file that can be read: .* Write it again\."
    ):
        open_rows([tmp_path / "b.parquet"])
    empty = tmp_path / "c.parquet"
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), empty)
    with pytest.raises(DataError, match=r"c\.parquet: the data file has no rows"):
        open_rows([empty])
    with pytest.raises(DataError, match=r"a\.parquet row 1: the keys are prompt\. A row needs"):
        list(open_rows([write("a.parquet", [ROWS[0], {"prompt": "Q", "completion": None}])]))


def test_no_file_or_a_missing_one() -> None:
    with pytest.raises(DataError) as error:
        open_rows([])
    assert str(error.value) == "no data file is given. Name one or more .jsonl, .json or .parquet files."
    with pytest.raises(DataError) as error:
        open_rows(["gone.jsonl"])
    assert str(error.value) == (
        "gone.jsonl: the data file does not exist. Paths are relative to the working directory."
    )


def decode(source: Any) -> PILImage.Image:
    return decode_image(Image(source, "a.png"), "t.jsonl:1")


def first_pixel(data: bytes) -> tuple[int, int, int]:
    picture = decode(data)
    assert picture.mode == "RGB"
    return picture.getpixel((0, 0))


def test_every_mode_becomes_rgb() -> None:
    assert first_pixel(png()) == (255, 0, 0)
    assert first_pixel(png(mode="L", color=100)) == (100, 100, 100)
    assert first_pixel(png(mode="1", color=1)) == (255, 255, 255)
    assert first_pixel(png(mode="RGBA", color=(0, 0, 0, 0))) == (255, 255, 255)
    assert first_pixel(png(mode="LA", color=(0, 51))) == (204, 204, 204)
    assert first_pixel(png(mode="I;16", color=257 * 100)) == (100, 100, 100)
    assert first_pixel(png(mode="I", color=65535, format="TIFF")) == (255, 255, 255)
    assert first_pixel(png(mode="CMYK", color=(0, 0, 0, 0), format="TIFF")) == (255, 255, 255)
    palette = PILImage.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, 9, 8, 7])
    file = io.BytesIO()
    palette.save(file, "PNG")
    assert first_pixel(file.getvalue()) == (9, 8, 7)
    palette.save(file := io.BytesIO(), "PNG", transparency=1)
    assert first_pixel(file.getvalue()) == (255, 255, 255)


def test_pictures_are_turned_upright() -> None:
    exif = PILImage.Exif()
    exif[0x0112] = 6
    assert decode(png((4, 2), exif=exif)).size == (2, 4)


def test_a_pil_image_is_taken_as_it_is() -> None:
    picture = PILImage.fromarray(np.full((2, 2, 4), 0, np.uint8), "RGBA")
    assert decode(picture).getpixel((0, 0)) == (255, 255, 255)
    assert picture.mode == "RGBA"


def test_faults_of_an_image(tmp_path: Path) -> None:
    missing = tmp_path / "a.png"
    cases = {
        f'"a.png" does not exist: looked for {missing}. Paths are relative to the data file\'s folder.': str(
            missing
        ),
        '"a.png" is not in an image format that can be read. Save it as PNG or JPEG.': b"hello",
        '"a.png" is broken: image file is truncated (2 bytes not processed). '
        "Save it again, or remove the row.": None,
        '"a.png" is broken: its pixels are not 8 or 16 bits wide. Save it again, or remove the row.': png(
            mode="F", color=0.5, format="TIFF"
        ),
    }
    broken = io.BytesIO()
    PILImage.effect_noise((64, 64), 50).save(broken, "JPEG")
    for text, source in cases.items():
        with pytest.raises(DataError) as error:
            decode(broken.getvalue()[:-300] if source is None else source)
        found = re.sub(r"\(\d+ bytes", "(2 bytes", str(error.value))
        assert found == "t.jsonl:1: image " + text


@pytest.mark.parametrize("size", [(11, 10), (30, 10)])
def test_huge_pictures_are_refused(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow only warns up to twice its limit."""
    data = png(size)
    monkeypatch.setattr(PILImage, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DataError) as error:
        decode(data)
    assert str(error.value) == (
        't.jsonl:1: image "a.png" has more than 100 pixels. Scale it down before training.'
    )


def test_the_examples_of_the_documentation_are_rows() -> None:
    blocks = re.findall(r"```json\n(.*?)```", DOCS.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) >= 4
    for block in blocks:
        assert read(json.loads(block)).messages[-1].role == "assistant"


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_half_a_character_is_refused_and_a_whole_one_is_not(name: str, tmp_path: Path) -> None:
    def read_texts(escape: bytes) -> Conversation:
        row = b'{"prompt": "a' + escape + b'", "completion": "b"}'
        path = tmp_path / name
        path.write_bytes(row if name == "rows.jsonl" else b"[" + row + b"]")
        return open_rows([path])[0]

    grin = "\N{GRINNING FACE}"
    whole = (rb"\ud83d\ude00", grin.encode()), ("\uac00".encode(), "\uac00".encode())
    for escape, text in whole:
        assert read_texts(escape).messages[0].contents == (Text("a" + text.decode()),)
    for half in (rb"\ud83d", rb"\uDE00x", b"\xed\xa0\x80"):
        with pytest.raises(DataError, match="half of a character"):
            read_texts(half)


def test_a_data_url_and_a_role_of_the_wrong_kind_are_named() -> None:
    with pytest.raises(DataError, match=r"images\[0\]: the data: URL is broken"):
        read({"prompt": "<image>", "completion": "A", "image": "data:image/png;base64,\xe9"})
    with pytest.raises(DataError, match=r"conversations\[0\]: role \['human'\] is not one of"):
        read({"conversations": [{"from": ["human"], "value": "Q"}, {"from": "gpt", "value": "A"}]})


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
@pytest.mark.parametrize("value", ["[" * 100_000 + "]" * 100_000, "1" * 5000])
def test_what_python_cannot_hold_is_a_data_error(name: str, value: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(f"[{value}]")
    with pytest.raises(DataError, match="cannot be read"):
        open_rows([path])[0]
