"""Data files -> Rows, a sequence of Conversations that is read row by row.

In: paths of .jsonl, .json or .parquet files. Out: `rows[i]`, read when it is asked for. A .jsonl file
keeps an index of byte offsets, a parquet file the row groups it last read; only .json is held in memory.
Rows may be sent to other processes. Nothing is tokenised or decoded here.
"""

from __future__ import annotations

import bisect
import itertools
import json
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from partwise.config.objective import Shape
from partwise.data.documents import read_document
from partwise.data.preferences import read_labelled, read_pair, with_answer_of
from partwise.data.rows import read_conversation, row_name
from partwise.errors import DataError
from partwise.records import Conversation

PARQUET_CACHE_BYTES = 1 << 30

# What a line holds if it holds half of a character (a lone surrogate), escaped or as bytes.
SURROGATE_MARKS = (b"\\ud", b"\\uD", b"\xed")


class RowFile(Protocol):
    """One data file: `read(i)` gives (number, row), where number is how errors count the row, from zero."""

    def __len__(self) -> int: ...
    def read(self, index: int) -> tuple[int, Any]: ...


def has_surrogate_marks(content: bytes) -> bool:
    return any(mark in content for mark in SURROGATE_MARKS)


def require_characters(row: Any, name: str) -> None:
    """Raises: DataError where a text of the row holds half of a character, which no tokenizer takes."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise DataError(
            f"{name}: holds {half!a}, which is half of a character. Write the text again as UTF-8, or remove "
            "the row."
        ) from None


class JsonLines:
    """A .jsonl file. Blank lines are skipped, and still count as lines."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.offsets = array("q")
        self.lines = array("q")
        offset = 0
        with Path(path).open("rb") as file:
            for number, line in enumerate(file):
                if line.strip():
                    self.offsets.append(offset)
                    self.lines.append(number)
                offset += len(line)

    def __len__(self) -> int:
        return len(self.offsets)

    def read(self, index: int) -> tuple[int, Any]:
        number = self.lines[index]
        with Path(self.path).open("rb") as file:
            file.seek(self.offsets[index])
            line = file.readline()
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{row_name(self.path, number)}: not valid JSON: {error.msg} at column {error.colno}. "
                "Each line must be one JSON object."
            ) from None
        except UnicodeDecodeError as error:
            raise DataError(f"{row_name(self.path, number)}: not UTF-8: {error}. Save it as UTF-8.") from None
        except (RecursionError, ValueError) as error:  # nested too deeply; a number of thousands of digits
            name = row_name(self.path, number)
            raise DataError(f"{name}: cannot be read: {error}. Mend or remove the row.") from None
        if has_surrogate_marks(line):
            require_characters(row, row_name(self.path, number))
        return number, row


class JsonArray:
    """A .json file: one array of rows."""

    def __init__(self, path: str) -> None:
        self.path = path
        content = Path(path).read_bytes()
        self.is_suspect = has_surrogate_marks(content)
        try:
            self.rows = json.loads(content)
        except json.JSONDecodeError as error:
            hint = (
                "For one object per line, name the file .jsonl."
                if error.msg == "Extra data"
                else "Mend the file."
            )
            raise DataError(f"{path}:{error.lineno}: not valid JSON: {error.msg}. {hint}") from None
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not UTF-8: {error}. Save it as UTF-8.") from None
        except (RecursionError, ValueError) as error:
            raise DataError(f"{path}: cannot be read: {error}. Mend the file.") from None
        if not isinstance(self.rows, list):
            raise DataError(
                f"{path}: holds a {type(self.rows).__name__}, not a list. Write the rows as one JSON list."
            )

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, index: int) -> tuple[int, Any]:
        if self.is_suspect:
            require_characters(self.rows[index], row_name(self.path, index))
        return index, self.rows[index]


