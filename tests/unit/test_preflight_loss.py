"""The first loss judged: trained models are broken one way at a time, and the doctor must name that way."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AttentionInterface

from partwise.config import load_config
from partwise.data.collate import collate
from partwise.preflight import Context
from partwise.preflight.doctor import attention, diagnose, float32_weights, put_first, try_attention
from partwise.preflight.loss import check_loss, judge_images, judge_loss, usable_rows
from partwise.preflight.measure import (
    Patient,
    change_pixels,
    has_learned,
    keep_tokens,
    kind_losses,
    mean_loss,
    token_kinds,
    training_loss,
    unigram_entropy,
    with_labels,
)
from partwise.preflight.patient import make_patient, micro_batches
from partwise.records import IGNORE_INDEX, Example, Finding
from partwise.training import step
from partwise.training.job import Job
from partwise.training.step import batch_loss_sum

FAMILIES = ("gemma3", "gemma3-text", "llava", "llava-next", "qwen2-vl", "qwen2.5-vl", "llama")
COLORS = ("red", "green", "blue", "yellow")
ANSWERS = ("the sky is blue", "grass is green", "snow is white and cold", "coal is black as the night")
MakeContext = Callable[..., Context]


def write_rows(folder: Path, has_images: bool) -> Path:
    rows: list[dict[str, Any]] = []
    for i, (color, answer) in enumerate(zip(COLORS, ANSWERS, strict=True)):
        row: dict[str, Any] = {"prompt": f"tell me of thing {i}", "completion": answer}
        if has_images:
            Image.new("RGB", (28, 28), color).save(folder / f"{color}.png")
            row = {"prompt": "<image>which color?", "completion": color[0], "image": f"{color}.png"}
        rows.append(row)
    path = folder / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


@pytest.fixture(scope="session")
def open_context(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Callable[[str], Path]) -> MakeContext:
    def make(family: str, **model: object) -> Context:
        folder = tmp_path_factory.mktemp(family)
        has_images = family not in ("llama", "gemma3-text")
        parts = {"vision_tower": "full", "projector": "full"} if has_images else {}
        config = {
            "model": {"path": str(tiny_folder(family)), "dtype": "float32", **model},
            "parts": {**parts, "language_model": "full"},
            "data": {"train": str(write_rows(folder, has_images)), "max_seq_len": 256, "num_workers": 0},
            "train": {"steps": 4, "global_batch_size": 4, "micro_batch_size": 4},
            "output": str(folder / "run"),
        }
        (folder / "config.yaml").write_text(json.dumps(config))
        return Context(Job(load_config(folder / "config.yaml")), max_rows=32)

    return make


def learned(context: Context) -> Patient:
    """The context's model after it has learned the rows by heart."""
    patient = make_patient(context, usable_rows(context))
    learn(patient)
    return patient


def learn(patient: Patient, num_steps: int = 120) -> None:
    model, batch = patient.model, collate(patient.examples, patient.pad_token_id)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=3e-3)
    for _ in range(num_steps):
        loss = batch_loss_sum(model, batch, patient.device) / batch.num_target_tokens
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss.item() < 0.02:
            break
    assert mean_loss(patient) < 0.1
    model.zero_grad(set_to_none=True)


@pytest.fixture(scope="session")
def reader_context(open_context: MakeContext) -> Context:
    return open_context("llama")


@pytest.fixture(scope="session")
def _reader(reader_context: Context) -> Patient:
    return learned(reader_context)


@pytest.fixture(scope="session")
def _seer(open_context: MakeContext) -> Patient:
    return learned(open_context("gemma3"))


@pytest.fixture
def reader(_reader: Patient) -> Patient:
    """A text model that knows its rows; a copy, to be broken."""
    return replace(_reader, model=deepcopy(_reader.model))


@pytest.fixture
def seer(_seer: Patient) -> Patient:
    """A model that knows the colors of its images; a copy, to be broken."""
    return replace(_seer, model=deepcopy(_seer.model))


def judged(patient: Patient) -> Finding:
    (finding,) = judge_loss(patient, unigram_entropy(patient.examples))
    return finding


def changed(patient: Patient, change: Callable[[Example], Example]) -> Patient:
    examples = tuple(change(example) for example in patient.examples)
    return replace(patient, examples=examples, micro_batches=micro_batches(examples, 1, patient.pad_token_id))


def all_labels(example: Example) -> Example:
    labels = example.input_ids.clone()
    labels[0] = IGNORE_INDEX
    return with_labels(example, labels)


def assert_named(patient: Patient, words: str) -> None:
    """The cause stands in the text, with the loss before and after."""
    finding = judged(patient)
    assert finding.level == "warning" and words in finding.message, finding.message
    assert finding.values["loss_after"] < 0.2 and finding.fix
    assert re.search(rf"{words}.*: (\d+\.\d+|nan|inf) became 0\.\d+ with that undone", finding.message)


