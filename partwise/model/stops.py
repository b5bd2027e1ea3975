"""Where generation stops: a model's generation config, which is saved with it and which every tool reads.

In: a model and the token that ends its answers. Out: the same model, whose generate stops there. Which token
that is, the chat template says (data/template.py).
"""

from __future__ import annotations

from transformers import PreTrainedModel


def stop_at(model: PreTrainedModel, token_id: int | None) -> None:
    """Adds the token to those that end generation; None adds nothing.

    Base models, and some chat models, stop at the end of a text only: an answer would run on into a made-up
    next turn.
    """
    config = model.generation_config
    if token_id is None or config is None:
        return
    stops = config.eos_token_id
    known = [] if stops is None else [stops] if isinstance(stops, int) else list(stops)
    if token_id not in known:
        config.eos_token_id = [*known, token_id]
