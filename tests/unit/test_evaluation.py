"""Metrics by hand, a user's own function, questions and controls, comparisons: without any model."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import typer

from partwise import cli
from partwise.config import load_config
from partwise.data.sources import open_rows
from partwise.errors import ConfigError, DataError
from partwise.evaluation.comparison import bootstrap_interval, compare, difference_of, mcnemar
from partwise.evaluation.judgement import Asking, Judgement, Sample, join_shares, judge_rows
from partwise.evaluation.judges import load_judges
from partwise.evaluation.metrics import METRICS, best_score, common_length, edit_distance
from partwise.evaluation.questions import BLANK_GRAY, Question, asking_order, read_question
from partwise.records import Conversation

# Each value was worked out by hand from the definition in the paper that the metric names.
VALUES = [
    ("exact_match", "7", "7", 1),
    ("exact_match", " 7\n", "7", 1),
    ("exact_match", "Seven", "seven", 0),
    ("exact_match", "7.", "7", 0),
    ("contains", "It is the Number 7, I think.", "number 7", 1),
    ("contains", "It is the number\n7.", "number 7", 1),
    ("contains", "I know", "no", 1),
    ("contains", "six", "seven", 0),
    # "red cat sat" and "red cat ran fast": 2 shared, precision 2/3, recall 2/4.
    ("token_f1", "The red cat sat.", "a red cat ran fast", 4 / 7),
    ("token_f1", "no no", "no", 2 / 3),
    ("token_f1", "A", "the", 1),
    ("token_f1", "", "red", 0),
    ("token_f1", "blue", "red", 0),
    # Lin 2004, section 3.1: "police kill the gunman" against "police killed the gunman" has 3 of 4 words.
    ("rouge_l", "police kill the gunman", "police killed the gunman", 3 / 4),
    ("rouge_l", "the gunman kill police", "police killed the gunman", 2 / 4),
    ("rouge_l", "Gunman!", "the gunman.", 2 / 3),
    ("rouge_l", "", "red", 0),
    ("rouge_l", "красный круг", "Красный круг.", 1),
    ("anls", "STOP", "stop", 1),
    ("anls", "shop", "stop", 3 / 4),
    ("anls", "soap", "stop", 0),  # two of four letters differ: the distance is not below one half
    ("anls", "stop sign", "stop", 0),
    ("anls", "coca  cola", "Coca Cola", 1),
    ("relaxed_accuracy", "104.9", "100", 1),
    ("relaxed_accuracy", "105.1", "100", 0),
    ("relaxed_accuracy", "-95", "-100", 1),
    ("relaxed_accuracy", "5%", "0.05", 1),
    ("relaxed_accuracy", "5 %", "5", 0),
    ("relaxed_accuracy", "Blue", "blue", 1),
    ("relaxed_accuracy", "0", "0", 1),
    ("relaxed_accuracy", "0.001", "0", 0),
    ("relaxed_accuracy", "nan", "7", 0),
]


@pytest.mark.parametrize(("metric", "answer", "reference", "value"), VALUES)
def test_metrics_have_the_values_of_their_definitions(metric, answer, reference, value):
    assert METRICS[metric](answer, reference) == pytest.approx(value, abs=1e-12)


def test_of_several_references_one_is_enough():
    assert best_score(METRICS["token_f1"], "red cat", ("blue", "red dog", "dog")) == 0.5


def test_edit_distance_and_common_length():
    assert [edit_distance(*pair) for pair in (("kitten", "sitting"), ("", "abc"), ("ab", "ba"))] == [3, 3, 2]
    assert common_length("abcbdab", "bdcaba") == 4


def question(*references: str, **fields) -> Question:
    return Question(0, Conversation((), "rows.jsonl", 3), references, fields)


def write_function(folder: Path, text: str) -> str:
    (folder / "scores.py").write_text(text)
    return f"{folder / 'scores.py'}:score"


def test_a_function_of_the_user_judges(tmp_path):
    metric = write_function(
        tmp_path,
        "LIMIT = 3\ndef score(answer, references, row):\n"
        "    return len(answer) <= LIMIT and row['kind'] == 'short' and references == ['a', 'b']\n",
    )
    judges = load_judges(["exact_match", metric])
    assert list(judges) == ["exact_match", "score"]
    assert judges["score"]("abc", question("a", "b", kind="short")) == 1.0
    assert judges["score"]("abcd", question("a", "b", kind="short")) == 0.0
    plain = write_function(tmp_path, "def score(answer, references): return 0.25\n")
    assert load_judges([plain])["score"]("", question("a")) == 0.25


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def score(answer, references): return 1 / 0", "rows.jsonl:4: .*score raises ZeroDivisionError"),
        ("def score(answer): return 1", "score raises TypeError"),
        ("def score(answer, references): return 'good'", "returns 'good'. It must return a finite number"),
        ("def score(answer, references): return float('nan')", "returns nan"),
    ],
)
def test_a_function_that_fails_names_the_row(text, message, tmp_path):
    judge = load_judges([write_function(tmp_path, text)])["score"]
    with pytest.raises(DataError, match=message):
        judge("answer", question("a"))


def test_metrics_that_are_not_there(tmp_path):
    with pytest.raises(
        ConfigError, match=r'c.yaml:3: "exact_mach" is not a metric. Did you mean "exact_match"'
    ):
        load_judges(["exact_mach"], "c.yaml:3")
    with pytest.raises(ConfigError, match=r"there is no file missing.py"):
        load_judges(["missing.py:score"])
    metric = write_function(tmp_path, "def other(answer, references): return 1\n")
    with pytest.raises(ConfigError, match=r"has no function score. Its functions: other"):
        load_judges([metric])
    with pytest.raises(ConfigError, match=r"scores.py raises NameError"):
        load_judges([write_function(tmp_path, "nothing\n")])
    with pytest.raises(ConfigError, match="anls names two metrics"):
        load_judges(["anls", "anls"])


@pytest.fixture
def rows(tmp_path, make_image):
    """Six rows: four with an image, of which two have the same one, a text-only one, and one of two turns."""
    colors = ["red", "red", "green", "blue"]
    for color in set(colors):
        make_image(color=color).save(tmp_path / f"{color}.png")
    written = [
        {
            "messages": [
                {"role": "user", "content": "<image>Which colour?"},
                {"role": "assistant", "content": color},
            ],
            "images": [f"{color}.png"],
            "kind": "image",
        }
        for color in colors
    ]
    written.append({"prompt": "2 + 2?", "completion": "4", "answers": ["4", "four"]})
    turns = [
        ("system", "Be short."),
        ("user", "Hi"),
        ("assistant", "Ho"),
        ("user", "Bye"),
        ("assistant", "By"),
    ]
    written.append({"messages": [{"role": role, "content": text} for role, text in turns], "answers": "Bye"})
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in written))
    return open_rows([path])


def test_a_question_is_all_before_the_last_answer(rows):
    image, text, talk = (read_question(rows, place, "kind") for place in (0, 4, 5))
    assert (image.references, image.group, image.text) == (("red",), "image", "Which colour?")
    assert (text.references, text.group) == (("4", "four"), "(none)")
    assert talk.references == ("Bye",)
    assert [m.role for m in talk.prompt.messages] == ["system", "user", "assistant", "user"]
    assert talk.text == "system: Be short.\nuser: Hi\nassistant: Ho\nBye"


@pytest.mark.parametrize("answers", [[], 7, [7], {"a": 1}])
def test_answers_must_be_texts(answers, tmp_path):
    row = {"prompt": "a", "completion": "b", "answers": answers}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    with pytest.raises(DataError, match=r'rows.jsonl:1: "answers" is .* not a text or a list of texts'):
        read_question(open_rows([tmp_path / "rows.jsonl"]), 0)


def color_of(conversation: Conversation) -> str:
    """A model that sees: the name of the image's file, or that it is gray."""
    if not conversation.images:
        return "4"
    source = conversation.images[0].source
    return Path(source).stem if isinstance(source, str) else str(source.getpixel((0, 0)))