@pytest.mark.parametrize("family", FAMILIES)
def test_random_weights_give_no_alarm(open_context: MakeContext, family: str) -> None:
    findings = check_loss(open_context(family))
    assert [finding.level for finding in findings] == ["info"] * len(findings)
    assert "starts from random weights" in findings[0].message
    assert abs(findings[0].values["loss"] - findings[0].values["uniform"]) < 1
    assert len(findings) == (1 if family in ("llama", "gemma3-text") else 2)


def test_the_numbers_are_those_of_the_definitions(reader: Patient) -> None:
    labels = torch.tensor([IGNORE_INDEX, 5, 5, 5, 7])
    example = replace(with_labels(reader.examples[0], labels), input_ids=labels.clamp(min=0), token_fields={})
    expected = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert unigram_entropy([example]) == pytest.approx(expected)
    batch = collate(reader.examples, reader.pad_token_id)
    with torch.no_grad():
        together = batch_loss_sum(reader.model.eval(), batch, reader.device).item() / batch.num_target_tokens
    assert mean_loss(reader) == pytest.approx(together, rel=1e-4)


def test_a_trained_model_on_its_own_rows_is_well(reader: Patient, seer: Patient) -> None:
    for patient in (reader, seer):
        assert has_learned(patient.model)
        assert judged(patient).level == "info"
        assert diagnose(patient, mean_loss(patient)) == []


