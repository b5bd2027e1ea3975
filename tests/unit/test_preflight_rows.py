"""The checks of rows: each on rows that are right, and on rows with the one fault that it is there for."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import yaml
from PIL import Image as PILImage

from partwise.config import load_config
from partwise.preflight import ROW_CHECKS, Context, check_id, collect_findings, images
from partwise.records import Finding
from partwise.training.job import Job

COLORS = ("red", "green", "blue", "yellow")
Check = Callable[..., list[Finding]]


def chat(number: int, question: str = "<image>Which colour?", answer: str = "red", image: str = "") -> dict:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    names = [image or f"{number}.png"] if "<image>" in question else []
    return {"messages": messages, "images": names}


@pytest.fixture
def check(tmp_path: Path, tiny_folder: Callable[[str], Path], make_image: Callable) -> Check:
    """The findings of all checks of rows, or of those with these ids; `keys` go over the config's."""
    for i, color in enumerate(COLORS):
        make_image(color=color).save(tmp_path / f"{i}.png")

    def run(
        train: Sequence[dict], evaluation: Sequence[dict] = (), only: tuple[str, ...] = (), **keys: object
    ) -> list[Finding]:
        data = {"train": write(tmp_path / "train.jsonl", train), "num_workers": 0}
        if evaluation:
            data["eval"] = write(tmp_path / "eval.jsonl", evaluation)
        model = {"path": str(tiny_folder(keys.pop("family", "gemma3")))}
        if template := keys.pop("chat_template", None):
            (tmp_path / "chat.jinja").write_text(str(template))
            model["chat_template"] = str(tmp_path / "chat.jinja")
        max_rows = keys.pop("max_rows", None)
        config = {"model": model, "parts": {"language_model": "full"}, "data": data | keys, "output": "run"}
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(config))
        checks = [check for check in ROW_CHECKS if not only or check_id(check) in only]
        return collect_findings(Context(Job(load_config(path)), max_rows), checks)

    return run


