"""Answers of a batch are those of each prompt alone, and those of plain transformers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from partwise.data.chat import prompt_inputs
from partwise.evaluation.generate import before, generate_answers, join_prompts, make_answerer, stop_ids
from partwise.model.attention import use_packed_attention

MAX_NEW_TOKENS = 8
FAMILIES = {
    "gemma3": (1, 0, 2, 1),
    "llava": (1, 2, 0, 1),
    "llava-next": (1, 1, 2, 1),
    "qwen2-vl": (2, 0, 1, 1),
    "qwen2.5-vl": (1, 2, 1, 0),
    "llama": (0, 0, 0, 0),
}


def questions(tiny):
    return [replace(c, messages=c.messages[:-1]) for c in tiny.conversations]


def plain_answer(tiny, messages):
    """One question to plain transformers: template, processor and generate."""
    loaded = tiny.loaded
    if loaded.processor is getattr(loaded.processor, "tokenizer", loaded.processor):
        messages = [{"role": m["role"], "content": m["content"][-1]["text"]} for m in messages]
    inputs = loaded.processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    stops = stop_ids(loaded.model, loaded.processor)
    output = loaded.model.generate(
        **inputs,
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=False,
        eos_token_id=stops,
        pad_token_id=stops[0],
    )
    tokens = before(output[0, inputs["input_ids"].shape[1] :].tolist(), stops)
    tokenizer = getattr(loaded.processor, "tokenizer", loaded.processor)
    return tokenizer.decode(tokens, skip_special_tokens=True).strip()


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_of_a_batch_are_those_of_each_alone(family, open_tiny):
    tiny = open_tiny(family, FAMILIES[family])
    sharpen(tiny.model)
    if family == "gemma3":
        use_packed_attention(tiny.model)  # as training with packs leaves it
    asked = questions(tiny)
    answer = make_answerer(tiny.model, tiny.loaded.processor, MAX_NEW_TOKENS)
    together = answer(asked)
    assert together == [answer([one])[0] for one in asked]
    assert together == [plain_answer(tiny, messages[:-1]) for messages in tiny.messages]
    assert len(set(together)) == len(together)


def sharpen(model):
    """Weights so large that what a prompt says decides its answer, and seen padding would change it."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=2 * parameter[0].numel() ** -0.5)
        if model.get_output_embeddings().weight is model.get_input_embeddings().weight:
            # A tied head repeats the last token: let the layers' outputs outweigh it.
            model.get_input_embeddings().weight.mul_(0.1)
            for name, parameter in model.get_decoder().named_parameters():
                if "norm" in name:
                    parameter.normal_(std=2)


def test_prompts_are_padded_on_the_left(open_tiny):
    tiny = open_tiny("gemma3", (1, 0))
    prompts = [prompt_inputs(tiny.loaded.processor, one) for one in questions(tiny)]
    lengths = [prompt["input_ids"].shape[1] for prompt in prompts]
    joined = join_prompts(prompts, pad_token_id=0)
    missing = lengths[1] - lengths[0]
    assert missing > 0 and joined["attention_mask"].sum(dim=1).tolist() == lengths
    assert joined["attention_mask"][0, :missing].sum() == 0
    assert torch.equal(joined["input_ids"][0, missing:], prompts[0]["input_ids"][0])
    assert torch.equal(joined["pixel_values"], prompts[0]["pixel_values"])


def test_an_answer_ends_at_the_first_stop_whatever_the_folder_says_of_sampling(open_tiny):
    tiny = open_tiny("llama", (0,))
    model, processor = tiny.model, tiny.loaded.processor
    sharpen(model)
    prompts = [prompt_inputs(processor, one) for one in questions(tiny)]
    [answer] = generate_answers(model, processor, prompts, MAX_NEW_TOKENS)
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.temperature = 0.1
    assert generate_answers(model, processor, prompts, MAX_NEW_TOKENS) == [answer]
    assert before([5, 6, 2, 7, 2], [2]) == [5, 6] and before([5], [2]) == [5]
    [first] = model.generate(**prompts[0], max_new_tokens=1, do_sample=False)[:, -1].tolist()
    model.generation_config.eos_token_id = first
    assert generate_answers(model, processor, prompts, MAX_NEW_TOKENS) == [""]
