"""One program per contender: `python -m benchmarks.speed.contenders.NAME JOB.json` prints one line of JSON.

Each opens the same model folder, trains on the same rows in the same order, looks for its fastest settings,
and measures them. A contender may patch what it likes: its process is its own.
"""

from __future__ import annotations

# How many times the time limit a contender gets: what compiles needs its time, and none of it is measured.
PATIENCE = {
    "ours": 1.5,
    "hf": 1.0,
    "hf_flash": 1.0,
    "hf_liger": 1.0,
    "trl": 1.0,
    "trl_liger": 1.0,
    "unsloth": 5.0,
    "llama_factory": 1.5,
}
OURS = "ours"
TITLES = {
    "ours": "Partwise",
    "hf": "transformers + PEFT",
    "hf_flash": "transformers + PEFT, FlashAttention 2",
    "hf_liger": "transformers + PEFT + Liger",
    "trl": "TRL",
    "trl_liger": "TRL + Liger",
    "unsloth": "Unsloth",
    "llama_factory": "LLaMA-Factory",
}
