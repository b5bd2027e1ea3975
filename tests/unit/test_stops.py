"""Generation stops at the token that the model's own chat template ends an answer with."""

from __future__ import annotations

import pytest
from transformers import GenerationConfig

from partwise.data.template import end_of_turn, tokenizer_of
from partwise.model.load import load_processor
from partwise.model.stops import stop_at
from partwise.tiny import FAMILIES

ENDS = {
    "gemma3": "<end_of_turn>",
    "gemma3-text": "<end_of_turn>",
    "llava": "</s>",
    "llava-next": "</s>",
    "qwen2-vl": "<|im_end|>",
    "qwen2.5-vl": "<|im_end|>",
    "llama": "<|eot_id|>",
}


class Model:
    def __init__(self, stops: int | list[int] | None) -> None:
        self.generation_config = GenerationConfig(eos_token_id=stops)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_end_of_a_turn_is_the_templates(family, tiny_folder) -> None:
    processor = load_processor(tiny_folder(family))
    assert tokenizer_of(processor).convert_ids_to_tokens(end_of_turn(processor)) == ENDS[family]


def test_a_template_that_writes_no_mark_has_no_end(tiny_folder) -> None:
    processor = load_processor(tiny_folder("llama"))
    processor.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    processor.chat_template += "{% if add_generation_prompt %}assistant: {% endif %}"
    assert end_of_turn(processor) is None


@pytest.mark.parametrize(
    ("stops", "after"), [(None, [7]), (1, [1, 7]), ([1, 2], [1, 2, 7]), ([1, 7], [1, 7]), (7, 7)]
)
def test_the_stop_is_added_once(stops, after) -> None:
    model = Model(stops)
    stop_at(model, 7)
    stop_at(model, 7)
    stop_at(model, None)
    assert model.generation_config.eos_token_id == after
