"""What tests of gradients share."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor


@pytest.fixture
def float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rotary embeddings and Wan's upsampling go through float32 by this name; a difference over 1e-7 would be its rounding."""
    plain = Tensor.float
    monkeypatch.setattr(Tensor, "float", lambda self: self if self.dtype == torch.float64 else plain(self))
