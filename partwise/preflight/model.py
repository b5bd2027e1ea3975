"""Is the model folder whole? Looked at before anything is loaded from it."""

from __future__ import annotations

from pathlib import Path

from partwise.model.folder import read_tensor_names
from partwise.preflight.context import Context
from partwise.records import Finding


def check_model(context: Context) -> list[Finding]:
    """The model folder has config, weights, tokenizer and processor.

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
    return [Finding("model", "info", text, context.config.where("model.path"))]
