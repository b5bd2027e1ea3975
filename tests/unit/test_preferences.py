"""Rows that say which answer is better: their shapes, their faults, and that pairs are never parted."""

from __future__ import annotations

import json

import pytest

from partwise.data.packing import PackFormat
from partwise.data.sources import OtherAnswers, open_rows
from partwise.errors import DataError
from partwise.records import Image, Text

QUESTION = {"role": "user", "content": "Which?"}
GOOD, BAD = {"role": "assistant", "content": "good"}, {"role": "assistant", "content": "bad"}


def told(conversation):
    """(role, text, whether it trains) of each message."""
    return [
        (m.role, "".join(c.text if isinstance(c, Text) else "<image>" for c in m.contents), m.train)
        for m in conversation.messages
    ]


@pytest.fixture
def write_rows(tmp_path):
    def write(*rows, shape="pairs"):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return open_rows([path], shape)

    return write


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Which?", "chosen": "good", "rejected": "bad"},
        {"prompt": [QUESTION], "chosen": [GOOD], "rejected": [BAD]},
        {"messages": [QUESTION], "chosen": GOOD, "rejected": BAD},
        {"chosen": [QUESTION, GOOD], "rejected": [QUESTION, BAD]},
        {
            "conversations": [{"from": "human", "value": "Which?"}],
            "chosen": {"from": "gpt", "value": "good"},
            "rejected": {"from": "gpt", "value": "bad"},
        },
    ],
    ids=["texts", "lists", "messages", "implicit prompt", "sharegpt"],
)
def test_shapes_of_pairs_say_the_same(row, write_rows):
    rows = write_rows(row)
    assert len(rows) == 2 and rows.per_row == 2
    chosen, rejected = rows
    assert told(chosen) == [("user", "Which?", False), ("assistant", "good", True)]
    assert told(rejected) == [("user", "Which?", False), ("assistant", "bad", True)]
    assert (chosen.side, rejected.side) == ("chosen", "rejected")
    assert (chosen.row, rejected.row) == (0, 0)


def test_earlier_answers_are_read_and_not_trained(write_rows):
    shared = [QUESTION, GOOD, {"role": "user", "content": "And now?"}]
    for row in (
        {"chosen": [*shared, GOOD], "rejected": [*shared, BAD]},
        {"prompt": shared, "chosen": "good", "rejected": "bad"},
    ):
        chosen, rejected = write_rows(row)
        assert [train for _, _, train in told(chosen)] == [False, False, False, True]
        assert told(rejected)[-1] == ("assistant", "bad", True)


def test_equal_answers_still_end_in_an_answer(write_rows):
    chosen, rejected = write_rows({"chosen": [QUESTION, GOOD], "rejected": [QUESTION, GOOD]})
    assert told(chosen) == told(rejected) == [("user", "Which?", False), ("assistant", "good", True)]


def test_images_of_the_prompt_stand_in_both(write_rows):
    row = {"prompt": "<image>Which?", "chosen": "good", "rejected": "bad", "images": ["a.png"]}
    for conversation in write_rows(row):
        (image,) = conversation.images
        assert isinstance(image, Image) and image.where == "a.png"


FAULTS = [
    ({"prompt": "a", "chosen": "b"}, '"rejected" is missing or empty'),
    ({"prompt": "a", "chosen": "", "rejected": "b"}, '"chosen" is missing or empty'),
    ({"messages": [QUESTION, GOOD]}, '"chosen" is missing .* set objective.loss: sft'),
    ({"chosen": "a", "rejected": "b"}, "there is no prompt, and the two answers do not begin alike"),
    (
        {"prompt": "a", "messages": [QUESTION], "chosen": "a", "rejected": "b"},
        "given as prompt and as messages",
    ),
    ({"prompt": "a", "chosen": 3, "rejected": "b"}, '"chosen" is a int, not a text, a message or a list'),
    ({"prompt": "a", "chosen": [QUESTION], "rejected": "b"}, "does not end in an assistant message"),
    (
        {"prompt": "a", "chosen": "<image>", "rejected": "b", "images": ["a.png"]},
        "an answer holds an image or <image>, but images belong to the prompt",
    ),
    ({"prompt": "<image>a", "chosen": "c", "rejected": "b"}, "0 images given, 1 <image> in the messages"),
    ([1], "the row is a list, not an object"),
]


