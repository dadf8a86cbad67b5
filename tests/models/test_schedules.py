"""The schedules of edits beside diffusers' own, at sizes that people use: each family's pipeline with its published scheduler."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler as Scheduler
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift

from byg_plugin import families, sampling
from byg_plugin.models.geometry import SpecGeometry

# Pixels; FLUX.2's line changes above 4,300 tokens, which 1040 x 1056 has not reached yet and 1056 x 1056 has.
SIZES = [(256, 256), (512, 512), (1024, 1024), (1040, 1056), (1056, 1056), (512, 2048), (2048, 2048)]


def published(name: str, tokens: int, steps: int) -> torch.Tensor:
    sigmas = np.linspace(1, 1 / steps, steps)
    if name == "z-image":
        scheduler, mu = Scheduler(shift=6.0), None
    elif name.startswith("flux2"):
        scheduler, mu = Scheduler(use_dynamic_shifting=True, shift=3.0), compute_empirical_mu(image_seq_len=tokens, num_steps=steps)
    elif name == "qwen-image":
        scheduler = Scheduler(use_dynamic_shifting=True, shift_terminal=0.02, max_image_seq_len=8192, max_shift=0.9)
        mu = calculate_shift(tokens, 256, 8192, 0.5, 0.9)
    else:
        scheduler, mu = Scheduler(use_dynamic_shifting=True), calculate_shift(tokens, 256, {"krea2": 6400, "flux": 4096}[name], 0.5, 1.15)
    scheduler.set_timesteps(sigmas=sigmas, mu=mu)
    return scheduler.sigmas


@pytest.mark.parametrize("steps", [2, 8, 50])
@pytest.mark.parametrize("name", [name for name, spec in families.SPECS.items() if spec.frame_multiple is None])
def test_times_are_the_pipelines(name: str, steps: int):
    factor = 16 if name.startswith("flux2") else 8
    for height, width in SIZES:
        nodes = sampling.sampling_nodes(SpecGeometry(families.named(name)), steps, "shifted", (1, 1, 1, height // factor, width // factor))
        torch.testing.assert_close(nodes, published(name, height // 16 * (width // 16), steps), rtol=0, atol=1e-6, check_dtype=False)
