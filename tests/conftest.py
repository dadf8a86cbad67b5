"""What every test shares: one thread, kernels that repeat, no hub, and the float64 toy of the objective's tests.

BYG_TEST_THREADS=2 and BYG_TEST_SHIFT=1 look for tests whose bits hang on threads or on where memory lies; MKL_CBWR and
ONEDNN_MAX_CPU_ISA choose other kernels.
"""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Read when torch is imported. Without, MKL's sums of equal numbers differ in the last bit by where in memory they lie (AVX-512).
os.environ.setdefault("MKL_CBWR", "COMPATIBLE")

import pytest
import torch

from byg_plugin.objectives.base import Batch
from tests.support.toy_fields import ToyFields, toy_batch

torch.set_num_threads(int(os.environ.get("BYG_TEST_THREADS", "1")))
# A script's background jobs are started with Ctrl-C ignored, and would hand that down to the commands that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


# Minutes each. A file is one process's (--dist loadfile): started last, it would run alone at the end.
LONG = (
    *("training/test_engines", "training/test_engines_resume", "training/test_launched"),
    *("benchmarks/test_wan_base", "benchmarks/test_flux_base", "benchmarks/test_tiny_world_run"),
    *("demo/test_demo", "demo/test_video_demo", "data/test_caching_commands", "dataset_tools/test_generate"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first."""
    items.sort(key=lambda item: next((place for place, name in enumerate(LONG) if item.nodeid.startswith(f"tests/{name}.py")), len(LONG)))


@pytest.fixture(autouse=True)
def shifted_allocations(request: pytest.FixtureRequest) -> Iterator[None]:
    """With BYG_TEST_SHIFT, memory with holes of odd sizes, so that equal tensors come to lie differently."""
    shift = os.environ.get("BYG_TEST_SHIFT")
    if not shift:
        yield
        return
    rng = random.Random(f"{shift} {request.node.nodeid}")
    blocks = [torch.empty(rng.randrange(1, 40_000), dtype=torch.uint8) for _ in range(3000)]
    held = blocks[:: rng.randrange(2, 5)]
    del blocks
    yield
    del held


@pytest.fixture
def fields() -> ToyFields:
    """Edit, EMA and base of one toy network, all different."""
    return ToyFields()


@pytest.fixture
def batch() -> Batch:
    """Three samples with different t, texts, sources and noise; float64."""
    return toy_batch()