class Parquet:
    """A .parquet file. A process keeps the row groups it last read, up to PARQUET_CACHE_BYTES."""

    def __init__(self, path: str) -> None:
        import pyarrow
        import pyarrow.parquet

        self.path = path
        try:
            metadata = pyarrow.parquet.read_metadata(path)
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise DataError(
                f"{path}: not a parquet file that can be read: {error}. Write it again."
            ) from None
        groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
        self.group_bytes = [group.total_byte_size for group in groups]
        self.ends = list(itertools.accumulate(group.num_rows for group in groups))
        self.tables: dict[int, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "tables": {}}

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def read(self, index: int) -> tuple[int, Any]:
        group = bisect.bisect_right(self.ends, index)
        first = self.ends[group - 1] if group else 0
        return index, self._table(group).slice(index - first, 1).to_pylist()[0]

    def _table(self, group: int) -> Any:
        """The row group, most recently used last; the oldest ones make room for it."""
        import pyarrow.parquet

        table = self.tables.pop(group, None)
        if table is None:
            room = PARQUET_CACHE_BYTES - self.group_bytes[group]
            while self.tables and sum(self.group_bytes[i] for i in self.tables) > room:
                del self.tables[next(iter(self.tables))]
            with pyarrow.parquet.ParquetFile(self.path) as file:
                table = file.read_row_group(group)
        self.tables[group] = table
        return table


READERS: dict[str, Callable[[str], RowFile]] = {".jsonl": JsonLines, ".json": JsonArray, ".parquet": Parquet}


class Rows(Sequence[Conversation]):
    """The rows of all files, one file after the other: a conversation for each, or one for each answer.

    Of pairs, row i stands at 2 * i with its chosen answer and at 2 * i + 1 with the rejected one.
    """

    def __init__(self, files: Sequence[tuple[str, RowFile]], shape: Shape = "chats") -> None:
        self.files = files
        self.ends = list(itertools.accumulate(len(file) for _, file in files))
        self.shape = shape
        self.per_row = 2 if shape == "pairs" else 1

    @property
    def num_rows(self) -> int:
        """Rows of the data."""
        return self.ends[-1]

    def __len__(self) -> int:
        return self.num_rows * self.per_row

    def __getitem__(self, index: int) -> Conversation:  # type: ignore[override]
        """The conversation of one row or answer. Raises: DataError that names file and line."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        index, answer = divmod(index, self.per_row)
        path, number, row = self.read(index)
        return READS[self.shape](row, path, number)[answer]

    def read(self, index: int) -> tuple[str, int, Any]:
        """The file, the number in it, and one row of the data. Raises: DataError that names file and line."""
        position = bisect.bisect_right(self.ends, index)
        path, file = self.files[position]
        number, row = file.read(index - (self.ends[position] - len(file)))
        return path, number, row


# What one row of each shape gives: always as many conversations.
READS: dict[Shape, Callable[[Any, str, int], tuple[Conversation, ...]]] = {
    "chats": lambda row, path, number: (read_conversation(row, path, number),),
    "texts": lambda row, path, number: (read_document(row, path, number),),
    "pairs": read_pair,
    "labels": lambda row, path, number: (read_labelled(row, path, number),),
}


class OtherAnswers(Sequence[Conversation]):
    """For each labelled row its prompt with the answer of a row half the data away.

    Neighbours are often two answers to the same prompt.
    """

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Conversation:  # type: ignore[override]
        """Raises: DataError that names the row."""
        return with_answer_of(self.rows[index], self.rows[(index + len(self) // 2) % len(self)])


def open_rows(files: Sequence[str | Path], shape: Shape = "chats") -> Rows:
    """The rows of `files`, which must have this shape.

    Raises:
        DataError: no file is given, or one is missing, empty, broken or of an unknown kind.
    """
    if not files:
        raise DataError("no data file is given. Name one or more .jsonl, .json or .parquet files.")
    return Rows([(str(path), _open_file(str(path))) for path in files], shape)


def _open_file(path: str) -> RowFile:
    reader = READERS.get(Path(path).suffix)
    if reader is None:
        raise DataError(f"{path}: the ending is not one of {', '.join(READERS)}. Convert or rename the file.")
    if not Path(path).is_file():
        raise DataError(f"{path}: the data file does not exist. Paths are relative to the working directory.")
    file = reader(path)
    if not len(file):
        raise DataError(f"{path}: the data file has no rows. Add rows, or take it off the list.")
    return file
