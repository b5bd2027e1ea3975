"""One program per contender: `python -m benchmarks.speed.contenders.NAME JOB.json` prints a line of JSON.

Each opens the same model folder, trains on the same rows in the same order, looks for its fastest settings,
and measures them. A contender may patch what it likes: its process is its own.
"""

from __future__ import annotations

# How many times the time limit a contender gets: what compiles needs its time, and none of it is measured.
PATIENCE = {
    "partwise": 2.0,
    "hf": 1.0,
    "hf-flash": 1.0,
    "hf-liger": 1.0,
    "trl": 1.0,
    "trl-liger": 1.0,
    "unsloth": 5.0,
    "llama-factory": 1.5,
}
OURS = "partwise"
TITLES = {
    "partwise": "Partwise",
    "hf": "transformers + PEFT",
    "hf-flash": "transformers + PEFT, FlashAttention 2",
    "hf-liger": "transformers + PEFT + Liger",
    "trl": "TRL",
    "trl-liger": "TRL + Liger",
    "unsloth": "Unsloth",
    "llama-factory": "LLaMA-Factory",
}