@pytest.mark.parametrize(("row", "text"), FAULTS)
def test_faults_of_a_pair_name_file_and_line(row, text, write_rows):
    rows = write_rows({"prompt": "a", "chosen": "b", "rejected": "c"}, row)
    with pytest.raises(DataError, match=f"rows.jsonl:2: .*{text}"):
        rows[3]


def test_labels(write_rows):
    rows = write_rows(
        {"prompt": "a", "completion": "good", "label": True},
        {"messages": [QUESTION, GOOD, QUESTION, BAD], "label": False},
        {"prompt": "c", "completion": "fair", "label": True},
        {"prompt": "d", "completion": "poor", "label": False},
        shape="labels",
    )
    assert [conversation.side for conversation in rows] == ["chosen", "rejected", "chosen", "rejected"]
    assert told(rows[1]) == [
        *(("user", "Which?", False), ("assistant", "good", False)),
        *(("user", "Which?", False), ("assistant", "bad", True)),
    ]
    others = OtherAnswers(rows)
    assert [told(others[i])[-1][1] for i in range(4)] == ["fair", "poor", "good", "bad"]
    assert told(others[0])[0] == ("user", "a", False) and others[0].side == "other"


@pytest.mark.parametrize(
    ("label", "text"), [(1, "is 1, not true or false"), ("true", "is 'true', not"), (None, "is missing")]
)
def test_a_label_is_true_or_false(label, text, write_rows):
    rows = write_rows({"prompt": "a", "completion": "b", "label": label}, shape="labels")
    with pytest.raises(DataError, match=f'rows.jsonl:1: "label" {text}.*objective.loss kto'):
        rows[0]


@pytest.fixture
def pair_loader(write_rows, tiny_folder):
    from partwise.data.chat import ChatFormat
    from partwise.data.loader import StepLoader
    from partwise.model.load import load_processor

    def make(max_seq_len=64, overlong="drop", packs=None, **options):
        rows = write_rows(
            *(
                {
                    "prompt": f"number {i}",
                    "chosen": "good " * (1 + i % 3),
                    "rejected": "bad " * (1 + 40 * (i == 4)),
                }
                for i in range(7)
            )
        )
        chat_format = ChatFormat(load_processor(tiny_folder("llama")), frozenset(), max_seq_len, overlong)
        return StepLoader(rows, chat_format, 0, 4, 1, 0, 0, packs=packs, per_row=2, **options)

    return make


@pytest.mark.parametrize("packs", [None, PackFormat(128)], ids=["padded", "packed"])
def test_answers_of_a_pair_come_together_and_chosen_first(pair_loader, packs):
    loader = pair_loader(packs=packs)
    assert loader.steps_per_epoch == 2
    steps = list(loader.iterate(0, 2))
    seen = [batch.sides for step in steps for batch in step.batches]
    assert all(sides == ("chosen", "rejected") * (len(sides) // 2) for sides in seen)
    assert sum(len(sides) for sides in seen) == 12  # one pair of seven is too long
    assert steps[0].dropped + steps[1].dropped == {"too long": 1}
    counts = steps[0].counts
    assert counts["chosen"] == counts["rejected"] and counts["chosen tokens"] > counts["chosen"]
    assert len(steps[0].rows) == counts["chosen"]


def test_ranks_share_pairs_and_references_stay_with_their_answers(pair_loader):
    def answers(loader):
        loader.references = [10.0 * i for i in range(14)]
        return [
            (row, side, reference)
            for step in loader.iterate(0, 2)
            for batch in step.batches
            for row, sides, references in [(batch.rows, batch.sides, batch.references)]
            for side, reference in zip(sides, references, strict=True)
        ]

    alone = answers(pair_loader())
    shared = [one for rank in range(2) for one in answers(pair_loader(rank=rank, num_ranks=2))]
    assert sorted(alone) == sorted(shared) and len(alone) == 12
    for (line,), side, reference in alone:  # micro-batches of one pair
        number = int(line.rpartition(":")[2]) - 1
        assert reference == 10.0 * (2 * number + (side == "rejected"))
