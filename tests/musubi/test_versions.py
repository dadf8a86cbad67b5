"""Inside the real musubi-tuner: its options as recorded, the patches, an incompatible host."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from byg_plugin.musubi import host as musubi
from byg_plugin.musubi import options as musubi_options
from tests.support.musubi_host import T2V, host_config, needs_host, open_tiny, recorded_surface
from tests.support.musubi_images import KREA2, MASKED
from tests.support.musubi_runs import child_env

pytestmark = needs_host


# --- the host's parser ---


@pytest.mark.parametrize("family", [T2V, "flux", *MASKED])
def test_recorded_surface_is_this_hosts(family: str):
    found = musubi_options.surface_of(open_tiny(family).parser())
    expected = recorded_surface(family)
    missing = {name for name in expected if name not in found}
    # v0.3.0 lacks what later versions added; a host that is newer may have more.
    assert missing <= {"block_swap_h2d_only", "block_swap_ring_size", "save_precision"}, missing
    if not missing:
        changed = {name for name, option in expected.items() if found[name].kind != option.kind or found[name].many != option.many}
        assert not changed


# --- patches ---


@pytest.mark.timeout(1800)
def test_patch_of_imports_is_needed():
    """Fails once the host imports without CUDA: then remove `patches.musubi.imports_without_cuda`."""
    if torch.cuda.is_available():
        pytest.skip("only a machine without CUDA needs it")
    code = "import musubi_stubs; musubi_stubs.look_first(); musubi_stubs.install(); import musubi_tuner.wan.modules.t5"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=child_env(), check=False)
    assert done.returncode != 0 and "current_device" in done.stderr, done.stderr[-500:]


# --- what an incompatible host lacks ---


def test_an_incompatible_host_is_one_error(monkeypatch: pytest.MonkeyPatch):
    host = open_tiny(T2V)
    trainer = host.trainer_class
    for name in ("process_batch", "on_post_save"):
        for base in trainer.__mro__:
            if name in vars(base):
                monkeypatch.delattr(base, name)
    model = host.module("wan.modules.model").WanModel
    monkeypatch.delattr(model, "switch_block_swap_for_training")
    monkeypatch.setattr(model, "forward", lambda self, x, t, context, seq_len: x)
    with pytest.raises(ValueError, match="it lacks:") as error:
        musubi.open_checkout(host_config(Path("."), T2V).model)
    lacking = [line.removeprefix("  - ") for line in str(error.value).splitlines()[1:]]
    starts = ["the seam WanNetworkTrainer.process_batch", "the seam WanNetworkTrainer.on_post_save"]
    starts += ["WanModel.switch_block_swap_for_training", "WanModel.forward(f_indices"]
    assert len(lacking) == 4 and all(line.startswith(start) for line, start in zip(lacking, starts, strict=True))


def test_a_host_without_the_model_is_one_error(monkeypatch: pytest.MonkeyPatch):
    open_tiny(T2V)
    monkeypatch.setitem(sys.modules, "musubi_tuner.krea2_train_network", None)
    with pytest.raises(ValueError, match=r"krea2_train_network\.Krea2NetworkTrainer: its version has no such model"):
        musubi.open_checkout(host_config(Path("."), KREA2).model)
