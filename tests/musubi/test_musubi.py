"""Inside the real musubi-tuner, on a CPU with tiny weights. Run with MUSUBI_TUNER set to the folder of its checkout."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from byg_plugin.data.tuples import TEXTS
from byg_plugin.hosts.diffusers import DiffusersHost
from byg_plugin.lora import formats as lora_formats
from byg_plugin.models import make_family
from byg_plugin.musubi import cache as musubi_cache
from byg_plugin.musubi import host as musubi
from byg_plugin.musubi import options as musubi_options
from byg_plugin.musubi import trainer as musubi_trainer
from byg_plugin.musubi.fields import BlockSwap
from byg_plugin.objectives import make_objective
from byg_plugin.objectives.base import Batch
from byg_plugin.timesteps import uniform_nodes
from tests.support import GOLDEN, ROOT
from tests.support.musubi_host import (
    A14B,
    BLOCKS,
    PLACE,
    SITE,
    T2V,
    TEXT_TOKENS,
    WAN_TEXT,
    Rig,
    embedded_config,
    embedded_networks,
    host_config,
    latents,
    needs_host,
    open_tiny,
    reset_accelerate,
    texts,
    write_weights,
)

pytestmark = needs_host
FAMILIES = [T2V, A14B, "flux"]


@lru_cache(maxsize=8)
def rig(family: str, **_: Any) -> Rig:
    """One a family; tests leave it as they found it."""
    import tempfile

    made = Rig(Path(tempfile.mkdtemp(prefix="byg-musubi-")), family)
    made.wake()
    return made


# --- the three fields ---


@pytest.mark.parametrize("family", FAMILIES)
def test_base_is_the_bare_model_bit_for_bit(family: str):
    it = rig(family)
    noisy, t, text = latents(family, 2, 1), torch.tensor([0.3, 0.6]), texts(family, 2, 3)
    with it.fields.base() as velocity:
        found = velocity(noisy, t, text, None)
    bare = it._load() if family != A14B else None
    if bare is None:  # the trainer keeps the experts: a second load would exchange them
        it.network.set_multiplier(0.0)
        with it.fields.live() as velocity:
            expected = velocity(noisy, t, text, None)
        it.network.set_multiplier(1.0)
    else:
        with torch.no_grad():
            expected = it.trainer._call(it.accelerator, bare)(noisy, t, text, None)
    with it.fields.live() as velocity:
        live = velocity(noisy, t, text, None)
    assert torch.equal(found, expected) and not torch.allclose(live, expected, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_ema_is_restored_after_an_exception(family: str):
    it = rig(family)
    before = {name: p.detach().clone() for name, p in it.network.named_parameters()}
    pointers = [p.data_ptr() for p in it.network.parameters()]
    noisy, t, text = latents(family, 1, 1), torch.tensor([0.3]), texts(family, 1, 3)
    with pytest.raises(RuntimeError, match="in the middle"), it.fields.ema() as velocity:
        assert not torch.equal(next(iter(it.network.parameters())), next(iter(before.values())))
        velocity(noisy, t, text, noisy)
        raise RuntimeError("in the middle")
    assert [p.data_ptr() for p in it.network.parameters()] == pointers
    assert all(torch.equal(p, before[name]) for name, p in it.network.named_parameters())


@pytest.mark.parametrize("family", [T2V, "flux"])
def test_source_tokens_have_the_targets_positions(family: str):
    """Then noisy and source tokens change places without a trace but for which half is read."""
    it = rig(family)
    a, b, t, text = latents(family, 1, 1), latents(family, 1, 2), torch.tensor([0.4]), texts(family, 1, 3)
    whole: list[Tensor] = []
    handle = (it.transformer.head if family == T2V else it.transformer.final_layer).register_forward_hook(
        lambda m, i, out: whole.append(out)
    )
    with it.fields.live() as velocity:
        velocity(a, t, text, b)
        velocity(b, t, text, a)
    handle.remove()
    half = whole[0].shape[1] // 2
    swapped = torch.cat([whole[1][:, half:], whole[1][:, :half]], dim=1)
    assert (whole[0] - swapped).abs().max() < 1e-5 < (whole[0] - whole[1]).abs().max()


# --- parity with the embedded host ---


def one_batch(family: str) -> Batch:
    t = {A14B: (0.55, 0.3), T2V: (0.7, 0.3), "flux": (0.7, 0.3)}[family]
    return Batch(
        source=latents(family, 2, 1),
        noise=latents(family, 2, 2),
        t=torch.tensor(t),
        nodes=uniform_nodes(4),
        **{role: texts(family, 2, 10 + index) for index, role in enumerate(TEXTS)},
    )


def embedded_step(folder: Path, family: str, lora: dict[str, Tensor], ema: dict[str, Tensor], batch: Batch, **objective: Any) -> Any:
    """Losses and gradients (by the names of a LoRA file) of the embedded host with the same LoRA."""
    config = embedded_config(folder, family, objective=objective)
    networks = embedded_networks(family)
    made = make_family(config)
    made.load_transformers = lambda dtype: ((name, net.requires_grad_(False)) for name, net in networks.items())  # type: ignore[method-assign]
    host = DiffusersHost(config, made, torch.device("cpu"))
    assert host.parameters.keys() == lora.keys()
    for name, parameter in host.parameters.items():
        parameter.data = lora[name].clone()
    host.ema_weights.load(ema)

    def backward(loss: Tensor, *, last: bool) -> float:
        loss.backward()
        return 1.0

    metrics = make_objective(config.objective).step(host, batch, backward)
    return metrics, {name: p.grad for name, p in host.parameters.items()}


def random_lora(folder: Path, family: str, seed: int) -> dict[str, Tensor]:
    """A LoRA in our names that the host's fused layers can hold: parts of one layer share `down`."""
    config = embedded_config(folder, family)
    host = DiffusersHost(config, _family_of_tiny(config, family), torch.device("cpu"))
    rng = torch.Generator().manual_seed(seed)
    downs: dict[str, Tensor] = {}
    out = {}
    for name, parameter in host.parameters.items():
        expert, _, layer = name.partition(".")
        if layer.endswith(".lora_A.weight"):
            found = lora_formats.FAMILIES[family].find_part(layer.removesuffix(".lora_A.weight"))
            assert found is not None, layer
            out[name] = downs.setdefault(found[0].native, torch.randn(parameter.shape, generator=rng) * 0.2).clone()
        else:
            out[name] = torch.randn(parameter.shape, generator=rng) * 0.2
    return out


