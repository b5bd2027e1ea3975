"""TRL's SFTTrainer with its option `use_liger_kernel`."""

from __future__ import annotations

from functools import partial

from benchmarks.speed.contenders.measure import main
from benchmarks.speed.contenders.trl import Trl

if __name__ == "__main__":
    main(partial(Trl, with_liger=True))
