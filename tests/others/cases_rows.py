"""What a row becomes: tokens, images, labels."""

from __future__ import annotations

from typing import Any

import torch
from bench import Bench, Row, failure, listening, messages, picture
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer

from partwise.data.collate import collate
from partwise.model.load import load_processor
from partwise.records import IGNORE_INDEX, Dropped
from partwise.training.step import model_inputs


def row_of(num_placeholders: int, *colors: str, answer: str = "red") -> dict:
    """A row of a data file with so many placeholders, and these images."""
    question = "<image>" * num_placeholders + "Which color is this?"
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": turns, "images": [picture(color) for color in colors]}


def images_in_another_row(bench: Bench) -> Row:
    processor = bench.processor("llava")
    texts = [processor.apply_chat_template(messages(("red",) * n), tokenize=False) for n in (1, 2)]
    model, logits = bench.load("llava"), []
    with listening() as said:
        for second in ("green", "black"):
            images = [[picture("red"), picture(second)], [picture("blue")]]
            inputs = processor(text=texts, images=images, padding=True, return_tensors="pt")
            with torch.no_grad():
                logits.append(model(**inputs).logits)
    moved = (logits[0] - logits[1]).abs().amax(dim=(1, 2)).tolist()
    # The first row's own second image changes nothing in it, and everything in the second row.
    assert moved[0] < 1e-4 and moved[1] > 1e-2 and not said
    message = bench.refusal(bench.example, row_of(1, "red", "green"), "llava")
    assert message.startswith("train.jsonl:7: 2 images given, 1 placeholder")
    return Row(
        "LLaVA: one row has an image too many, the next one too few.",
        "Trains with the image in the wrong row. Only the batch's total is compared: exchanging the first "
        f"row's second picture moves logits of that row by {moved[0]:.1f} and of the next row by "
        f"{moved[1]:.2f}.",
        "Stops at the row, by file and line.",
        message,
    )


def placeholder_without_image(bench: Bench) -> Row:
    inputs = bench.inputs()
    pixels = inputs.pop("pixel_values")
    with listening() as said:
        loss = bench.load()(**inputs).loss
    loss.backward()
    assert loss.isfinite() and not said
    right = bench.load()(**inputs, pixel_values=pixels).loss.item()
    message = bench.refusal(bench.example, row_of(1))
    assert "0 images given, 1 <image>" in message
    return Row(
        "A row's image is lost: image tokens, but no pixels.",
        f"Trains on the embedding of the placeholder. The loss is {loss.item():.2f}; with the image it is "
        f"{right:.2f}.",
        "Stops at the row.",
        message,
    )


@torch.no_grad()
def first_image_token_sees_the_last(model: Any, inputs: dict[str, torch.Tensor]) -> bool:
    """Whether the logits at an image's first token move when the features of its last token do."""

    def push_last(module: torch.nn.Module, args: tuple, features: torch.Tensor) -> torch.Tensor:
        features = features.clone()
        features[:, -1] += 1.0
        return features

    first = int((inputs["input_ids"][0] == model.config.image_token_id).nonzero()[0])
    before = model(**inputs).logits[0, first]
    handle = model.model.multi_modal_projector.register_forward_hook(push_last)
    after = model(**inputs).logits[0, first]
    handle.remove()
    return not torch.allclose(before, after, atol=1e-5)


def token_types_left_out(bench: Bench) -> Row:
    model, inputs = bench.load(), bench.inputs()
    without = {name: tensor for name, tensor in inputs.items() if name != "token_type_ids"}
    with torch.no_grad(), listening() as said:
        right, causal = model(**inputs).logits, model(**without).logits
    moved = (right - causal).abs().max().item()
    assert moved > 0.1 and not said
    assert first_image_token_sees_the_last(model, inputs)
    assert not first_image_token_sees_the_last(model, without)
    example = bench.example(row_of(1, "red"))
    batch = collate([example], pad_token_id=0)
    with torch.no_grad():
        ours = model(**model_inputs(model, batch, torch.device("cpu"))).logits
    assert torch.equal(batch.input_ids, inputs["input_ids"])
    torch.testing.assert_close(ours, right)
    return Row(
        "Gemma-3: a collator passes ids, mask and pixels, but not `token_type_ids`.",
        "An image's first token no longer sees its last: attention over images becomes causal. Logits move "
        f"by up to {moved:.2f}, and nothing is said.",
        "Every field that the processor made for the tokens goes to the model. Logits are the same as from "
        "the processor's own batch.",
    )


def image_tokens_as_labels(bench: Bench) -> Row:
    processor, model = bench.processor(), bench.load()
    input_ids = bench.inputs()["input_ids"][0]
    labels = input_ids.clone()
    labels[labels == processor.image_token_id] = IGNORE_INDEX
    soft = model.config.image_token_id
    num_images_tokens = int((input_ids == soft).sum())
    left = int((labels == soft).sum())
    assert left == num_images_tokens > 0
    example = bench.example(row_of(1, "red"))
    ours = int((example.labels == soft).sum())
    assert torch.equal(example.input_ids, input_ids) and ours == 0
    return Row(
        "Gemma-3: `labels[labels == processor.image_token_id] = -100`, the usual line.",
        f"{left} of {num_images_tokens} image tokens stay labels. The processor's image token is "
        f"`{processor.image_token}`; what fills the image's place is "
        f"`{processor.tokenizer.convert_ids_to_tokens(soft)}`.",
        f"{ours} of {num_images_tokens}. Labels are the tokens of answers, found by their place in the text.",
    )