def _family_of_tiny(config: Any, family: str) -> Any:
    made = make_family(config)
    networks = embedded_networks(family)
    made.load_transformers = lambda dtype: ((name, net.requires_grad_(False)) for name, net in networks.items())  # type: ignore[method-assign]
    return made


def to_host(lora: dict[str, Tensor], family: str) -> dict[str, Tensor]:
    """Our names -> the host's LoRA file."""
    ours = {f"transformer.{name.partition('.')[2]}": value for name, value in lora.items()}
    return lora_formats.convert(ours, "musubi", family=family)


def host_gradients(it: Rig, lora: dict[str, Tensor], family: str) -> dict[str, Tensor]:
    """The gradients of the host's LoRA by our names: the parts of a fused layer have one `down`, so only the sum of theirs is known."""
    out: dict[str, Tensor] = {}
    named = dict(it.network.named_parameters())
    for name in lora:
        layer, kind = name.partition(".")[2].removesuffix(".weight").rsplit(".lora_", 1)
        found = lora_formats.FAMILIES[family].find_part(layer)
        assert found is not None
        linear, index = found
        base = f"lora_unet_{linear.native.replace('.', '_')}"
        if kind == "A":
            out[name] = named[f"{base}.lora_down.weight"].grad
        else:
            rows = named[f"{base}.lora_up.weight"].grad
            unit = rows.shape[0] // sum(linear.widths)
            out[name] = rows.split([width * unit for width in linear.widths])[index]
    return out


def summed_downs(gradients: dict[str, Tensor], family: str) -> dict[str, Tensor]:
    """Gradients of the parts' `down` added up over each fused layer."""
    sums: dict[str, Tensor] = {}
    native = {}
    for name, value in gradients.items():
        if name.endswith(".lora_A.weight"):
            found = lora_formats.FAMILIES[family].find_part(name.partition(".")[2].removesuffix(".lora_A.weight"))
            assert found is not None
            native[name] = found[0].native
            sums[native[name]] = sums.get(native[name], torch.zeros_like(value)) + value
    return {name: sums[native[name]] if name in native else value for name, value in gradients.items()}


def parity(tmp_path: Path, family: str, recompute: bool) -> dict[str, float]:
    """Largest relative differences of losses and gradients between the hosts."""
    (tmp_path / "embedded").mkdir()
    (tmp_path / "host").mkdir()
    embedded_networks(family)  # skips where there is no embedded host
    lora, ema = (random_lora(tmp_path / "embedded", family, seed) for seed in (5, 6))
    batch = one_batch(family)
    expected, gradients = embedded_step(tmp_path / "embedded", family, lora, ema, batch)
    it = Rig(tmp_path / "host", family, musubi={"gradient_checkpointing": recompute})
    names = {name for name, _ in it.network.named_parameters()}
    for tensors, load in ((lora, it.network.load_state_dict), (ema, it.fields.ema_weights.load)):
        converted = to_host(tensors, family)
        assert names <= converted.keys()
        load({name: value for name, value in converted.items() if name in names or load == it.network.load_state_dict})
    backward = lambda loss, last: it.trainer._backward(it.accelerator, loss, last=last)  # noqa: E731
    found = it.trainer.byg_objective.step(it.fields, batch, backward)
    assert found.keys() == expected.keys()
    # A cosine near 0 is compared with 1, what it can be.
    losses = {
        name: abs(found[name] - value).item() / (1.0 if name.startswith("cosine") else max(abs(value.item()), 1e-3))
        for name, value in expected.items()
    }
    mine, theirs = host_gradients(it, lora, family), summed_downs(gradients, family)
    grads = {name: ((mine[name] - value).norm() / value.norm()).item() for name, value in theirs.items()}
    assert min(value.norm() for value in theirs.values()) > 1e-6, "a comparison with nothing shows nothing"
    return {"losses": max(losses.values()), "gradients": max(grads.values()), "terms": len(expected), "tensors": len(grads)}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_both_hosts_give_the_same_losses_and_gradients(tmp_path: Path, family: str, recompute: bool, record_property: Any):
    worst = parity(tmp_path, family, recompute)
    record_property("parity", worst)
    print(f"parity {family} recompute={recompute}: {worst}")
    assert worst["terms"] >= 10 and worst["tensors"] >= 20
    assert worst["losses"] < 1e-4 and worst["gradients"] < 1e-4


