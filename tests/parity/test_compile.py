"""Compiled layers: the same step as the layers give as they are written, in few graphs.

The graphs are captured and differentiated as for a GPU, but run by torch's own operators: on a CPU the
compiler's kernels take minutes to build.
"""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

from partwise.config.tree import Config
from partwise.data.collate import micro_batches
from partwise.data.packing import PackFormat
from partwise.families import IMAGE_RUN_FIELDS
from partwise.model import attention
from partwise.model.attention import use_packed_attention
from partwise.model.compile import compile_layers, uncompiled
from partwise.model.parts import apply_plan, resolve_plan
from partwise.records import StepData
from partwise.training.step import accumulate_loss

CPU = torch.device("cpu")


@pytest.fixture
def by_operators(monkeypatch):
    """Packs go through the operator that a GPU uses; what it computes is exact attention (plain_kernel)."""
    pytest.importorskip("tests.parity.plain_kernel")
    monkeypatch.setattr(attention, "suits_flash", lambda query: True)
