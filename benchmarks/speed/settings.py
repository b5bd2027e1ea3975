"""Partwise's settings for each cell, over those of the run itself: the fastest that were found.

Keys are those of its config. What one cell needs beyond its method stands here and nowhere else.
"""

from __future__ import annotations

from typing import Any

FASTEST: dict[str, dict[str, dict[str, Any]]] = {
    "C1": {"train": {"micro_batch_size": 8, "gradient_checkpointing": True}},
    "C2": {"train": {"micro_batch_size": 2, "gradient_checkpointing": True}},
    "C3": {"train": {"micro_batch_size": 8}},
    "C4": {"train": {"micro_batch_size": 8}},
    "C5": {"train": {"micro_batch_size": 2}},
    "C6": {"train": {"micro_batch_size": 1, "gradient_checkpointing": True}},
    "C7": {"train": {"micro_batch_size": 8}},
    "C8": {"train": {"micro_batch_size": 32}},
    "C8-cached": {"train": {"micro_batch_size": 32}},
    "C9": {"train": {"micro_batch_size": 4, "gradient_checkpointing": True}},
    "C10": {"train": {"micro_batch_size": 8}},
    "C11": {"train": {"micro_batch_size": 2}},
    "C11-full": {"train": {"micro_batch_size": 2, "gradient_checkpointing": True}},
    "tiny": {"train": {"micro_batch_size": 2}},
    "tiny-full": {"train": {"micro_batch_size": 2}},
    "tiny-text": {"train": {"micro_batch_size": 2}},
}