def test_controls_ask_about_other_images_and_blank_ones(rows):
    seen: list[int] = []

    def answer(conversations):
        seen.append(len(conversations))
        return [color_of(conversation) for conversation in conversations]

    asking = Asking(load_judges(["exact_match"]), batch_size=4, control=True, group_by="kind")
    judgement = judge_rows(answer, rows, asking)
    assert [sample.place for sample in judgement.samples] == list(range(6)) and max(seen) <= 4
    assert judgement.scores == {"exact_match": 5 / 6}
    assert len(judgement.controlled) == 4
    # Another file is another image: never the row's own colour, although two rows are red.
    assert judgement.control_scores == {
        "right": {"exact_match": 1.0},
        "swapped": {"exact_match": 0.0},
        "blank": {"exact_match": 0.0},
    }
    assert judgement.controlled[0].controls["blank"][0] == str(BLANK_GRAY)
    assert {name: len(samples) for name, samples in judgement.groups.items()} == {"(none)": 2, "image": 4}
    record = judgement.samples[0].to_record()
    assert record["controls"]["swapped"]["scores"] == {"exact_match": 0.0} and record["group"] == "image"


def test_ranks_share_the_rows_and_a_sample_is_the_same_for_all(rows):
    asking = Asking(load_judges(["exact_match"]), max_rows=5, batch_size=1)
    answer = lambda conversations: [color_of(c) for c in conversations]  # noqa: E731
    alone = judge_rows(answer, rows, asking)
    shares = [judge_rows(answer, rows, asking, rank, 2) for rank in range(2)]
    assert [len(share.samples) for share in shares] == [3, 2]
    assert join_shares(asking, shares).samples == alone.samples
    assert sorted(asking_order(6, 5, 0)) == [sample.place for sample in alone.samples]
    assert asking_order(1000, 5, 0) != asking_order(1000, 5, 1)