@pytest.mark.parametrize("module", ["networks.loha", "networks.lokr"])
def test_other_networks_of_the_host_train_too(tmp_path: Path, module: str):
    it = Rig(tmp_path, T2V, musubi={"network_module": module})
    backward = lambda loss, last: it.trainer._backward(it.accelerator, loss, last=last)  # noqa: E731
    with torch.no_grad():
        for parameter in it.network.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.1)
    it.trainer.byg_objective.step(it.fields, one_batch(T2V), backward)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in it.network.parameters())


# --- experts and blocks of the real host ---


def test_experts_in_the_order_of_the_passes(tmp_path: Path):
    it = Rig(tmp_path, A14B, musubi={"gradient_checkpointing": True}, objective={"rollout_steps": 8})
    it.wake()
    seen: list[tuple[bool, bool]] = []
    plain = it.fields._call

    def call(*inputs: Any) -> Tensor:
        seen.append((it.trainer.current_model_is_high_noise, torch.is_grad_enabled()))
        assert bool((inputs[1] >= 0.875).all()) == seen[-1][0]
        return plain(*inputs)

    it.fields._call = call
    backward = lambda loss, last: it.trainer._backward(it.accelerator, loss, last=last)  # noqa: E731
    it.trainer.byg_objective.step(it.fields, one_batch(A14B), backward)
    assert {high for high, grad in seen if not grad} == {True, False} and {high for high, grad in seen if grad} == {False}
    assert [grad for _, grad in seen] == sorted(grad for _, grad in seen)


def test_the_wrong_order_of_experts_changes_the_gradient(tmp_path: Path):
    it = Rig(tmp_path, A14B, musubi={"gradient_checkpointing": True})
    it.wake()
    noisy, t, text = latents(A14B, 1, 1), torch.tensor([0.3]), texts(A14B, 1, 3)

    def gradient(wrong: bool) -> Tensor:
        it.network.zero_grad()
        with it.fields.edit() as velocity:
            loss = velocity(noisy, t, text, noisy).square().mean()
            if wrong:
                it.fields._experts.exchange()
            loss.backward()
            if wrong:
                it.fields._experts.exchange()
        return torch.cat([p.grad.flatten() for p in it.network.parameters()])

    right = gradient(False)
    assert (gradient(True) - right).norm() > 0.1 * right.norm()


def one_step(it: Rig, family: str) -> Tensor:
    """The gradients of one step, in one vector."""
    it.network.zero_grad()
    backward = lambda loss, last: it.trainer._backward(it.accelerator, loss, last=last)  # noqa: E731
    it.trainer.byg_objective.step(it.fields, one_batch(family), backward)
    return torch.cat([p.grad.flatten() for p in it.network.parameters()])


@pytest.mark.parametrize("family", [T2V, A14B])
def test_swapped_blocks_are_on_the_device_when_they_compute(tmp_path: Path, family: str):
    """The host's own offloader decides what moves; its moves are recorded as tags, since a CPU has nowhere to move to."""
    from musubi_tuner.modules import custom_offloading_utils as utils

    it = Rig(tmp_path, family)
    it.wake()
    expected = one_step(it, family)
    blocks = it.transformer.blocks
    away: set[int] = set()

    class Tagged(utils.ModelOffloader):
        def _submit_move_blocks(self, every: Any, to_cpu: int, to_cuda: int) -> None:
            away.add(to_cpu)
            away.discard(to_cuda)

        def _wait_blocks_move(self, index: int) -> None:
            return None

        def prepare_block_devices_before_forward(self, every: Any) -> None:
            away.clear()
            away.update(range(self.num_blocks - self.blocks_to_swap, self.num_blocks))

    transformer = it.transformer
    transformer.blocks_to_swap = 2
    transformer.offloader = Tagged("tiny", blocks, len(blocks), 2, True, torch.device("cpu"))
    transformer.prepare_block_swap_before_forward()
    computed: list[int] = []
    for index, block in enumerate(blocks):

        def check(module: Any, inputs: Any, index: int = index) -> None:
            assert index not in away, f"block {index} computes and is not on the device"
            computed.append(index)

        block.register_forward_pre_hook(check)
    with pytest.raises(AssertionError, match="not on the device"):  # without our switches it must fail
        one_step(it, family)
    transformer.prepare_block_swap_before_forward()
    it.fields.swap = BlockSwap(transformer)
    computed.clear()
    for _ in range(2):
        assert torch.equal(one_step(it, family), expected)
    assert len(computed) == 2 * len(blocks) * (4 + 2 + 3), "rollout, frozen passes two at once, passes with gradient"


def stream_blocks(it: Rig, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The host's h2d-only offloader with a CPU's memory in the device's place; the ring and the masters are its own. -> loaded blocks."""
    from musubi_tuner.modules import custom_offloading_utils as utils

    if not hasattr(utils, "LoRAStreamOffloader"):
        pytest.skip("this musubi-tuner has no block_swap_h2d_only")
    loaded: list[int] = []

    class Copier:
        def __init__(self, *_: Any, **__: Any):
            self.reset = self.sync = lambda: None

        def submit(self, key: int, target: Tensor, source: Tensor, gate: Any = None) -> None:
            target.copy_(source)
            loaded.append(key)

        def wait(self, key: int) -> None:
            return None

    monkeypatch.setattr(utils, "_StagedCopier", Copier)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: type("Stream", (), {"record_event": lambda self: None})())
    device: Any = type("Device", (), {"type": "cuda"})()
    blocks = it.transformer.blocks
    offloader = utils.LoRAStreamOffloader("tiny", blocks, len(blocks), 3, True, device, use_pinned_memory=False)
    offloader.device = torch.device("cpu")
    it.transformer.blocks_to_swap, it.transformer.offloader = 3, offloader
    it.transformer.prepare_block_swap_before_forward()
    it.fields.swap = BlockSwap(it.transformer)
    return loaded


