"""Is the model folder whole, and does it say one thing? Looked at before anything is loaded from it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from partwise.data.template import tokenizer_of
from partwise.errors import CheckpointError
from partwise.model.folder import find_model_folder, read_json, read_tensor_names
from partwise.model.load import media_token_ids
from partwise.preflight.context import Context
from partwise.records import Finding

SHOWN_TOKENS = 3


def check_model(context: Context) -> list[Finding]:
    """The model folder has config, weights, tokenizer and processor, and they fit each other.

    Of a hub model the weights are fetched, and looked at, when they are loaded.

    Raises:
        CheckpointError: something is missing, broken, or is no model; the text says what to do.
    """
    path = context.config.model.path
    model_type = context.job.empty_model.config.model_type
    text = f"{path}: {model_type} with {type(context.job.processor).__name__}"
    folder = Path(path).expanduser()
    if folder.is_dir():
        text += f", {len(read_tensor_names(folder)):,} tensors in its files"
    refuse_tokens_without_row(context)
    where = context.config.where("model.path")
    return [Finding("model", "info", text, where), *contradicting_ties(context)]


def refuse_tokens_without_row(context: Context) -> None:
    """
    Raises:
        CheckpointError: the tokenizer has tokens beyond the embeddings, of which no row could be trained.
    """
    model, processor = context.job.empty_model, context.job.processor
    num_rows = model.get_input_embeddings().weight.shape[0]
    # In an image's place stand its features: the token itself needs no row.
    media = media_token_ids(model.config, processor)
    vocabulary = tokenizer_of(processor).get_vocab()
    beyond = sorted((i, token) for token, i in vocabulary.items() if i >= num_rows and i not in media)
    if beyond:
        shown = ", ".join(f'"{token}" ({i})' for i, token in beyond[:SHOWN_TOKENS])
        more = f" and {len(beyond) - SHOWN_TOKENS} more" if len(beyond) > SHOWN_TOKENS else ""
        raise CheckpointError(
            f"{context.config.model.path}: {len(beyond)} of the tokenizer's {len(vocabulary)} tokens lie "
            f"beyond the {num_rows} rows of the model's embeddings: {shown}{more}. A row of data with one "
            "of them could not be computed. Call model.resize_token_embeddings(len(tokenizer)) and save "
            "both, or take the tokenizer that the model came with."
        )


def contradicting_ties(context: Context) -> Iterator[Finding]:
    """A warning where the config file says twice, and differently, whether the head is tied."""
    path, settings = context.config.model.path, context.config.where("model.path")
    content = read_json(find_model_folder(path) / "config.json")
    text_config = content.get("text_config")
    own, inner = (c.get("tie_word_embeddings") for c in (content, text_config or {}))
    if own is None or inner is None or own == inner:
        return
    text = (
        f"{path}/config.json: tie_word_embeddings is {str(own).lower()}, and {str(inner).lower()} in "
        "text_config; here the first counts, other tools read the second"
    )
    fix = f"Write {str(own).lower()} in both, if that is how the model answers right."
    yield Finding("model", "warning", text, settings, fix)
