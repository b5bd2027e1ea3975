"""Prompts -> answers, decoded greedily, several at a time: the one place that lets a model generate.

In: a model and the inputs of one prompt each, as its own processor makes them. Out: the answers as texts.
In a batch, prompts are padded on the left, and the mask hides the padding, so that each is answered as if it
were alone. Shapes: B prompts, T tokens of the longest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the name everyone reads
from torch import Tensor
from transformers import GenerationConfig, TextStreamer

from partwise.data.chat import prompt_inputs
from partwise.data.collate import concatenate
from partwise.data.features import FeatureStore
from partwise.data.template import end_of_turn, tokenizer_of
from partwise.records import Conversation

Answerer = Callable[[Sequence[Conversation]], list[str]]


def make_answerer(
    model: Any, processor: Any, max_new_tokens: int, features: FeatureStore | None = None
) -> Answerer:
    """What answers a batch of conversations; with `features`, a model without its tower."""

    def answer(conversations: Sequence[Conversation]) -> list[str]:
        prompts = [prompt_inputs(processor, conversation, features) for conversation in conversations]
        return generate_answers(model, processor, prompts, max_new_tokens)

    return answer


@torch.no_grad()
def generate_answers(
    model: Any,
    processor: Any,
    prompts: Sequence[Mapping[str, Tensor]],
    max_new_tokens: int,
    streamer: TextStreamer | None = None,
) -> list[str]:
    """An answer for each prompt, without special tokens and white space around it.

    The model must be in eval mode. A sampling temperature or repetition penalty of its folder has no effect.
    """
    stops = stop_ids(model, processor)
    pad_token_id = tokenizer_of(processor).pad_token_id
    if pad_token_id is None:
        pad_token_id = stops[0] if stops else 0
    inputs = {
        name: tensor.to(model.device, model.dtype if tensor.is_floating_point() else None)
        for name, tensor in join_prompts(prompts, pad_token_id).items()
    }
    config = greedy(max_new_tokens, stops, pad_token_id)
    output = model.generate(**inputs, generation_config=config, streamer=streamer)
    new_tokens = output[:, inputs["input_ids"].shape[1] :].tolist()
    tokenizer = tokenizer_of(processor)
    return [tokenizer.decode(before(row, stops), skip_special_tokens=True).strip() for row in new_tokens]


def greedy(max_new_tokens: int, stops: list[int], pad_token_id: int) -> GenerationConfig:
    """What is None in it, transformers takes from the model's own generation config: hence the numbers."""
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        temperature=1.0,
        top_p=1.0,
        top_k=50,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        use_cache=True,
        eos_token_id=stops or None,
        pad_token_id=pad_token_id,
    )


def stop_ids(model: Any, processor: Any) -> list[int]:
    """Where the model's generation config stops, and the token that ends a turn."""
    known = model.generation_config.eos_token_id if model.generation_config else None
    stops = [] if known is None else [known] if isinstance(known, int) else list(known)
    end = end_of_turn(processor)
    return stops if end is None or end in stops else [*stops, end]


def before(tokens: list[int], stops: list[int]) -> list[int]:
    """The tokens before the first that stops: what follows it in a batch is padding."""
    return tokens[: next((i for i, token in enumerate(tokens) if token in stops), len(tokens))]


def join_prompts(prompts: Sequence[Mapping[str, Tensor]], pad_token_id: int) -> dict[str, Tensor]:
    """One batch of prompts: what is per token (B, T), padded on the left, and images one after the other."""
    lengths = [prompt["input_ids"].shape[1] for prompt in prompts]
    masked = [{**prompt, "attention_mask": torch.ones_like(prompt["input_ids"])} for prompt in prompts]
    fields: set[str] = set()
    media: dict[str, list[Tensor]] = {}
    for prompt, length in zip(masked, lengths, strict=True):
        for name, tensor in prompt.items():
            if tuple(tensor.shape) == (1, length):
                fields.add(name)
            else:
                media.setdefault(name, []).append(tensor)

    def pad(prompt: Mapping[str, Tensor], name: str) -> Tensor:
        field = prompt.get(name, torch.zeros_like(prompt["input_ids"]))
        filler = pad_token_id if name == "input_ids" else 0
        return F.pad(field, (max(lengths) - field.shape[1], 0), value=filler)

    padded = {name: torch.cat([pad(prompt, name) for prompt in masked]) for name in sorted(fields)}
    return {**padded, **{name: concatenate(tensors) for name, tensors in media.items()}}