def test_streamed_blocks_have_their_own_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Three of four blocks pass through a ring of two: a block that computes with another one's weights changes the gradient."""
    it = Rig(tmp_path, T2V, musubi={"gradient_checkpointing": True})
    it.wake()
    expected = one_step(it, T2V)
    loaded = stream_blocks(it, monkeypatch)
    for _ in range(2):
        loaded.clear()
        assert torch.equal(one_step(it, T2V), expected) and len(set(loaded)) >= 2


def test_streamed_blocks_and_experts_exclude_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Fails once the host's ring follows an exchange of the experts: then allow musubi.block_swap_h2d_only for Wan2.2."""
    it = Rig(tmp_path, A14B, musubi={"gradient_checkpointing": True})
    it.wake()
    expected = one_step(it, A14B)
    stream_blocks(it, monkeypatch)
    assert (one_step(it, A14B) - expected).norm() > 0.01 * expected.norm()


# --- the host's parser ---


@pytest.mark.parametrize("family", [T2V, "flux"])
def test_recorded_surface_is_this_hosts(family: str):
    recorded = json.loads((GOLDEN / "musubi_surfaces.json").read_text(encoding="utf-8"))
    found = musubi_options.surface_of(open_tiny(family).parser())
    expected = musubi_options.surface_from_json(recorded["wan" if family == T2V else "flux"])
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
    with pytest.raises(ValueError, match="it lacks:") as told:
        musubi.open_host(host_config(Path("."), T2V))
    lacking = [line.removeprefix("  - ") for line in str(told.value).splitlines()[1:]]
    starts = ["the seam WanNetworkTrainer.process_batch", "the seam WanNetworkTrainer.on_post_save"]
    starts += ["WanModel.switch_block_swap_for_training", "WanModel.forward(f_indices"]
    assert len(lacking) == 4 and all(line.startswith(start) for line, start in zip(lacking, starts, strict=True))


# --- the whole way, by the host's own loop ---


