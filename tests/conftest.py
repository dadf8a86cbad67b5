"""What every test shares: one thread (repeatable sums), no hub, and the float64 toy of the objective's tests."""

from __future__ import annotations

import os
import signal

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from toy_fields import ToyFields, toy_batch

from byg_plugin.objectives.base import Batch

torch.set_num_threads(1)
# A script's background jobs are started with Ctrl-C ignored, and would hand that down to the commands that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def fields() -> ToyFields:
    """Edit, EMA and base of one toy network, all different."""
    return ToyFields()


@pytest.fixture
def batch() -> Batch:
    """Three samples with different t, texts, sources and noise; float64."""
    return toy_batch()
