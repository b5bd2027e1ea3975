"""Partwise's settings for each cell, over those of the run itself: the fastest that were found.

Keys are those of its config. What one cell needs beyond its method stands here and nowhere else.
"""

from __future__ import annotations

from typing import Any

# Runs this short would not compile by themselves.
COMPILED = {"compile": True}
FASTEST: dict[str, dict[str, dict[str, Any]]] = {
    "C1": {"train": {**COMPILED, "micro_batch_size": 8, "optimizer_states": "8bit", "memory_limit": 66}},
    "C2": {"train": {**COMPILED, "micro_batch_size": 2}},
    "C3": {"train": {**COMPILED, "micro_batch_size": 10}},
    "C4": {"train": {**COMPILED, "micro_batch_size": 10}},
    "C5": {"train": {**COMPILED, "micro_batch_size": 2}},
    "C6": {"train": {**COMPILED, "micro_batch_size": 1}},
    "C7": {"train": {**COMPILED, "micro_batch_size": 10}},
    "C8": {"train": {**COMPILED, "micro_batch_size": 40}},
    "C8-cached": {"train": {**COMPILED, "micro_batch_size": 40}},
    "C9": {"train": {**COMPILED, "micro_batch_size": 4}, "data": {"packing": True}},
    "C10": {"train": {**COMPILED, "micro_batch_size": 10}},
    "C11": {"train": {**COMPILED, "micro_batch_size": 2}},
    "C11-full": {"train": {**COMPILED, "micro_batch_size": 2}},
    "tiny": {"train": {"micro_batch_size": 2}},
    "tiny-full": {"train": {"micro_batch_size": 2}},
    "tiny-text": {"train": {"micro_batch_size": 2}},
}
