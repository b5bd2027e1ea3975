"""The plain loop with FlashAttention 2, which many recipes name; what it does to the mask is probed."""

from __future__ import annotations

from functools import partial

from benchmarks.speed.contenders.hf import Loop
from benchmarks.speed.contenders.measure import main

if __name__ == "__main__":
    main(partial(Loop, attention="flash_attention_2"))