def child_env(**more: str) -> dict[str, str]:
    path = [str(SITE), str(ROOT), str(Path(PLACE) / "src")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", **more}


def write_work(folder: Path, family: str, items: int = 3) -> None:
    """Weights, the host's latent caches, tuples, and our roles in the text caches."""
    write_weights(folder, family)
    name = "fk" if family == "flux" else "wan"
    cache = folder / "cache"
    cache.mkdir()
    lines = []
    tuples = []
    for index in range(items):
        source = folder / f"photo{index}.png"
        Image.new("RGB", (48, 32), (60 * index, 90, 120)).save(source)
        latent = latents(family, 1, index)[0].bfloat16()
        shape = "1x4x6" if family == "flux" else "2x4x6"
        stored = latent[:, 0] if family == "flux" else latent
        position = "" if family == "flux" else "_00000-005"
        save_file({f"latents_{shape}_bfloat16": stored.contiguous()}, cache / f"photo{index}{position}_0048x0032_{name}.safetensors")
        record = {"source": source.name, **{role: f"{role} {index}" for role in TEXTS}}
        lines.append(json.dumps(record))
    (folder / "tuples.jsonl").write_text("\n".join(lines), encoding="utf-8")
    kind = "image" if family == "flux" else "video"
    frames = "" if family == "flux" else "target_frames = [5]\n"
    toml = (
        f'[general]\nresolution = [48, 32]\nbatch_size = 1\nenable_bucket = false\n[[datasets]]\n{kind}_directory = "{folder.as_posix()}"\n'
    )
    (folder / "dataset.toml").write_text(f'{toml}cache_directory = "{cache.as_posix()}"\n{frames}', encoding="utf-8")
    from byg_plugin.data.tuples import read_tuples_file

    tuples = read_tuples_file(folder / "tuples.jsonl")
    for item, some in musubi_cache.matched(musubi_cache.cached_items(folder / "dataset.toml", name if name == "wan" else "flux"), tuples):
        musubi_cache.write_roles(item, some, lambda text: encoded(family, text), "flux" if family == "flux" else "wan", "tiny")


def encoded(family: str, text: str) -> dict[str, Tensor]:
    seed = sum(map(ord, text))
    found = {name: value[0] for name, value in texts(family, 1, seed).items()}
    return {"t5": found["t5"], "pooled": found["pooled"][None]} if family == "flux" else {"umt5": found["umt5"][:5]}


def write_config(folder: Path, family: str, out: str = "out", **options: Any) -> Path:
    """A TOML file of the run."""
    config = host_config(folder, family, musubi={"output_dir": str(folder / out), "seed": 3, **options})
    lines = ["[model]", f'family = "{family}"', 'host = "musubi"', f'host_path = "{PLACE}"', 'device = "cpu"', "[dataset]"]
    lines += [f'tuples = "{folder / "tuples.jsonl"}"', "[conditioning]", f"max_text_tokens = {TEXT_TOKENS}", "[objective]"]
    lines += ["rollout_steps = 2", "identity_warmup_steps = 1", "ema_decay = 0.9", "[musubi]"]
    lines += [f"{key} = {json.dumps(value)}" for key, value in config.musubi.items()]
    path = folder / f"{out}.toml"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def run_here(config_path: Path, resume: str | None = None) -> Path:
    """Train in this process, by the host's own loop."""
    from byg_plugin.config.loading import load_config

    config = load_config(config_path)
    open_tiny(config.model.family)
    reset_accelerate()
    os.environ["ACCELERATE_USE_CPU"] = "true"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return musubi.train(config, resume)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_hosts_loop_trains_and_saves(tmp_path: Path, family: str):
    write_work(tmp_path, family)
    config = write_config(tmp_path, family, save_every_n_steps=2, save_last_n_steps=2, save_state=True)
    saved = run_here(config)
    names = {path.name for path in saved.parent.iterdir() if path.is_file()}
    assert {"tiny.safetensors", "tiny-ema.safetensors", "tiny-step00000002.safetensors", "tiny-step00000002-ema.safetensors"} <= names
    live, ema = load_file(saved), load_file(saved.with_name("tiny-ema.safetensors"))
    assert live.keys() == ema.keys() and any(not torch.equal(live[name], ema[name]) for name in live)
    assert any(value.abs().max() > 1e-4 for name, value in live.items() if "lora_up" in name)
    with safe_open(saved.with_name("tiny-ema.safetensors"), framework="pt") as file:
        metadata = file.metadata()
    assert (metadata["byg.weights"], metadata["byg.step"], metadata["byg.position"]) == ("ema", "4", "same")
    assert metadata["byg.family"] == family and metadata["ss_network_dim"] == "4" and str(tmp_path) not in json.dumps(metadata)
    with safe_open(saved, framework="pt") as file:
        assert file.metadata()["byg.weights"] == "live" and file.metadata()["byg.resolution"] == "39"
    for to in ("diffusers", "comfyui"):
        assert lora_formats.convert(live, to, family=family)
    state = next(path for path in saved.parent.iterdir() if path.is_dir() and (path / musubi_trainer.STATE).is_file())
    assert musubi_trainer.read_state(state)["step"] in (2, 4) and (state / musubi_trainer.STATE_TENSORS).is_file()


def test_resume_goes_on_at_its_step_with_its_ema(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_work(tmp_path, T2V, items=1)  # one item: the host's order of batches starts over, with one it is the same
    drawn: list[tuple[int, float]] = []
    plain = musubi_trainer.UnpairedCycleTrainer._draw_t

    def draw(self: Any, size: int, rng: Any, step: int) -> Tensor:
        t = plain(self, size, rng, step)
        drawn.append((step, t[0].item()))
        return t

    monkeypatch.setattr(musubi_trainer.UnpairedCycleTrainer, "_draw_t", draw)
    whole = run_here(write_config(tmp_path, T2V, "whole"))
    uninterrupted, drawn[:] = list(drawn), []
    run_here(write_config(tmp_path, T2V, "half", max_train_steps=2, save_state=True))
    state = musubi_trainer.states(tmp_path / "half")[-1]
    second = write_config(tmp_path, T2V, "half", save_state=False)
    with pytest.raises(ValueError, match="go on with --resume"):
        run_here(second)
    with pytest.raises(ValueError, match="so name the folder: --resume"):
        run_here(second, "latest")
    saved = run_here(second, str(state))
    assert drawn == uninterrupted
    resumed = saved.with_name("tiny-from000002.safetensors")
    for ending in ("", "-ema"):
        a, b = (load_file(path.with_name(f"{path.stem}{ending}.safetensors")) for path in (whole, resumed))
        assert all(torch.allclose(a[name], b[name], atol=1e-6) for name in a), ending
    with safe_open(resumed.with_name("tiny-from000002-ema.safetensors"), framework="pt") as file:
        assert file.metadata()["byg.step"] == "4"
    with pytest.raises(ValueError, match="raise it, nothing is left to do"):
        run_here(write_config(tmp_path, T2V, "half", max_train_steps=2), str(state))
    with pytest.raises(ValueError, match="no state of this plugin there"):
        run_here(second, str(tmp_path))


def test_a_role_missing_in_a_cache_stops_the_run(tmp_path: Path):
    write_work(tmp_path, T2V)
    path = tmp_path / "cache" / "photo1_wan_te.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    left = {name: value for name, value in load_file(path).items() if "reverse_instruction_umt5" not in name}
    save_file(left, path, metadata=metadata)
    with pytest.raises(ValueError, match="photo1_wan_te.safetensors: reverse_instruction is not cached: it has no umt5; remove it and run"):
        run_here(write_config(tmp_path, T2V))


def test_ranks_draw_different_noise(tmp_path: Path):
    it = rig(T2V)
    Accelerator(cpu=True)  # the autocast of those below asks for accelerate's state
    batch = {
        f"byg_{role}_{part}": value
        for role in TEXTS
        for part, value in (("umt5", [torch.ones(3, WAN_TEXT)]), ("lengths", [torch.tensor([3])]))
    }
    seen = []
    it.trainer.byg_objective, kept = (
        type("Spy", (), {"step": lambda self, f, b, back: seen.append(b) or {"loss": torch.ones(())}})(),
        it.trainer.byg_objective,
    )
    for rank in (0, 1):
        accelerator = type("Rank", (), {"device": torch.device("cpu"), "num_processes": 2, "process_index": rank, "scaler": None})()
        it.trainer.byg_progress.micro = 0
        it.trainer.process_batch(it.args, accelerator, it.transformer, it.network, batch, latents(T2V, 1, 1))
    it.trainer.byg_objective, it.trainer.byg_progress.micro = kept, 0
    assert not torch.equal(seen[0].noise, seen[1].noise) and seen[0].t != seen[1].t and seen[0].identity_step == seen[1].identity_step


@pytest.mark.timeout(1800)  # three interpreters start
def test_two_processes_train_one_lora_on_different_noise(tmp_path: Path):
    write_work(tmp_path, T2V, items=4)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(SITE / "one_rank.py")]
    command += [str(write_config(tmp_path, T2V, max_train_steps=3)), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=child_env(BYG_TINY_HOST="1"), check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    one, other = (json.loads((tmp_path / f"rank{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1))
    assert len(one["t"]) == len(other["t"]) == 3 and not set(one["t"]) & set(other["t"])
    assert one["weights"] == other["weights"] and any(abs(v) > 1e-4 for name, v in one["weights"].items() if "lora_up" in name)


@pytest.mark.timeout(1800)  # three interpreters start
def test_accelerate_launch_of_the_command(tmp_path: Path):
    write_work(tmp_path, T2V)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--mixed_precision", "no"]
    command += [str(ROOT / "byg_plugin/train_network.py"), "--config", str(write_config(tmp_path, T2V))]
    environment = child_env(BYG_TINY_HOST="1")
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "out" / "tiny-ema.safetensors").is_file() and f"LoRA: {tmp_path / 'out' / 'tiny.safetensors'}" in done.stdout


@pytest.mark.timeout(1800)  # three interpreters start
def test_readmes_commands_lead_to_a_preview(tmp_path: Path):
    """As printed, in a folder with the recipe's files: tiny weights, one picture, two steps."""
    models = open_tiny("flux").module("flux.flux_models")
    for name in ("models", "data/images"):
        (tmp_path / name).mkdir(parents=True)
    write_weights(tmp_path, "flux")
    (tmp_path / "dit.safetensors").rename(tmp_path / "models/flux1-dev.safetensors")
    torch.manual_seed(0)
    save_file(models.AutoEncoder(models.configs_flux_dev_context.ae_params).state_dict(), tmp_path / "models/ae.safetensors")
    for name in ("t5xxl_fp16", "clip_l"):
        (tmp_path / f"models/{name}.safetensors").touch()
    Image.new("RGB", (64, 48), (40, 90, 200)).save(tmp_path / "data/images/parrots.jpg")
    (tmp_path / "data/images/parrots.txt").write_text("not used", encoding="utf-8")
    tuples = {"source": "images/parrots.jpg", **{role: f"{role} of parrots" for role in TEXTS}}
    (tmp_path / "data/tuples.jsonl").write_text(json.dumps(tuples), encoding="utf-8")
    (tmp_path / "data/preview_prompts.txt").write_text("make it snow --ci data/images/parrots.jpg --w 64 --h 48 --s 2 --d 1\n")
    places = "".join(f'{key} = "data/images"\n' for key in ("image_directory", "control_directory"))
    general = '[general]\nresolution = [64, 48]\nbatch_size = 1\ncaption_extension = ".txt"\n'
    (tmp_path / "data/musubi_dataset.toml").write_text(f'{general}[[datasets]]\n{places}cache_directory = "data/cache"\n', encoding="utf-8")

    text = (ROOT / "README.md").read_text(encoding="utf-8").partition("Already using musubi-tuner?")[2]
    commands = [line.split(" #")[0].split() for line in text.partition("```bash\n")[2].partition("```")[0].splitlines()]
    assert len(commands) <= 5 and commands.pop(0)[:2] == ["pip", "install"]
    short = [f"--set=musubi.{word}" for word in ("max_train_steps=2", "sample_every_n_steps=1", "gradient_accumulation_steps=1")]
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    for words in commands:
        words = [word.replace("../byg_plugin", str(ROOT)) for word in words]
        if words[0] == "cp":
            text = Path(words[1]).read_text(encoding="utf-8")
            (tmp_path / words[2]).write_text(text.replace("[musubi]\n", "[musubi]\nmax_data_loader_n_workers = 0\n"), encoding="utf-8")
            continue
        if words[0] == "accelerate":
            words = ["python", *launch, *words[2:], *short]
        if not (ROOT / words[1]).exists() and words[1].startswith("flux"):
            words[1] = str(Path(PLACE) / words[1])
        environment = child_env(BYG_TINY_HOST="1")
        done = subprocess.run([sys.executable, *words[1:]], capture_output=True, text=True, env=environment, check=False, cwd=tmp_path)
        assert done.returncode == 0, f"{words}: {done.stdout[-1500:]} {done.stderr[-3000:]}"
    previews = sorted((tmp_path / "out/musubi_flux/sample").iterdir())
    assert len(previews) >= 3, "before the first step and after each"
    with Image.open(previews[0]) as picture:
        assert picture.size == (64, 48)
    assert (tmp_path / "out/musubi_flux/byg_flux-ema.safetensors").is_file()


def test_a_wrong_option_stops_before_anything_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from byg_plugin.config.loading import load_config

    write_work(tmp_path, T2V)
    monkeypatch.setattr(musubi, "make_trainer", lambda *_: pytest.fail("the run went on"))
    for setting, says in (("learning_rat=1", "did you mean musubi.learning_rate"), ("mixed_precision=bf-16", "did you mean 'bf16'")):
        with pytest.raises(ValueError, match=says):
            musubi.train(load_config(write_config(tmp_path, T2V), [f"musubi.{setting}"]))


def test_preview_is_an_edit_of_its_source(tmp_path: Path):
    """The host's sampling calls our inference: from its prompt file to pixels, with a stand-in for the autoencoder."""
    it = rig("flux")

    class Vae:
        dtype = torch.float32

        def to(self, *_: Any) -> Any:
            return self

        def encode(self, pixels: Tensor) -> Tensor:
            assert pixels.shape[1:] == (3, 32, 48) and pixels.abs().max() <= 1
            return pixels.mean((1, 2, 3), keepdim=True).expand(-1, 16, 4, 6)

        def decode(self, x: Tensor) -> Tensor:
            return x[:, :3].repeat_interleave(8, 2).repeat_interleave(8, 3)

    pictures = []
    for shade, live in ((0, True), (255, True), (255, False)):
        if not live:
            for parameter in it.network.parameters():
                parameter.data.zero_()
        Image.new("RGB", (60, 40), (shade, 30, 30)).save(tmp_path / "a.png")
        one = texts("flux", 1, 1)
        prompt = {"t5_vec": one["t5"], "clip_l_pooler": one["pooled"], "control_image_path": [str(tmp_path / "a.png")]}
        generator = torch.Generator().manual_seed(1)
        args = (it.accelerator, it.args, prompt, Vae(), None, it.transformer, 1.0, 2, 48, 32, 1, generator, False, 1.0, None)
        pictures.append(it.trainer.do_inference(*args, image_path=None, control_video_path=None))
    it.wake()
    assert pictures[0].shape == (1, 3, 1, 32, 48) and not torch.equal(*pictures[:2])
    assert torch.equal(*pictures[1:]), "the average edits, not the current weights"
    (tmp_path / "prompts.txt").write_text("make it snow\n", encoding="utf-8")
    with pytest.raises(ValueError, match="prompt 1 has no source; add --ci IMAGE"):
        it.trainer.process_sample_prompts(it.args, it.accelerator, str(tmp_path / "prompts.txt"))


@pytest.mark.parametrize("family", [A14B, "flux"])
def test_edit_of_the_embedded_host_takes_the_lora(tmp_path: Path, family: str):
    from byg_plugin.edit import EditPipeline
    from tests.support.tiny import model_folder

    embedded_networks(family)  # skips where there is no embedded host
    if family == "flux":
        model = model_folder()
    else:
        from tests.support.tiny_wan import write_wan

        model = write_wan(tmp_path / "model", 2, num_layers=BLOCKS)
    write_work(tmp_path, family)
    saved = run_here(write_config(tmp_path, family)).with_name("tiny-ema.safetensors")
    Image.new("RGB", (64, 64), (20, 90, 160)).save(tmp_path / "photo.png")
    edits = []
    for strength in (1.0, 0.0):
        options = {"device": "cpu", "dtype": "float32", "resolution": 64, "strength": strength}
        pipeline = EditPipeline.from_lora(saved, model=str(model), **options)
        edits.append(pipeline(tmp_path / "photo.png", "make the sky red", steps=2))
    assert edits[0].size == (64, 64) and edits[0].tobytes() != edits[1].tobytes()


# --- caches, by the host's own reading of its dataset ---


@pytest.mark.parametrize("family", [T2V, "flux"])
def test_the_cache_step_adds_roles_to_the_hosts_items(tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    write_work(tmp_path, family)
    place = "fk" if family == "flux" else "wan"
    for path in (tmp_path / "cache").glob("*_te.safetensors"):
        path.unlink()
    for name in ("t5", "clip"):
        (tmp_path / f"{name}.safetensors").touch()
    encoders = {"text_encoder1": "t5", "text_encoder2": "clip"} if family == "flux" else {"t5": "t5"}
    options = {option: str(tmp_path / f"{name}.safetensors") for option, name in encoders.items()}
    config = host_config(tmp_path, family, musubi=options)
    open_tiny(family)
    asked: list[str] = []

    def encode(host: Any, config: Any, some: list[str]) -> Any:
        asked.extend(some)
        return {text: encoded(family, text) for text in some}

    monkeypatch.setattr(musubi, "encode_texts", encode)
    musubi.cache_texts(config)
    assert len(asked) == 12 and "3 items' texts cached, 0 were current" in capsys.readouterr().out
    assert musubi_cache.check(tmp_path / "dataset.toml", "flux" if family == "flux" else "wan", musubi.training_tuples(config)) == 3

    # The host's own caching, before or after, and ours leave each other's tensors.
    from musubi_tuner.dataset import cache_io
    from musubi_tuner.dataset.image_video_dataset import ItemInfo

    item = ItemInfo("photo0", "theirs", (48, 32))
    item.text_encoder_output_cache_path = str(tmp_path / "cache" / f"photo0_{place}_te.safetensors")
    if family == "flux":
        cache_io.save_text_encoder_output_cache_flux_kontext(item, torch.ones(8, 24), torch.ones(20))
    else:
        cache_io.save_text_encoder_output_cache_wan(item, torch.ones(3, WAN_TEXT))
    asked.clear()
    text = (tmp_path / "tuples.jsonl").read_text(encoding="utf-8").replace("instruction 0", "another 0", 1)
    (tmp_path / "tuples.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"texts that have changed since they were cached \(photo0\)"):
        musubi.prepare(host_config(tmp_path, family, musubi=options))
    musubi.cache_texts(config)
    assert len(asked) == 4, "only the changed item's texts"
    written = load_file(item.text_encoder_output_cache_path)
    assert any(name.startswith("varlen_byg_") for name in written) and any("t5" in name and "byg" not in name for name in written)


# --- previews in the host's loop ---


class TinyVae:
    """Stands for the host's autoencoder: means of 8 x 8 pixels, every fourth frame."""

    dtype = torch.float32

    def __init__(self, family: str):
        self.family = family

    def to(self, *_: Any) -> Any:
        return self

    def eval(self) -> Any:
        return self

    def requires_grad_(self, *_: Any) -> Any:
        return self

    def encode(self, pixels: Tensor) -> Any:
        pixels = pixels if pixels.ndim == 5 else pixels[:, :, None]
        small = torch.nn.functional.avg_pool3d(pixels, (1, 8, 8))[:, :, ::4].mean(1, keepdim=True).expand(-1, 16, -1, -1, -1)
        return small[:, :, 0] if self.family == "flux" else list(small)

    def decode(self, latents: Any) -> Any:
        x = latents if isinstance(latents, Tensor) else torch.stack(list(latents))
        big = x[:, :3].repeat_interleave(8, -1).repeat_interleave(8, -2)
        return big if self.family == "flux" else list(big.repeat_interleave(4, 2)[:, :, 3:])


@pytest.mark.parametrize("family", [A14B, "flux"])
def test_previews_in_the_hosts_loop(tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch):
    write_work(tmp_path, family)
    (tmp_path / "prompts.txt").write_text(
        f"make it snow --ci {tmp_path / 'photo0.png'} --w 48 --h 32 --s 2 --d 1 --f 1\n", encoding="utf-8"
    )
    host = open_tiny(family)

    def prompts(self: Any, args: Any, accelerator: Any, place: str) -> Any:
        found = host.trainer.load_prompts(place)
        for prompt in found:
            one = texts(family, 1, 1)
            prompt |= {"t5_vec": one["t5"], "clip_l_pooler": one["pooled"]} if family == "flux" else {"t5_embeds": one["umt5"][0, :5]}
        return found

    monkeypatch.setattr(host.trainer_class, "process_sample_prompts", prompts)
    monkeypatch.setattr(host.trainer_class, "load_vae", lambda self, *_, **__: TinyVae(family))
    base = importlib.import_module("musubi_tuner.training.trainer_base")
    saved: list[Tensor] = []

    def save(video: Tensor, *_: Any, **__: Any) -> list[str]:
        saved.append(video)
        return []

    monkeypatch.setattr(base, "save_images_grid", save)
    files = ("vae", *musubi_options.ENCODERS["flux" if family == "flux" else "wan"])
    options = {
        **dict.fromkeys(files, str(tmp_path / "dit.safetensors")),
        "sample_prompts": str(tmp_path / "prompts.txt"),
        "sample_every_n_steps": 2,
        "sample_at_first": True,
    }
    run_here(write_config(tmp_path, family, max_train_steps=2, **options))
    assert len(saved) >= 2 and all(video.shape == (1, 3, 1, 32, 48) for video in saved)
    assert not torch.equal(saved[0], saved[-1]), "the weights have changed in between"


# --- memory options that a CPU can run ---


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_checkpointing": True, "gradient_checkpointing_cpu_offload": True},
        {"split_attn": True, "gradient_accumulation_steps": 2, "max_train_steps": 2},
        {"network_dropout": 0.1, "gradient_checkpointing": True, "network_args": ["rank_dropout=0.1", "module_dropout=0.1"]},
        {"offload_inactive_dit": True, "gradient_checkpointing": True},
        {"lr_scheduler": "cosine", "lr_warmup_steps": "10%", "max_grad_norm": 0.5, "optimizer_args": ["weight_decay=0.1"]},
    ],
    ids=lambda options: next(iter(options)),
)
def test_memory_and_optimizer_options_run(tmp_path: Path, options: dict[str, Any]):
    write_work(tmp_path, A14B)
    saved = run_here(write_config(tmp_path, A14B, **options))
    assert all(value.isfinite().all() for value in load_file(saved).values())


@pytest.mark.parametrize(
    ("family", "scaled"),
    [(A14B, True), ("flux", True), ("flux", False)],  # unscaled, the host's Wan needs an autocast to float32, which a CPU has not
)
def test_a_base_of_8_bit_weights(tmp_path: Path, family: str, scaled: bool, monkeypatch: pytest.MonkeyPatch):
    write_work(tmp_path, family)
    dtypes: set[torch.dtype] = set()
    plain = musubi_trainer.UnpairedCycleTrainer.on_train_start

    def look(self: Any, args: Any, accelerator: Any, network: Any, transformer: Any, *rest: Any) -> None:
        dtypes.update(parameter.dtype for parameter in transformer.parameters())
        plain(self, args, accelerator, network, transformer, *rest)

    monkeypatch.setattr(musubi_trainer.UnpairedCycleTrainer, "on_train_start", look)
    options = {"fp8_base": True, "fp8_scaled": scaled, "mixed_precision": "bf16", "gradient_checkpointing": True}
    saved = run_here(write_config(tmp_path, family, max_train_steps=2, **options))
    weights = load_file(saved)
    assert torch.float8_e4m3fn in dtypes and all(value.isfinite().all() for value in weights.values())
    assert any(value.abs().max() > 1e-4 for name, value in weights.items() if "lora_up" in name)


@pytest.mark.timeout(1800)
def test_a_compiled_network_gives_the_same(tmp_path: Path):
    write_work(tmp_path, T2V, items=1)
    plain = load_file(run_here(write_config(tmp_path, T2V, "plain")))
    compiled = load_file(run_here(write_config(tmp_path, T2V, "compiled", compile=True, compile_backend="eager")))
    assert all(torch.allclose(plain[name], compiled[name], atol=1e-5) for name in plain)
