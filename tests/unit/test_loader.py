"""The order of rows, resuming, worker processes, and what a scan counts."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from partwise.data.chat import ChatFormat
from partwise.data.loader import StepLoader, refuse_empty
from partwise.data.scan import scan_rows
from partwise.data.sources import Rows, open_rows
from partwise.errors import DataError
from partwise.model.load import load_model_config, load_processor, media_token_ids
from partwise.records import Batch, StepData

NUM_ROWS = 10
PAD = 0


@pytest.fixture(scope="module")
def chat_format(tiny_folder: Callable[[str], Path]) -> ChatFormat:
    folder = tiny_folder("llava-next")
    processor = load_processor(folder)
    return ChatFormat(processor, media_token_ids(load_model_config(folder), processor), 64, "truncate")


@pytest.fixture(scope="module")
def text_format(tiny_folder: Callable[[str], Path]) -> ChatFormat:
    return ChatFormat(load_processor(tiny_folder("llama")), frozenset(), 64, "truncate")


def write_rows(path: Path, questions: list[str], **keys: object) -> Rows:
    rows = [{"prompt": question, "completion": "A red circle.", **keys} for question in questions]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return open_rows([path])


@pytest.fixture
def text_rows(tmp_path: Path) -> Rows:
    """Questions of different lengths; row i has i words."""
    return write_rows(tmp_path / "rows.jsonl", ["what " * (i + 1) for i in range(NUM_ROWS)])


@pytest.fixture
def mixed_rows(tmp_path: Path, make_image: Callable) -> Rows:
    """Rows with and without images, of different sizes."""
    make_image((56, 56)).save(tmp_path / "square.png")
    make_image((112, 56)).save(tmp_path / "wide.png")
    rows = [{"prompt": "What is this?", "completion": "Nothing."} for _ in range(6)]
    rows[1] |= {"prompt": "<image>\nWhat?", "image": "square.png"}
    rows[4] |= {"prompt": "<image>\nWhat?", "image": "wide.png"}
    path = tmp_path / "mixed.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return open_rows([path])


def loader(rows: Rows, chat_format: ChatFormat, num_workers: int = 0, seed: int = 5, **options) -> StepLoader:
    return StepLoader(
        rows,
        chat_format,
        PAD,
        global_batch_size=4,
        micro_batch_size=2,
        seed=seed,
        num_workers=num_workers,
        **options,
    )


def names(step: StepData) -> list[str]:
    return [row for batch in step.batches for row in batch.rows]


def same_batch(a: Batch, b: Batch) -> bool:
    tensors = [
        ({"input_ids": x.input_ids, "labels": x.labels, "ids": x.document_ids} | x.token_fields | x.media)
        for x in (a, b)
    ]
    return (a.rows, a.num_target_tokens, a.num_input_tokens) == (
        b.rows,
        b.num_target_tokens,
        b.num_input_tokens,
    ) and all(torch.equal(tensors[0][key], tensors[1][key]) for key in tensors[0] | tensors[1])


def same_steps(a: list[StepData], b: list[StepData]) -> bool:
    return [(s.step, s.dropped, len(s.batches)) for s in a] == [
        (s.step, s.dropped, len(s.batches)) for s in b
    ] and all(
        same_batch(x, y) for s, t in zip(a, b, strict=True) for x, y in zip(s.batches, t.batches, strict=True)
    )


def test_each_row_comes_once_per_epoch(text_rows: Rows, text_format: ChatFormat) -> None:
    data = loader(text_rows, text_format)
    assert data.steps_per_epoch == 3
    steps = list(data.iterate(0, 6))
    assert [step.step for step in steps] == list(range(6))
    assert [len(names(step)) for step in steps] == [4, 4, 2, 4, 4, 2]
    every_row = {f"{text_rows.files[0][0]}:{i + 1}" for i in range(NUM_ROWS)}
    epochs = [[name for step in steps[i : i + 3] for name in names(step)] for i in (0, 3)]
    assert set(epochs[0]) == set(epochs[1]) == every_row
    assert epochs[0] != epochs[1]


def test_the_order_depends_on_the_seed_alone(text_rows: Rows, text_format: ChatFormat) -> None:
    orders = [
        [data.step_rows(step) for step in range(9)]
        for data in (
            loader(text_rows, text_format, seed=5),
            loader(text_rows, text_format, seed=5),
            loader(text_rows, text_format, seed=6),
        )
    ]
    assert orders[0] == orders[1] != orders[2]


def test_the_order_is_this_one_for_ever(text_rows: Rows, text_format: ChatFormat) -> None:
    """Another order would change the data of a run that is resumed after an upgrade."""
    data = loader(text_rows, text_format, seed=0)
    assert [data.step_rows(step) for step in range(4)] == [[4, 6, 2, 7], [3, 5, 9, 0], [8, 1], [9, 1, 3, 8]]


def test_without_shuffling_rows_keep_the_order_of_the_file(text_rows: Rows, text_format: ChatFormat) -> None:
    data = loader(text_rows, text_format, shuffle=False)
    assert [data.step_rows(step) for step in range(4)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9], [0, 1, 2, 3]]


@pytest.mark.parametrize("first", [1, 3, 5])
def test_resuming_is_starting_at_another_step(first: int, text_rows: Rows, text_format: ChatFormat) -> None:
    whole = list(loader(text_rows, text_format).iterate(0, 6))
    assert same_steps(list(loader(text_rows, text_format).iterate(first, 6)), whole[first:])


def test_rows_of_like_length_share_a_micro_batch(text_rows: Rows, text_format: ChatFormat) -> None:
    for step in loader(text_rows, text_format).iterate(0, 3):
        lengths = [int((ids >= 0).sum()) for batch in step.batches for ids in batch.document_ids]
        assert lengths == sorted(lengths, reverse=True)
        assert sum(lengths) == sum(batch.num_input_tokens for batch in step.batches)


def test_workers_change_nothing(mixed_rows: Rows, chat_format: ChatFormat) -> None:
    alone = list(loader(mixed_rows, chat_format).iterate(0, 4))
    assert any(batch.media for step in alone for batch in step.batches)
    assert same_steps(list(loader(mixed_rows, chat_format, num_workers=2).iterate(0, 4)), alone)


def test_iterating_leaves_the_random_state_alone(text_rows: Rows, text_format: ChatFormat) -> None:
    """Dropout after an evaluation or a resume would differ otherwise."""
    for num_workers in (0, 1):
        before = torch.get_rng_state()
        list(loader(text_rows, text_format, num_workers).iterate(0, 2))
        assert torch.equal(torch.get_rng_state(), before)


def test_workers_print_nothing(
    mixed_rows: Rows, chat_format: ChatFormat, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    chat_format.processor.tokenizer(["a", "b"])  # after this, a fork makes tokenizers warn
    list(loader(mixed_rows, chat_format, num_workers=2).iterate(0, 2))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_errors_of_workers_reach_the_user(num_workers: int, tmp_path: Path, text_format: ChatFormat) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n', encoding="utf-8")
    data = loader(open_rows([path]), text_format, num_workers)
    with pytest.raises(DataError) as error:
        list(data.iterate(0, 1))
    assert str(error.value) == (
        f'{path}:2: the keys are prompt. A row needs "messages" (a list of role and content), or '
        '"prompt" and '
        '"completion".'
    )


def test_dropped_rows_are_counted(tmp_path: Path, text_format: ChatFormat) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", ["what?", "what " * 80, "what?", "what " * 90])
    (step,) = loader(rows, text_format).iterate(0, 1)
    assert step.dropped == Counter({"no target token": 2})
    assert sorted(names(step)) == [f"{tmp_path}/rows.jsonl:1", f"{tmp_path}/rows.jsonl:3"]


def test_a_step_without_target_token_is_an_error(tmp_path: Path, text_format: ChatFormat) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", ["what " * 80] * 5)
    with pytest.raises(DataError) as error:
        list(loader(rows, text_format, shuffle=False).iterate(1, 2))
    assert str(error.value) == (
        "step 2 has no target token: all of its rows were dropped: no target token (1). The rows are "
        f"{tmp_path}/rows.jsonl:5. Raise data.max_seq_len, or remove these rows."
    )


def ranks(rows: Rows, chat_format: ChatFormat, num_ranks: int, **options) -> list[StepLoader]:
    return [loader(rows, chat_format, rank=r, num_ranks=num_ranks, **options) for r in range(num_ranks)]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
def test_ranks_share_the_rows_that_one_rank_has(
    num_ranks: int, mixed_rows: Rows, chat_format: ChatFormat
) -> None:
    alone = loader(mixed_rows, chat_format)
    together = ranks(mixed_rows, chat_format, num_ranks)
    for step in range(4):
        assert all(data.step_rows(step) == alone.step_rows(step) for data in together)
        shares = [data.rank_rows(step) for data in together]
        assert sorted(row for share in shares for row in share) == sorted(alone.step_rows(step))
        loaded = [names(data.load_step(step)) for data in together]
        assert sorted(row for share in loaded for row in share) == sorted(names(alone.load_step(step)))
        for share, rows in zip(shares, loaded, strict=True):
            assert set(rows) == {f"{mixed_rows.files[0][0]}:{row + 1}" for row in share}


def test_one_rank_has_the_rows_in_the_order_of_the_step(text_rows: Rows, text_format: ChatFormat) -> None:
    data = loader(text_rows, text_format)
    assert [data.rank_rows(step) for step in range(6)] == [data.step_rows(step) for step in range(6)]


def test_images_are_spread_over_ranks(mixed_rows: Rows, chat_format: ChatFormat) -> None:
    """Rows 1 and 4 are those with an image."""
    data = StepLoader(mixed_rows, chat_format, PAD, 6, 1, seed=0, num_workers=0, num_ranks=2)
    assert len({1, 4} & set(data.rank_rows(0))) == 1


def test_a_rank_encodes_its_own_rows_alone(text_rows: Rows, text_format: ChatFormat) -> None:
    encoded = []

    class Format(ChatFormat):
        def __call__(self, conversation):
            encoded.append(conversation.row)
            return super().__call__(conversation)

    chat_format = Format(text_format.processor, frozenset(), 64, "truncate")
    for data in ranks(text_rows, chat_format, 2):
        encoded.clear()
        data.load_step(0)
        assert encoded == data.rank_rows(0) and len(encoded) == 2


def test_shares_are_found_without_decoding_an_image(tmp_path: Path, chat_format: ChatFormat) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", ["<image> what?"] * 4, image="no-such.png")
    assert [len(data.rank_rows(0)) for data in ranks(rows, chat_format, 2)] == [2, 2]


def test_a_rank_may_have_no_row(tmp_path: Path, text_format: ChatFormat) -> None:
    """Two rows on three ranks, of which one gives no example: the dropped one is counted by its own rank."""
    rows = write_rows(tmp_path / "rows.jsonl", ["what?", "what " * 80])
    steps = [data.load_step(0) for data in ranks(rows, text_format, 3)]
    assert sorted(len(step.batches) for step in steps) == [0, 0, 1]
    assert sum((step.dropped for step in steps), Counter()) == Counter({"no target token": 1})


def test_a_step_that_no_rank_has_rows_of_is_refused_with_all_names(
    tmp_path: Path, text_format: ChatFormat
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", ["what " * 80] * 2)
    together = ranks(rows, text_format, 2, shuffle=False)
    dropped = sum((data.load_step(0).dropped for data in together), Counter())
    with pytest.raises(DataError) as error:
        refuse_empty(0, together[1].row_names(0), dropped)
    assert str(error.value) == (
        "step 1 has no target token: all of its rows were dropped: no target token (2). The rows are "
        f"{tmp_path}/rows.jsonl:1, {tmp_path}/rows.jsonl:2. Raise data.max_seq_len, or remove these rows."
    )


def test_a_scan_counts_every_row(mixed_rows: Rows, chat_format: ChatFormat) -> None:
    scan = scan_rows(mixed_rows, chat_format, num_workers=1)
    examples = [chat_format(mixed_rows[i]) for i in range(6)]
    assert scan.lengths.tolist() == [len(example.input_ids) for example in examples]
    assert scan.num_target_tokens == sum(example.num_target_tokens for example in examples)
    assert (scan.num_rows, scan.num_examples, scan.num_images, scan.num_open_answers) == (6, 6, 2, 0)
    assert [end > 0 for end in scan.images_ends] == [False, True, False, False, True, False]
    assert (scan.dropped, scan.errors) == (Counter(), ())


def test_a_scan_collects_faults_and_drops(tmp_path: Path, text_format: ChatFormat) -> None:
    path = tmp_path / "rows.jsonl"
    write_rows(path, ["what?", "what " * 80])
    with path.open("a", encoding="utf-8") as file:
        file.write('{"prompt": "a", "completion": ""}\n{]\n')
    scan = scan_rows(open_rows([path]), text_format)
    assert scan.errors == (
        f"{path}:3: message 1 (assistant) is empty. Give it a text, or remove the row.",
        f"{path}:4: not valid JSON: Expecting property name enclosed in double quotes at column 2. "
        "Each line must be "
        "one JSON object.",
    )
    assert scan.dropped == Counter({"no target token": 1})
    assert (scan.num_rows, len(scan.lengths), scan.num_examples) == (4, 2, 1)
    assert scan.lengths[1] > 64
    assert scan_rows(open_rows([path]), text_format, limit=2).num_rows == 2


def test_a_scan_finds_answers_without_end_token(
    tmp_path: Path, tiny_folder: Callable[[str], Path], text_format: ChatFormat
) -> None:
    processor = load_processor(tiny_folder("llama"))
    processor.chat_template = "{% for m in messages %}{{ m['role'] + ':' + m['content'] + ';' }}{% endfor %}"
    rows = write_rows(tmp_path / "rows.jsonl", ["what?", "and?"])
    assert scan_rows(rows, ChatFormat(processor, frozenset(), 64, "truncate")).num_open_answers == 2
    assert scan_rows(rows, text_format).num_open_answers == 0


def test_steps_for_a_gpu_are_pinned(mixed_rows: Rows, chat_format: ChatFormat, monkeypatch) -> None:
    """All tensors of all micro-batches."""
    step_data = next(step for step in loader(mixed_rows, chat_format).iterate(0, 2) if has_images(step))
    pinned: list[torch.Tensor] = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        pinned.append(tensor.clone())
        return pinned[-1]

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    copied = step_data.pin_memory()
    assert same_steps([copied], [step_data])
    tensors = [t for b in copied.batches for t in (b.input_ids, b.labels, b.document_ids, *b.media.values())]
    assert len(tensors) > 8
    assert {id(tensor) for tensor in tensors} <= {id(tensor) for tensor in pinned}


def has_images(step: StepData) -> bool:
    return any(batch.media for batch in step.batches)


@pytest.mark.parametrize("has_gpu", [True, False])
def test_the_loader_pins_where_there_is_a_gpu(
    has_gpu: bool, text_rows: Rows, text_format: ChatFormat, monkeypatch
) -> None:
    """In a thread of torch's DataLoader, which cannot run without one: so it is only asked here."""
    asked: list[bool] = []

    def ask(*arguments, pin_memory: bool, **options) -> DataLoader:
        asked.append(pin_memory)
        return DataLoader(*arguments, **options)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr("partwise.data.loader.DataLoader", ask)
    next(loader(text_rows, text_format, num_workers=1).iterate(0, 1))
    assert asked == [has_gpu]