def bos_twice(bench: Bench) -> Row:
    processor = bench.processor()
    text = processor.apply_chat_template(messages(), tokenize=False)
    with listening() as said:
        ids = processor(text=[text], images=[[picture("red")]])["input_ids"][0]
    bos = processor.tokenizer.bos_token_id
    num_bos = list(ids).count(bos)
    assert num_bos == 2 and not said
    ours = bench.example(row_of(1, "red")).input_ids.tolist()
    assert ours[0] == bos and ours.count(bos) == 1
    return Row(
        "The chat template writes the text, then the processor makes its tokens.",
        f"Each row begins with {num_bos} `{processor.tokenizer.bos_token}`: one of the template, one of the "
        "tokenizer.",
        "One. A template that writes two is an error that names the row.",
    )


def labels_shifted_before(bench: Bench) -> Row:
    model, inputs = bench.load(), bench.inputs()
    ids = inputs.pop("input_ids")
    shifted = torch.cat([ids[:, 1:], torch.full((1, 1), IGNORE_INDEX)], dim=1)
    inputs.pop("labels")
    with torch.no_grad(), listening() as said:
        right = model(input_ids=ids, **inputs, labels=ids)
        wrong = model(input_ids=ids, **inputs, labels=shifted).loss
    after_next = cross_entropy(right.logits[0, :-2], ids[0, 2:])
    torch.testing.assert_close(wrong, after_next)
    assert not said
    message = bench.refusal(bench.example, {"input_ids": ids[0].tolist(), "labels": shifted[0].tolist()})
    assert "the keys are input_ids, labels" in message
    return Row(
        "The labels are shifted already when they reach the model.",
        "Learns the token after the next one. The model shifts them again, and its loss looks as usual: "
        f"{wrong.item():.2f}, not {right.loss.item():.2f}.",
        "Stops. Rows are conversations; labels are made and shifted in one place each.",
        message,
    )


def assistant_mask_without_marks(bench: Bench) -> Row:
    processor = bench.processor()
    with listening() as said:
        made = processor.apply_chat_template(
            messages(), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
    num_marked = int(torch.tensor(made["assistant_masks"]).sum())
    assert num_marked == 0
    assert any("generation" in text for text in said)
    example = bench.example(row_of(1, "red"))
    kept = example.input_ids[example.labels != IGNORE_INDEX]
    answer = processor.tokenizer.decode(kept)
    assert answer == "red<end_of_turn>"
    return Row(
        "`return_assistant_tokens_mask=True`, and the template has no `{% generation %}`.",
        f"A log line, and a mask with {num_marked} tokens: no label at all.",
        f"The answers are found without marks. The labels of the same row are `{answer}`.",
    )


def end_token_is_pad_token(bench: Bench) -> Row:
    tokenizer = AutoTokenizer.from_pretrained(bench.base("llama"))
    tokenizer.pad_token = tokenizer.eos_token
    turns = [
        [{"role": "user", "content": question}, {"role": "assistant", "content": "Red."}]
        for question in ("Which?", "Which color is this?")
    ]
    made = tokenizer.apply_chat_template(
        turns, tokenize=True, return_dict=True, padding=True, return_tensors="pt"
    )
    labels = made["input_ids"].masked_fill(made["input_ids"] == tokenizer.pad_token_id, IGNORE_INDEX)
    num_ends = int((labels == tokenizer.eos_token_id).sum())
    assert num_ends == 0
    processor = load_processor(bench.base("llama"))
    batch = collate(
        [bench.example({"messages": turn}, "llama") for turn in turns], pad_token_id=processor.eos_token_id
    )
    ours = int((batch.labels == processor.eos_token_id).sum())
    assert ours == len(turns)
    return Row(
        "The pad token is the end token, and padding is masked by its id.",
        f"{num_ends} of {len(turns)} answers have a trained end: the model never learns to stop.",
        f"{ours} of {len(turns)}. Padding is masked by its place, whatever the pad token is.",
    )


def cut_inside_an_image(bench: Bench) -> Row:
    processor, inputs = bench.processor(), bench.inputs()
    soft = bench.load().config.image_token_id
    limit = int((inputs["input_ids"][0] == soft).nonzero()[1])
    text = processor.apply_chat_template(messages(), tokenize=False)
    options = {"truncation": True, "max_length": limit, "add_special_tokens": False}
    refused = failure(processor, text=[text], images=[[picture("red")]], **options)
    length = inputs["input_ids"].shape
    sliced = {name: t[:, :limit] if t.shape[:2] == length else t for name, t in inputs.items()}
    broken = failure(bench.load(), **sliced)
    assert "Mismatch in `image` token count" in refused
    assert "Image features and image tokens do not match" in broken
    dropped = bench.example(row_of(1, "red"), max_seq_len=limit)
    assert isinstance(dropped, Dropped) and dropped.reason == "image would be cut"
    return Row(
        "The length limit falls inside an image.",
        f"The run ends at the batch that holds the row, which is not named: `{broken}`.",
        f'The row is dropped as "{dropped.reason}". Such rows are counted before training and in '
        "`metrics.jsonl`; `data.overlong: error` stops at the first and names it.",
    )


CASES = (
    images_in_another_row,
    placeholder_without_image,
    token_types_left_out,
    image_tokens_as_labels,
    bos_twice,
    labels_shifted_before,
    assistant_mask_without_marks,
    end_token_is_pad_token,
    cut_inside_an_image,
)