def needs_one_bos(patient: Patient) -> Patient:
    """As Gemma does, the model loses itself where BOS is missing or doubled."""

    def embed(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        is_bos = inputs[0][0, :2] == patient.bos_token_id
        return output if is_bos.tolist() == [True, False] else output.flip(-1)

    patient.model.get_input_embeddings().register_forward_hook(embed)
    return replace(patient, answers=None)


def test_a_missing_bos_is_named(reader: Patient) -> None:
    patient = needs_one_bos(reader)
    assert judged(patient).level == "info"
    broken = changed(patient, lambda e: keep_tokens(e, torch.arange(len(e.input_ids)) > 0))
    assert_named(broken, "the rows begin without BOS")


def test_a_doubled_bos_is_named(reader: Patient) -> None:
    broken = changed(needs_one_bos(reader), lambda e: put_first(e, int(e.input_ids[0])))
    assert_named(broken, "the rows begin with more than one BOS")


def test_labels_that_were_shifted_are_named(reader: Patient) -> None:
    for by in (-1, 1):
        assert_named(
            changed(reader, lambda e, by=by: with_labels(e, e.labels.roll(by))),
            "the labels are shifted already",
        )


def test_prompts_among_the_labels_are_named(reader: Patient) -> None:
    broken = changed(reader, all_labels)
    assert mean_loss(broken) > 1
    named = [trial.cause for trial in diagnose(broken, mean_loss(broken))]
    assert named[0] == "tokens of the prompts are labels"


def test_image_tokens_among_the_labels_are_named(seer: Patient) -> None:
    media = torch.tensor(sorted(seer.media_ids))

    def with_media(e: Example) -> Example:
        return with_labels(e, e.input_ids.where(torch.isin(e.input_ids, media), e.labels))

    assert_named(changed(seer, with_media), "image tokens are labels")


def test_a_loss_times_the_micro_batches_is_named(reader: Patient, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the means of the micro-batches are added and not averaged."""
    patient = replace(changed(reader, all_labels), answers=None)
    loss = mean_loss(patient)
    assert training_loss(patient) == pytest.approx(loss, rel=1e-4)
    assert diagnose(patient, loss) == []
    monkeypatch.setattr(step, "batch_loss_sum", lambda *arguments: 4 * batch_loss_sum(*arguments))
    (trial,) = diagnose(patient, loss)
    assert "multiplies the loss by its 4 micro-batches" in trial.cause
    assert (trial.before, trial.after) == (pytest.approx(4 * loss, rel=1e-4), loss)


def test_control_tokens_that_the_model_never_met_are_named(open_context: MakeContext) -> None:
    """A base model with a chat template: it has learned the rows without the control tokens."""
    patient = make_patient(context := open_context("llama"), usable_rows(context))
    marks = torch.tensor(sorted(patient.special_ids - {patient.bos_token_id}))
    bare = changed(patient, lambda e: keep_tokens(e, ~torch.isin(e.input_ids, marks)))
    learn(bare)

    def embed(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output.flip(-1) if torch.isin(inputs[0], marks).any() else output

    patient.model.get_input_embeddings().register_forward_hook(embed)
    assert_named(patient, "the model does not know the chat template's control tokens")


@pytest.fixture
def wrong_attention() -> Iterator[str]:
    def attend(module: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> Any:
        groups = query.shape[1] // value.shape[1]
        return -8 * value.flip(-1).repeat_interleave(groups, 1).transpose(1, 2).contiguous(), None

    AttentionInterface.register("wrong", attend)
    yield "wrong"
    AttentionInterface._global_mapping.pop("wrong")


def test_a_wrong_attention_is_named(reader: Patient, wrong_attention: str) -> None:
    reader.model.set_attn_implementation(wrong_attention)
    reader = replace(reader, micro_batches=())  # packs are not run by other attention
    assert_named(reader, "attention by wrong is not what eager gives")
    assert reader.model.config._attn_implementation == wrong_attention


def test_attention_is_put_back_in_every_part(seer: Patient) -> None:
    config = seer.model.config
    seer.model.set_attn_implementation({"text_config": "eager"})
    before = (config.text_config._attn_implementation, config.vision_config._attn_implementation)
    assert before == ("eager", "sdpa")
    with attention(seer.model, "eager"):
        assert config.vision_config._attn_implementation == "eager"
    assert (config.text_config._attn_implementation, config.vision_config._attn_implementation) == before


def test_a_model_with_one_attention_is_not_tried_with_another(
    reader: Patient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(implementation: str | dict) -> None:
        if implementation == "eager":
            raise ValueError("this model has no eager attention")

    monkeypatch.setattr(reader.model, "set_attn_implementation", refuse)
    assert list(try_attention(reader, mean_loss(reader))) == []


def needs_normalised_pixels(patient: Patient) -> None:
    """A model whose tower makes sense of pixels between -1 and 1 only; solid colors are too easy to read."""

    def embed(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        is_normal = -1.01 < inputs[0].min() < -0.5 and inputs[0].max() < 1.01
        return output if is_normal else -8 * output.flip(-1)

    tower = patient.model.get_encoder("image")
    next(m for m in tower.modules() if isinstance(m, torch.nn.Conv2d)).register_forward_hook(embed)


@pytest.mark.parametrize(
    ("words", "spoil"),
    [("divided by 255 they", lambda x: x * 255), ("normalised once more", lambda x: x * 0.5 + 0.5)],
    ids=["not scaled", "not normalised"],
)
def test_wrong_pixels_are_named(seer: Patient, words: str, spoil: Callable[..., torch.Tensor]) -> None:
    needs_normalised_pixels(seer)
    assert diagnose(seer, mean_loss(seer)) == []
    broken = changed(seer, lambda e: change_pixels(e, spoil))
    best = diagnose(broken, mean_loss(broken))[0]
    assert words in best.cause and best.after < 0.1


def test_pixels_scaled_twice_are_named(seer: Patient) -> None:
    broken = changed(seer, lambda e: change_pixels(e, lambda x: x / 255))
    best = diagnose(broken, mean_loss(broken))[0]
    assert "multiplied by 255" in best.cause and best.after < 0.1


def test_a_head_that_lost_its_tie_is_named(seer: Patient) -> None:
    head = seer.model.get_output_embeddings()
    head.weight = torch.nn.Parameter(torch.randn_like(head.weight) * 0.02)
    assert_named(seer, "the output head is not the one that was trained")


def test_an_overflow_in_half_precision_is_named(reader: Patient) -> None:
    """The same function in float32: what up_proj gains, down_proj takes back; float16 ends at 65504."""
    factor = 2.0**16
    for layer in reader.model.get_decoder().layers:
        layer.mlp.up_proj.weight.data *= factor
        layer.mlp.down_proj.weight.data /= factor
    assert mean_loss(reader) < 0.2
    reader.model.half()
    before = {name: tensor.clone() for name, tensor in reader.model.state_dict().items()}
    finding = judged(reader)
    assert "float16 is too coarse or too narrow" in finding.message and finding.level == "warning"
    assert all(torch.equal(tensor, before[name]) for name, tensor in reader.model.state_dict().items())


def test_float32_is_a_loan(reader: Patient) -> None:
    reader.model.bfloat16()
    before = {name: p.clone() for name, p in reader.model.named_parameters()}
    with float32_weights(reader.model):
        assert {p.dtype for p in reader.model.parameters()} == {torch.float32}
    for name, parameter in reader.model.named_parameters():
        assert parameter.dtype == torch.bfloat16 and torch.equal(parameter, before[name])


OTHER_TEMPLATE = """
{%- for m in messages %}{% if m.role == "assistant" %}It says: {% generation %}{{ m.content }}
{%- endgeneration %}{% else %}### {{ m.content }}
{% endif %}{% endfor %}"""
NO_TEMPLATE = """
{%- for m in messages %}{% if m.role == "assistant" %}{% generation %}{{ m.content }}{% endgeneration %}
{%- else %}{{ m.content }}{% endif %}{% endfor %}"""
PROMPTS_AS_ANSWERS = """
{{- bos_token }}{% generation %}
{%- for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}{% endgeneration %}"""


@pytest.fixture
def check_template(
    reader: Patient, open_context: MakeContext, tmp_path: Path
) -> Callable[[str], tuple[Finding, Patient]]:
    """The finding on the reader's model and rows, written by another chat template."""

    def check(template: str) -> tuple[Finding, Patient]:
        (tmp_path / "other.jinja").write_text(template)
        context = open_context("llama", chat_template=str(tmp_path / "other.jinja"))
        context.loaded.model.load_state_dict(reader.model.state_dict())
        return check_loss(context)[0], make_patient(context, usable_rows(context))

    return check


@pytest.mark.parametrize("template", [OTHER_TEMPLATE, NO_TEMPLATE], ids=["swapped", "missing"])
def test_another_chat_template_than_the_models_own_is_named(
    check_template: Callable[[str], tuple[Finding, Patient]], template: str
) -> None:
    finding, _ = check_template(template)
    assert finding.level == "warning", finding.message
    assert "with the chat template of the model folder" in finding.message
    assert finding.values["loss_after"] < 0.1 < finding.values["loss"]


def test_a_template_that_marks_prompts_as_generations_is_named(
    check_template: Callable[[str], tuple[Finding, Patient]],
) -> None:
    finding, patient = check_template(PROMPTS_AS_ANSWERS)
    num_labels = sum(int((example.labels != IGNORE_INDEX).sum()) for example in patient.examples)
    assert patient.answers is not None and 0 < sum(int(mask.sum()) for mask in patient.answers) < num_labels
    causes = [trial.cause for trial in diagnose(patient, finding.values["loss"])]
    assert "tokens of the prompts are labels" in causes


def test_the_loss_is_split_by_kind_of_token(reader: Patient, seer: Patient) -> None:
    example = reader.examples[0]
    kinds = token_kinds(reader, example, reader.answers[0])
    assert sum(mask.long() for mask in kinds.values()).tolist() == [1] * len(example.input_ids)
    answer = sum(int(kinds[f"{which} of the answer"].sum()) for which in ("first", "rest", "end"))
    assert answer == example.num_target_tokens
    assert int(kinds["first of the answer"].sum()) == int(kinds["end of the answer"].sum()) == 1
    assert not kinds["image"].any()

    healthy = judged(reader)
    assert "by kind of token" not in healthy.message
    values = healthy.values["by_token"]
    assert values["rest of the answer"] < 0.2 < 2 < values["prompt"]
    labelled = changed(seer, all_labels)
    assert kind_losses(labelled)["image"] > 2
    finding = judged(labelled)
    assert re.search(r"by kind of token: image \d+\.\d\d, control \d+\.\d\d, prompt", finding.message)


def test_a_trained_model_that_knows_nothing_here_is_told(reader: Patient) -> None:
    for parameter in reader.model.parameters():
        if parameter.ndim > 1:
            parameter.data = torch.randn_like(parameter) * 0.02
    finding = judged(reader)
    assert finding.level == "warning" and "no better here than a random one" in finding.message


def test_new_rows_are_no_fault(reader: Patient) -> None:
    """A trained model on rows it has never seen may well lose more than a count of their labels."""
    (found,) = judge_loss(reader, entropy=-1.0)
    assert found.level == "info" and "may be new to the model" in found.message


def test_whether_the_images_matter_is_told(seer: Patient) -> None:
    entropy = unigram_entropy(seer.examples)
    (finding,) = judge_images(seer, entropy, learned=True)
    assert finding.level == "info"
    assert finding.values["other rows' images"] > finding.values["loss"] + 1
    seer.model.model.multi_modal_projector.register_forward_hook(lambda module, inputs, out: out * 0)
    (unmoved,) = judge_images(seer, entropy + 100, learned=True)
    assert unmoved.level == "warning" and "does not look at the images" in unmoved.message
    assert judge_images(seer, entropy + 100, learned=False)[0].level == "info"
    assert judge_images(seer, 0.0, learned=True)[0].level == "info"


def test_the_check_leaves_the_model_as_it_was(open_context: MakeContext) -> None:
    context = open_context("gemma3")
    model = context.loaded.model
    norm = model.get_decoder().norm.weight
    norm.data[0] += 0.5  # as if it had been trained, so that the doctor comes
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    attends = model.config.text_config._attn_implementation
    random = torch.get_rng_state()
    assert "random weights" not in check_loss(context)[0].message
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.config.text_config._attn_implementation == attends
