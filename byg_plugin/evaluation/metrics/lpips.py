"""LPIPS (Zhang et al. 2018) by the package `lpips` (BSD-2): to the source, outside the mask and to the ground truth.

Outside the mask: what may change is filled with the source's pixels first. AlexNet's features are torchvision's (BSD-3).
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from byg_plugin.evaluation.metrics.base import Compared, Options, unit

# What torchvision names the files of the networks' features.
_FEATURES = {"alex": "alexnet-owt-7be5be79.pth", "vgg": "vgg16-397923af.pth", "squeeze": "squeezenet1_1-b8a52dc0.pth"}
_BUILDERS = {"alex": "alexnet", "vgg": "vgg16", "squeeze": "squeezenet1_1"}


class Lpips(Compared, name="lpips", more_is_better=False):
    """See the module.

    Raises:
        ValueError: lpips or torchvision is not installed, or the features are not on this machine.
    """

    def __init__(self, options: Options):
        self.settings = {"net": options.lpips_net}
        self._device = options.device
        for package in ("torchvision", "lpips"):
            if find_spec(package) is None:
                raise ValueError(f"--metrics lpips needs {package}, which is not installed: pip install torchvision lpips")
        features = Path(torch.hub.get_dir()) / "checkpoints" / _FEATURES[options.lpips_net]
        if not features.is_file():
            line = f"python -c 'import torchvision; torchvision.models.{_BUILDERS[options.lpips_net]}(weights=\"DEFAULT\")'"
            raise ValueError(f"--metrics lpips needs {features}, which is not on this machine; fetch it with: {line}")
        import lpips

        self._model = lpips.LPIPS(net=options.lpips_net, verbose=False).to(options.device).eval()

    @torch.no_grad()
    def distance(self, one: np.ndarray, other: np.ndarray, where: np.ndarray | None) -> float:
        """See the module."""
        if where is not None:
            one = np.where(where[..., None], one, other)
        return float(self._model(self._input(one), self._input(other)))

    def _input(self, frame: np.ndarray) -> Tensor:
        return torch.from_numpy(unit(frame) * 2 - 1).permute(2, 0, 1)[None].float().to(self._device)