def write(path: Path, rows: Sequence[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def good_rows() -> list[dict]:
    return [chat(i, answer=color) for i, color in enumerate(COLORS)]


def held_out() -> list[dict]:
    return [chat(0, "<image>Is it red?", "yes")]


def told(findings: list[Finding]) -> list[tuple[str, str]]:
    return [(finding.check, finding.level) for finding in findings]


@pytest.mark.parametrize("family", ["gemma3", "llava", "llava-next", "qwen2-vl", "qwen2.5-vl"])
def test_sound_rows_have_no_warning(check: Check, family: str) -> None:
    found = check(good_rows(), held_out(), family=family)
    assert {finding.level for finding in found} == {"info"}, found
    assert {finding.check for finding in found} == {check_id(check) for check in ROW_CHECKS}
    texts = " ".join(finding.message for finding in found)
    assert "data.train: 4 rows read, 4 images" in texts and "data.eval: 1 row read, 1 image" in texts
    assert "as many as the processor announces" in texts


def test_text_rows_of_a_text_model_have_no_warning(check: Check) -> None:
    found = check([chat(i, f"What is {i}?", f"{i}") for i in range(5)], family="llama")
    assert {finding.level for finding in found} == {"info"}, found
    assert not {"images", "image-tokens", "overlap"} & {finding.check for finding in found}


def test_faults_are_told_by_the_check_of_their_stage(check: Check, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n not a picture")
    faults = {
        "rows": [chat(0) | {"images": []}, chat(0, "Which?") | {"images": ["0.png"]}],
        "template": [chat(0, "<image>a<end_of_turn>b")],
        "images": [chat(0, image="broken.png"), chat(0, image="gone.png")],
    }
    found = check([*good_rows(), *(row for rows in faults.values() for row in rows)])
    errors = [finding for finding in found if finding.level == "error"]
    assert told(errors) == [(name, "error") for name, rows in faults.items() for _ in rows]
    assert [error.message.split(": ")[0].rpartition(":")[2] for error in errors] == ["5", "6", "7", "8", "9"]


def test_only_the_first_faults_are_told_in_full(check: Check) -> None:
    found = check([*good_rows(), *[chat(0, image="gone.png")] * 5], only=("images",))
    errors = [finding.message for finding in found if finding.level == "error"]
    assert len(errors) == 4 and errors[-1] == "data.train: 2 more of the 9 rows read cannot be used"


def test_lengths_are_the_rows_own(check: Check) -> None:
    rows = [chat(i, f"What is {i}?", "one " * (i + 1)) for i in range(100)]
    (found,) = check(rows, only=("lengths",), family="llama")
    values = found.values
    assert values["p50"] < values["p90"] < values["p99"] < values["max"]
    (exact,) = check(rows, only=("overlong",), family="llama", max_seq_len=values["max"])
    assert exact.level == "info" and exact.values["num_cut"] == 0
    (less,) = check(rows, only=("overlong",), family="llama", max_seq_len=values["p99"])
    assert less.level == "info" and less.values["num_cut"] == 1
    assert f"data.max_seq_len {values['p99']} keeps 99 %" in found.message


def test_what_the_limit_costs_is_told_with_the_limit_that_keeps_the_images(check: Check) -> None:
    rows = [*good_rows(), chat(0, "word " * 40 + "<image>"), chat(1, answer="word " * 40)]
    (found,) = check(rows, only=("overlong",), max_seq_len=40)
    assert found.level == "warning" and found.values["dropped"] == {"image would be cut": 1}
    assert found.values["num_cut"] == 1 and "1 of 6 rows (16.7%) are cut" in found.message
    least = found.values["least_max_seq_len_for_images"]
    for limit, reasons in ((least, {"no target token"}), (least - 1, {"image would be cut"})):
        (again,) = check(rows, only=("overlong",), max_seq_len=limit)
        assert set(again.values["dropped"]) == reasons


def test_no_target_token_at_all_is_an_error(check: Check) -> None:
    (found,) = check([chat(i, "word " * 40) for i in range(3)], only=("targets",), max_seq_len=20)
    assert found.level == "error" and "no target token (3)" in found.message and "max_seq_len" in found.fix


def test_a_template_that_repeats_bos_is_a_warning(check: Check) -> None:
    template = (
        "{% for m in messages %}{{ bos_token + m['role'] + ':' + m['content'] + eos_token }}{% endfor %}"
    )
    rows = [chat(i, f"What is {i}?", "one") for i in range(3)]
    (found,) = check(rows, only=("bos",), family="llama", chat_template=template)
    assert found.level == "warning" and "3 of 3 rows" in found.message and "2 times in" in found.message


def test_an_answer_without_its_end_is_a_warning(check: Check) -> None:
    template = "{{ bos_token }}{% for m in messages %}{{ m['role'] + ':' + m['content'] + ';' }}{% endfor %}"
    rows = [chat(i, f"What is {i}?", "one") for i in range(3)]
    (found,) = check(rows, only=("end-of-turn",), family="llama", chat_template=template)
    assert found.level == "warning" and "3 of 3 uncut rows" in found.message


def test_copies_are_rows_with_the_same_tokens_and_pictures(check: Check, tmp_path: Path) -> None:
    (tmp_path / "copy.png").write_bytes((tmp_path / "1.png").read_bytes())
    (found,) = check([*good_rows(), chat(1, answer="green", image="copy.png")], only=("duplicates",))
    assert found.level == "warning" and found.values["num_copies"] == 1
    assert [name.rpartition(":")[2] for name in found.values["first_pair"]] == ["2", "5"]
    (other,) = check([*good_rows(), chat(2, answer="green")], only=("duplicates",))
    assert other.level == "info"
    untrained = chat(1, answer="green")
    untrained["messages"][1]["train"] = False
    assert check([*good_rows(), untrained], only=("duplicates",))[0].level == "info"


def test_a_single_copy_among_many_rows_is_no_warning(check: Check) -> None:
    rows = [chat(i, f"What is {i}?", "one") for i in range(150)]
    (found,) = check([*rows, rows[7]], only=("duplicates",), family="llama")
    assert found.level == "info" and found.values["num_copies"] == 1


def test_evaluation_rows_that_are_trained_on_are_a_warning(check: Check) -> None:
    (found,) = check(good_rows(), [*held_out(), good_rows()[2]], only=("overlap",))
    assert found.level == "warning" and found.values["num_shared"] == 1
    assert [name.rpartition("/")[2] for name in found.values["first_pair"]] == [
        "eval.jsonl:2",
        "train.jsonl:3",
    ]


def test_turned_and_enormous_images_are_counted(
    check: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exif = PILImage.Exif()
    exif[0x0112] = 6
    PILImage.new("RGB", (80, 40), "red").save(tmp_path / "turned.jpg", exif=exif)
    rows = [*good_rows(), chat(0, image="turned.jpg")]
    found = check(rows, only=("images",))
    assert told(found) == [("images", "info")] * 2
    assert "1 image turned" in found[0].message and "train.jsonl:5" in found[0].message
    assert "5 images of 56x56 px to 40x80" in found[1].message
    monkeypatch.setattr(images, "LARGE_PIXELS", 56 * 56)
    (large,) = [finding for finding in check(rows, only=("images",)) if finding.level == "warning"]
    assert large.values["num_large"] == 1 and "the first 40x80 in" in large.message


def test_image_tokens_are_compared_with_what_the_processor_announces(
    check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import Gemma3Processor

    monkeypatch.setattr(
        Gemma3Processor,
        "_get_num_multimodal_tokens",
        lambda self, image_sizes: {"num_image_tokens": [17] * len(image_sizes)},
    )
    (found,) = check(good_rows(), only=("image-tokens",))
    assert found.level == "warning" and "4 instead of 17" in found.message


def test_a_sample_reads_as_many_rows_as_asked(check: Check) -> None:
    rows = [chat(i, f"What is {i}?", "one") for i in range(50)]
    found = check(rows, rows[:20], only=("rows",), family="llama", max_rows=10)
    assert [finding.values.get("num_rows") for finding in found[:2]] == [10, 10]
    assert "data.train: 10 of 50 rows read" in found[0].message
