"""What the trained model says about a few of the run's rows, and blocks that leave the model as it was.

In: a loader and a model. Out: a Probe, with which a saved folder is compared in a fresh process
(lineage/verify.py). The model is the same after it: modes, gradients, buffers and random numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from partwise.data.chat import truncate
from partwise.data.collate import collate
from partwise.data.pixels import with_own_pixels
from partwise.engine.device import restored_rng
from partwise.engine.single import Engine
from partwise.errors import DataError
from partwise.lineage.verify import InputSide, Probe
from partwise.model.attention import plain_attention
from partwise.records import Dropped, Example
from partwise.training.step import eval_mode, model_inputs

if TYPE_CHECKING:
    from partwise.data.loader import StepLoader
    from partwise.model.load import LoadedModel
    from partwise.records import Conversation

# Of how many rows the shortest is taken, and among how many an image is searched for. MAX_TOKENS of a row are
# kept, or all up to its last image; its last NUM_LOGITS positions are compared.
NUM_CANDIDATES = 64
SEARCHED_ROWS = 10_000
MAX_TOKENS = 256
NUM_LOGITS = 16


@contextmanager
def untouched(model: torch.nn.Module) -> Iterator[None]:
    """A block after which gradients, buffers, modes and random numbers are as before; it starts without
    gradients. Weights are for the block to leave alone."""
    gradients = {name: p.grad for name, p in model.named_parameters()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    training = {id(module): module.training for module in model.modules()}
    model.zero_grad(set_to_none=True)
    try:
        with restored_rng():
            yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.grad = gradients[name]
        for name, buffer in model.named_buffers():
            if not torch.equal(buffer, buffers[name]):
                buffer.copy_(buffers[name])
        for module in model.modules():
            module.training = training[id(module)]


@contextmanager
def measuring(model: torch.nn.Module) -> Iterator[None]:
    """A block without gradients and dropout."""
    with torch.no_grad(), untouched(model), eval_mode(model):
        yield


def probe_examples(loader: StepLoader) -> list[Example]:
    """A short usable row with images and a short one without, where the run has them; none if none is usable.

    Of the first rows that have one, it is the shortest; images may be rare, so they are searched for.
    """
    takes_images = hasattr(loader.chat_format.processor, "image_processor")
    found: dict[bool, Example] = {}
    num_rows = min(len(loader.rows), SEARCHED_ROWS)
    for start in range(0, num_rows, NUM_CANDIDATES):
        conversations = read_rows(loader, range(start, min(start + NUM_CANDIDATES, num_rows)))
        for has_images in {True, False} - found.keys():
            group = [c for c in conversations if bool(c.images) == has_images]
            if (example := first_example(loader, group)) is not None:
                found[has_images] = example
        if True in found or (found and not takes_images):
            break
    return [found[has_images] for has_images in sorted(found)]


def read_rows(loader: StepLoader, indices: range) -> list[Conversation]:
    conversations = []
    for index in indices:
        with suppress(DataError):  # training says so when it comes to that row
            conversations.append(loader.rows[index])
    return conversations


def first_example(loader: StepLoader, conversations: Sequence[Conversation]) -> Example | None:
    for conversation in sorted(conversations, key=lambda conversation: conversation.num_characters):
        try:
            encoded = loader.chat_format.encode(conversation)
            example = loader.chat_format.fit(encoded)
        except DataError:
            continue
        if not isinstance(example, Dropped):
            example = truncate(example, max(MAX_TOKENS, encoded.images_end))
            return with_pixels(loader, conversation, example) if loader.chat_format.features else example
    return None


def with_pixels(loader: StepLoader, conversation: Conversation, example: Example) -> Example:
    """The example of kept features with what a model that has its tower takes instead."""
    whole = loader.chat_format.with_pixels.encode(conversation).example
    return replace(example, image_inputs=with_own_pixels(whole).media)


def take_probe(
    loaded: LoadedModel,
    examples: Sequence[Example],
    pad_token_id: int,
    trust_remote_code: bool = False,
    engine: Engine | None = None,
) -> Probe:
    """What the model as it is now says about each example alone. The host waits for the device.

    Where weights are sharded, all ranks must call it.
    """
    # Imports PEFT, which a check of config and plan need not wait for.
    from partwise.lineage.reload import logits_of

    engine, model = engine or Engine(), loaded.model
    rows, logits = [], []
    with measuring(model):
        for example in examples:
            batch = collate([example], pad_token_id)
            inputs = model_inputs(model, batch, torch.device("cpu"), loaded.dtype)
            row = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
            rows.append({**row, **(example.image_inputs or {})})
            if engine.shards_weights:
                inputs = model_inputs(model, batch, engine.device, loaded.dtype)
                logits.append(engine.logits(model, inputs)[0, -NUM_LOGITS:].float().cpu())
            else:
                logits.append(logits_of(model, {**row, "num_logits": torch.tensor(NUM_LOGITS)}))
    return Probe(
        rows=tuple(rows),
        logits=tuple(logits),
        num_logits=NUM_LOGITS,
        input_side=InputSide.of(loaded.processor),
        dtype=str(loaded.dtype).removeprefix("torch."),
        device=str(engine.device or model.device),
        num_weights=sum(math.prod(engine.stretch(name, p).shape) for name, p in model.named_parameters()),
        attention=plain_attention(model),
        trust_remote_code=trust_remote_code,
    )