def test_a_budget_ends_between_batches(rows, monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr("partwise.evaluation.judgement.time.monotonic", lambda: float(next(clock)))
    asking = Asking(load_judges(["exact_match"]), batch_size=2, budget_seconds=2.0)
    judgement = judge_rows(lambda asked: ["red"] * len(asked), rows, asking)
    assert (len(judgement.samples), judgement.num_rows) == (2, 6)
    assert len(judge_rows(lambda a: ["red"] * len(a), rows, Asking({}, batch_size=2)).samples) == 6


def test_mcnemar_and_bootstrap():
    assert mcnemar(1, 5) == mcnemar(5, 1) == pytest.approx(2 * 7 / 64)
    assert mcnemar(0, 0) == 1.0 and mcnemar(2, 2) == 1.0
    # 50 rows better by 1, 50 equal: the mean is 0.5 with a standard error of 0.05.
    low, high = bootstrap_interval(np.array([1.0, 0.0] * 50))
    assert low == pytest.approx(0.5 - 1.96 * 0.05, abs=0.012)
    assert high == pytest.approx(0.5 + 1.96 * 0.05, abs=0.012)
    same = difference_of([0.5, 1, 0], [0.5, 1, 0])
    assert (same.low, same.high, same.difference, same.p_value) == (0, 0, 0, None)
    counted = difference_of([1, 0, 0, 0], [0, 1, 1, 0])
    assert (counted.only_base, counted.only_tuned, counted.p_value) == (1, 2, 1.0)
    assert counted.difference == 0.25 and counted.num_rows == 4


def judgement_of(scores: dict[int, float]) -> Judgement:
    samples = [Sample(place, f"row {place}", "?", ("a",), "a", {"m": s}) for place, s in scores.items()]
    return Judgement(("m",), tuple(samples), len(scores), 1.0)


def test_models_are_compared_on_the_rows_that_both_answered():
    found = compare(judgement_of({0: 0, 1: 1, 7: 1}), judgement_of({0: 1, 1: 1, 3: 0}))["m"]
    assert (found.base, found.tuned, found.num_rows) == (0.5, 1.0, 2)
    assert compare(judgement_of({0: 0}), judgement_of({1: 0})) == {}
    assert not math.isnan(found.low)


PAGE = (Path(__file__).parents[2] / "docs/evaluation.md").read_text()


def test_the_page_names_every_metric_option_and_key(tmp_path):
    """What docs/evaluation.md shows is what there is; its config loads and its function judges."""
    section = PAGE[PAGE.index("## Metrics") : PAGE.index("## Does the model look?")]
    assert re.findall(r"^\| `(\w+)` \|", section, re.M) == list(METRICS)
    options = {option for line in re.findall(r"^\| (`--.*?`) \|", PAGE, re.M) for option in line.split(", ")}
    shown = {option.strip("`").split()[0] for option in options}
    parameters = [p for p in typer.main.get_command(cli.app).commands["eval"].params if p.name != "model"]
    elsewhere = {"--trust-remote-code", "--accept-base", "--loss"}
    assert shown - {"--no-loss"} == {parameter.opts[0] for parameter in parameters} - elsewhere

    [block] = re.findall(r"```yaml\n(.*?)```", PAGE, re.S)
    rest = "model: {path: m}\nparts: {projector: full}\noutput: o\n"
    (tmp_path / "c.yaml").write_text(block + rest)
    assert load_config(tmp_path / "c.yaml").evaluate.patience == 5

    [function] = re.findall(r"```python\n(def .*?)```", PAGE, re.S)
    (tmp_path / "scores.py").write_text(function)
    judge = load_judges([f"{tmp_path / 'scores.py'}:is_short"])["is_short"]
    assert judge("a b c", question("a")) == 1.0 and judge("a b c", question("a", limit=2)) == 0.0
