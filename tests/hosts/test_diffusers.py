"""The embedded host on a tiny random FLUX: three velocity fields over one set of weights, LoRA files, storage, attention."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from byg_plugin import timesteps
from byg_plugin.config.sections import Config
from byg_plugin.hosts import quantize
from byg_plugin.hosts.diffusers import DiffusersHost, lora_shapes, matched_linears
from byg_plugin.lora.formats import write_lora
from byg_plugin.models import flux_files
from byg_plugin.models.flux import DEFAULT_TARGETS, FluxFamily
from byg_plugin.objectives import make_objective
from byg_plugin.objectives.base import Batch
from tests.support.tiny import TINY_FLUX, make_host, model_folder, tiny_config, tiny_flux, tiny_texts, wake, write_model


def host_config(tmp_path: Path, **sections: dict[str, Any]) -> Config:
    model = {"path": str(model_folder())} | sections.pop("model", {})
    return tiny_config(tmp_path, model=model, **sections)


def batch_of(size: int = 2, seed: int = 0) -> Batch:
    rng = torch.Generator().manual_seed(seed)
    shape = (size, 16, 1, 8, 8)
    texts = {role: tiny_texts(size, 10 + i) for i, role in enumerate(("src_caption", "tgt_caption", "instruction", "reverse_instruction"))}
    return Batch(
        source=torch.randn(shape, generator=rng),
        noise=torch.randn(shape, generator=rng),
        t=torch.linspace(0.31, 0.83, size),
        nodes=timesteps.uniform_nodes(3),
        **texts,
    )


def without_lora(batch: Batch) -> Tensor:
    """The velocity of the very network that the host loads, made by code that knows no LoRA."""
    config = tiny_config(Path("unused"), model={"path": str(model_folder())})
    network = flux_files.load_flux_transformer(model_folder(), dtype=torch.float32)
    with torch.no_grad():
        return FluxFamily(config).velocity(network, batch.noise, batch.t, batch.src_caption, None)


def base_of(host: DiffusersHost, batch: Batch) -> Tensor:
    with host.base() as velocity:
        return velocity(batch.noise, batch.t, batch.src_caption, None)


def live_of(host: DiffusersHost, batch: Batch) -> Tensor:
    with host.live() as velocity:
        return velocity(batch.noise, batch.t, batch.src_caption, None)


def ema_of(host: DiffusersHost, batch: Batch) -> Tensor:
    with host.ema() as velocity:
        return velocity(batch.noise, batch.t, batch.src_caption, None)


def backward(loss: Tensor, *, last: bool) -> float:
    loss.backward()
    return 1.0


def gradients(host: DiffusersHost) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in host.parameters.items() if p.grad is not None}
    for parameter in host.parameters.values():
        parameter.grad = None
    assert found, "nothing got a gradient"
    return found


def relative_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(((a[n] - b[n]).norm() / b[n].norm().clamp(min=1e-12)).item() for n in a)


# --- base, edit, ema ---


def test_base_is_the_model_without_lora_before_inside_and_after_a_step(tmp_path: Path):
    host, batch = make_host(host_config(tmp_path)), batch_of()
    wanted = without_lora(batch)
    live, ema = live_of(host, batch), ema_of(host, batch)
    assert not torch.equal(live, wanted) and not torch.equal(ema, wanted) and not torch.equal(live, ema), "the LoRA is asleep"
    assert torch.equal(base_of(host, batch), wanted)
    with host.edit(), host.ema():
        assert torch.equal(base_of(host, batch), wanted)
    make_objective(host.config.objective).step(host, batch, backward)
    torch.optim.AdamW(host.parameters.values(), lr=0.1).step()
    host.ema_weights.update(1)
    assert torch.equal(base_of(host, batch), wanted)
    assert not torch.equal(live_of(host, batch), live), "the step moved nothing"


@pytest.mark.parametrize("phase", ["ema", "base", "edit"])
@pytest.mark.parametrize("call", [0, 1])
def test_an_exception_inside_a_phase_leaves_all_fields_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: str, call: int):
    host, batch = make_host(host_config(tmp_path, lora={"dropout": 0.3})), batch_of()
    before = [f(host, batch) for f in (base_of, live_of, ema_of)]
    weights = {n: p.detach().clone() for n, p in host.parameters.items()}
    original: Callable[..., Any] = getattr(host, phase)
    seen = []

    @contextmanager
    def failing() -> Iterator[Any]:
        with original() as velocity:

            def broken(*args: Any) -> Tensor:
                seen.append(1)
                if len(seen) > call:
                    raise RuntimeError("inside the phase")
                return velocity(*args)

            yield broken

    monkeypatch.setattr(host, phase, failing)
    with pytest.raises(RuntimeError, match="inside the phase"):
        make_objective(host.config.objective).step(host, batch, backward)
    monkeypatch.undo()
    assert len(seen) == call + 1
    for f, wanted in zip((base_of, live_of, ema_of), before, strict=True):
        assert torch.equal(f(host, batch), wanted)
    assert torch.equal(before[0], without_lora(batch))
    assert all(torch.equal(p, weights[n]) and p.requires_grad for n, p in host.parameters.items())
    assert not any(m.training for m in host._dropouts)


def test_contexts_restore_what_they_found_when_nested(tmp_path: Path):
    host, batch = make_host(host_config(tmp_path)), batch_of()
    wanted = without_lora(batch)
    with host.base():
        with host.base():
            pass
        # The inner exit must not switch the LoRA on again.
        assert torch.equal(live_of(host, batch), wanted)
    assert not torch.equal(live_of(host, batch), wanted)


def test_ema_swaps_pointers_and_puts_the_live_weights_back(tmp_path: Path):
    host = make_host(host_config(tmp_path))
    name, parameter = next(iter(host.parameters.items()))
    place, shadow = parameter.data_ptr(), host.ema_weights.state()[name].clone()
    assert not torch.equal(parameter, shadow)
    with host.ema():
        assert torch.equal(parameter, shadow)
        assert not torch.is_grad_enabled()
    assert parameter.data_ptr() == place and torch.is_grad_enabled()


def test_ema_with_decay_0_is_the_live_lora(tmp_path: Path):
    host, batch = make_host(host_config(tmp_path, objective={"ema_decay": 0.0})), batch_of()
    assert torch.equal(ema_of(host, batch), live_of(host, batch))


def test_ema_follows_with_its_ramp(tmp_path: Path):
    host = make_host(host_config(tmp_path, objective={"ema_decay": 0.9}))
    name, parameter = next(iter(host.parameters.items()))
    old = host.ema_weights.state()[name].clone()
    host.ema_weights.update(1)
    decay = 2 / 11  # below 0.9: the ramp (1 + 1) / (10 + 1)
    torch.testing.assert_close(host.ema_weights.state()[name], decay * old + (1 - decay) * parameter.detach())
    old = host.ema_weights.state()[name].clone()
    host.ema_weights.update(10_000)
    torch.testing.assert_close(host.ema_weights.state()[name], 0.9 * old + 0.1 * parameter.detach())


def test_dropout_is_active_in_edit_alone_and_only_with_gradient(tmp_path: Path):
    host, batch = make_host(host_config(tmp_path, lora={"dropout": 0.5})), batch_of()

    def differs(velocity: Any) -> bool:
        a, b = (velocity(batch.noise, batch.t, batch.instruction, batch.source) for _ in range(2))
        return not torch.equal(a, b)

    with host.edit() as velocity:
        assert differs(velocity)
    with host.ema() as velocity:
        assert not differs(velocity)
    with host.live() as velocity:
        assert not differs(velocity)
    with torch.no_grad(), host.edit() as velocity:  # a validation
        assert not differs(velocity)
    assert torch.equal(base_of(host, batch), without_lora(batch))


def test_only_the_lora_is_trained_and_in_float32(tmp_path: Path):
    host, batch = make_host(host_config(tmp_path, model={"dtype": "bfloat16"}, train={"mixed_precision": "bf16"})), batch_of()
    lora = {id(p) for p in host.parameters.values()}
    every = list(host.networks["transformer"].named_parameters())
    assert {id(p) for _, p in every if p.requires_grad} == lora
    make_objective(host.config.objective).step(host, batch, backward)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 and p.grad.abs().sum() > 0 for p in host.parameters.values())
    frozen = [p for _, p in every if id(p) not in lora]
    assert frozen and all(p.grad is None and p.dtype == torch.bfloat16 and not p.requires_grad for p in frozen)


def test_a_cpu_in_bfloat16_takes_plain_attention_where_a_gradient_is_wanted_alone(tmp_path: Path, monkeypatch):
    host, batch = make_host(host_config(tmp_path, model={"dtype": "bfloat16"}, train={"mixed_precision": "bf16"})), batch_of()
    made, fused = type(host.family).velocity, []

    def velocity(*args):
        fused.append(torch.backends.cuda.flash_sdp_enabled())  # of a CPU's fused attention too
        return made(*args)

    monkeypatch.setattr(type(host.family), "velocity", velocity)
    for context in (host.edit, host.live):
        with context() as field:
            field(batch.noise, batch.t, batch.instruction, batch.source)
    assert fused == [False, True] and torch.backends.cuda.flash_sdp_enabled()


def test_the_base_takes_no_source(tmp_path: Path):
    host, batch = make_host(host_config(tmp_path)), batch_of()
    with host.base() as velocity, pytest.raises(AssertionError, match="no source tokens"):
        velocity(batch.noise, batch.t, batch.instruction, batch.source)


# --- gradients ---


def step_gradients(host: DiffusersHost, objective: dict[str, Any], accumulation: int = 1) -> dict[str, Tensor]:
    config = host.config.objective.model_copy(update=objective)
    for micro in range(accumulation):

        def scaled(loss: Tensor, *, last: bool) -> float:
            (loss / accumulation).backward()
            return 1 / accumulation

        make_objective(config).step(host, batch_of(seed=micro), scaled)
    return gradients(host)


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("switches", [{}, {"merge_identity": True}, {"routing": False}], ids=["plain", "merged", "unrouted"])
def test_sequential_is_joint(tmp_path: Path, accumulation: int, switches: dict[str, bool]):
    host = make_host(host_config(tmp_path))
    sequential = step_gradients(host, {"graph": "sequential", **switches}, accumulation)
    joint = step_gradients(host, {"graph": "joint", **switches} | {"merge_identity": False}, accumulation)
    assert relative_difference(sequential, joint) <= 1e-5
    # The term that joins the passes is large enough to be missed.
    no_cycle = step_gradients(host, {"graph": "joint", "lambda_cycle": 0.0}, accumulation)
    assert relative_difference(no_cycle, joint) > 1e-2


def test_gradient_checkpointing_gives_the_same_gradients(tmp_path: Path):
    plain = make_host(host_config(tmp_path))
    recomputed = make_host(host_config(tmp_path, model={"gradient_checkpointing": True}))
    calls = []
    recomputed.networks["transformer"].transformer_blocks[0].register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    wanted, got = step_gradients(plain, {}), step_gradients(recomputed, {})
    assert relative_difference(got, wanted) <= 1e-6
    assert sum(calls) == 6, "3 passes with gradient, each computed twice"


@pytest.mark.parametrize("storage", ["none", "fp8"])
def test_checkpointing_with_dropout_recomputes_the_same_masks(tmp_path: Path, storage: str):
    both = []
    for checkpointing in (False, True):
        model = {"gradient_checkpointing": checkpointing, "quantization": storage}
        host = make_host(host_config(tmp_path, model=model, lora={"dropout": 0.4}))
        torch.manual_seed(3)
        both.append(step_gradients(host, {}))
    assert relative_difference(*both) <= 1e-6


# --- storage of the frozen weights ---


def fp8_pair(dtype: torch.dtype = torch.float32) -> tuple[quantize.Fp8Linear, Tensor]:
    torch.manual_seed(0)
    linear = nn.Linear(24, 40).to(dtype)
    linear.weight.data[3] = 0  # a dead row
    linear.weight.data[5] *= 100
    return quantize.Fp8Linear.from_linear(linear.requires_grad_(False)), torch.randn(2, 7, 24, dtype=dtype)


def test_fp8_forward_and_input_gradient(tmp_path: Path):
    linear, x = fp8_pair()
    one, two = x.clone().requires_grad_(), x.clone().requires_grad_()
    out, wanted = linear(one), quantize.linear_reference(two, linear)
    torch.testing.assert_close(out, wanted)
    weight = torch.randn_like(out)
    (out * weight).sum().backward()
    (wanted * weight).sum().backward()
    torch.testing.assert_close(one.grad, two.grad)
    assert torch.isfinite(out).all() and torch.isfinite(one.grad).all()


def test_fp8_is_near_the_original():
    torch.manual_seed(0)
    plain = nn.Linear(64, 64)
    stored = quantize.Fp8Linear.from_linear(plain)
    x = torch.randn(32, 64)
    error = (stored(x) - plain(x)).norm() / plain(x).norm()
    assert 1e-4 < error < 0.05, "3 bits of mantissa"
    assert stored.weight.dtype == quantize.FP8


def test_fp8_keeps_no_16_bit_weight_in_the_graph():
    linear, x = fp8_pair(torch.bfloat16)
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    x.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        linear(x).sum().backward()
        assert any(t.dtype == quantize.FP8 for t in saved)
        assert not [t.dtype for t in saved if t.numel() >= linear.weight.numel() and t.dtype != quantize.FP8]
        saved.clear()
        quantize.linear_reference(x, linear).sum().backward()
        assert [t for t in saved if t.numel() >= linear.weight.numel() and t.dtype == torch.bfloat16], "the hook sees nothing"


def test_fp8_under_autocast_computes_in_its_dtype():
    linear, x = fp8_pair()
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x).dtype == torch.bfloat16


def wide_config(tmp_path: Path, **model: Any) -> Config:
    """Widths of multiples of 64, as bitsandbytes' blocks want them."""
    write_model(tmp_path / "wide", attention_head_dim=32, axes_dims_rope=(4, 14, 14))
    return tiny_config(tmp_path, model={"path": str(tmp_path / "wide"), "dtype": "bfloat16"} | model, train={"mixed_precision": "bf16"})


@pytest.mark.parametrize(("storage", "tolerance"), [("fp8", 0.25), ("int8", 0.15), ("nf4", 0.6)])
def test_stored_networks_train_and_their_base_has_no_lora(tmp_path: Path, storage: str, tolerance: float):
    if storage != "fp8":
        pytest.importorskip("bitsandbytes")
    batch = batch_of()
    plain = make_host(wide_config(tmp_path))
    host = make_host(wide_config(tmp_path, quantization=storage))
    kinds = {type(m).__name__ for n, m in host.networks["transformer"].named_modules() if n.endswith("to_q.base_layer")}
    assert kinds == {{"fp8": "Fp8Linear", "int8": "Linear8bitLt", "nf4": "Linear4bit"}[storage]}
    wanted, base = base_of(plain, batch), base_of(host, batch)
    error = (base - wanted).norm() / wanted.norm()
    assert 0 < error < tolerance
    assert not torch.equal(live_of(host, batch), base)
    grads = step_gradients(host, {})
    assert all(torch.isfinite(g).all() and g.abs().sum() > 0 for g in grads.values())
    assert torch.equal(base_of(host, batch), base)
    live = live_of(host, batch)
    wake(host, seed=77)
    assert not torch.equal(live_of(host, batch), live) and torch.equal(base_of(host, batch), base)


def test_layers_of_one_input_keep_it_once_for_backward_and_compute_the_same(tmp_path: Path):
    """PEFT's own way makes a float32 copy for each LoRA layer, and autocast a bfloat16 copy of that one, which is kept."""

    def step(peft_casts: bool) -> tuple[int, dict[str, Tensor]]:
        host = make_host(host_config(tmp_path, model={"dtype": "bfloat16"}, train={"mixed_precision": "bf16"}))
        for layer in host._lora_layers:
            assert not layer.cast_input_dtype_enabled
            layer.cast_input_dtype_enabled = peft_casts
        kept: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with host.edit() as velocity, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            batch = batch_of()
            out = velocity(batch.noise, batch.t, batch.instruction, batch.source).square().sum()
        size = sum(kept.values())
        out.backward()
        return size, gradients(host)

    (ours, got), (theirs, wanted) = step(False), step(True)
    assert got.keys() == wanted.keys() and all(torch.equal(got[name], wanted[name]) for name in got)
    assert ours < theirs


def test_only_linears_inside_blocks_are_stored_in_8_bits():
    network = tiny_flux()
    quantize.quantize_(network, "fp8", torch.float32)
    kinds = {name: type(m) for name, m in network.named_modules() if isinstance(m, nn.Linear)}
    assert kinds["transformer_blocks.0.attn.to_q"] is quantize.Fp8Linear
    assert all(kinds[name] is nn.Linear for name in ("x_embedder", "context_embedder", "proj_out", "norm_out.linear"))


def test_a_16_bit_weight_is_freed_before_the_next_is_quantised(monkeypatch: pytest.MonkeyPatch):
    network, dead = tiny_flux(), []
    weights = [weakref.ref(m.weight) for name, m in network.named_modules() if type(m) is nn.Linear and "blocks." in name]
    quantised = quantize._quantized
    monkeypatch.setattr(quantize, "_quantized", lambda *of: (dead.append(sum(w() is None for w in weights)), quantised(*of))[1])
    quantize.quantize_(network, "fp8", torch.float32)
    assert dead == list(range(len(weights)))


def test_bitsandbytes_missing_names_the_install_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from byg_plugin.config import extras

    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == "bitsandbytes" else object())
    config = host_config(tmp_path, model={"quantization": "nf4", "dtype": "bfloat16", "path": str(tmp_path / "never read")})
    with pytest.raises(ValueError, match=r'quantization = "nf4" needs bitsandbytes.*-e "\.\[bnb\]"'):
        DiffusersHost(config, FluxFamily(config), torch.device("cpu"))


# --- attention ---


@pytest.mark.parametrize("backend", ["flash", "xformers"])
def test_unusable_attention_is_refused_with_the_reason_before_a_model_is_loaded(tmp_path: Path, backend: str):
    config = host_config(tmp_path, model={"attention": backend, "path": str(tmp_path / "never read")})
    with pytest.raises(ValueError, match=f'model.attention = "{backend}".*(not usable|not installed).*model.attention = "native"'):
        DiffusersHost(config, FluxFamily(config), torch.device("cpu"))


# --- LoRA: targets, rank, files ---


def test_default_targets_match_418_linears_of_the_full_size_flux():
    with torch.device("meta"):
        from diffusers import FluxTransformer2DModel

        network = FluxTransformer2DModel.from_config(flux_files.shipped_config("transformer"))
    names = matched_linears(network, DEFAULT_TARGETS)
    assert len(names) == 19 * 12 + 38 * 5 == 418
    assert not [n for n in names if "norm" in n or "embedder" in n]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("nothing_like_this", r"matches no module; it must match whole names such as transformer_blocks"),
        ("attn", "matches no module"),  # a part of a name
        (r"transformer_blocks\.\d+\.attn", "also matches transformer_blocks.0.attn, which is not a linear"),
        (".*", "also matches the whole network"),
    ],
)
def test_bad_targets(tmp_path: Path, pattern: str, message: str):
    config = host_config(tmp_path, lora={"targets": pattern})
    with pytest.raises(ValueError, match=message) as error:
        DiffusersHost(config, FluxFamily(config), torch.device("cpu"))
    assert "lora.targets" in str(error.value)


def test_rank_and_targets_make_the_parameters(tmp_path: Path):
    config = host_config(tmp_path, lora={"rank": 3, "targets": r"transformer_blocks\.\d\.attn\.to_q"})
    host = DiffusersHost(config, FluxFamily(config), torch.device("cpu"))
    width = TINY_FLUX["attention_head_dim"] * TINY_FLUX["num_attention_heads"]
    assert {n: tuple(p.shape) for n, p in host.parameters.items()} == {
        f"transformer.transformer_blocks.{block}.attn.to_q.lora_{side}.weight": shape
        for block in range(2)
        for side, shape in (("A", (3, width)), ("B", (width, 3)))
    }
    assert sorted(lora_shapes(tiny_flux(), config, host.family)) == sorted(tuple(p.shape) for p in host.parameters.values())
    fresh = [p for n, p in host.parameters.items() if "lora_B" in n]
    assert all((p == 0).all() for p in fresh), "a fresh LoRA starts at the base"


def test_the_lora_starts_alike_for_every_storage_and_differs_by_seed(tmp_path: Path):
    def start(**sections: dict[str, Any]) -> dict[str, Tensor]:
        config = host_config(tmp_path, **sections)
        return {n: p.detach() for n, p in DiffusersHost(config, FluxFamily(config), torch.device("cpu")).parameters.items()}

    plain, stored, other = start(), start(model={"quantization": "fp8"}), start(train={"seed": 1})
    assert all(torch.equal(plain[n], stored[n]) for n in plain)
    a = [n for n in plain if "lora_A" in n]
    assert not any(torch.equal(plain[n], other[n]) for n in a)


def test_export_folds_alpha_and_loading_takes_it_back(tmp_path: Path):
    batch = batch_of()
    host = make_host(host_config(tmp_path, lora={"alpha": 1.0}))
    tensors = host.export_lora(host.parameters)
    same = DiffusersHost(host_config(tmp_path, lora={"alpha": 1.0}), host.family, torch.device("cpu"))
    folded = DiffusersHost(host_config(tmp_path), host.family, torch.device("cpu"))
    for other in (same, folded):
        other.load_lora(tensors)
        torch.testing.assert_close(live_of(other, batch), live_of(host, batch))
    name = next(n for n in tensors if "lora_B" in n)
    torch.testing.assert_close(tensors[name], host.parameters[name].detach() / 4)
    for n, parameter in same.parameters.items():
        torch.testing.assert_close(parameter, host.parameters[n])


def test_strength_scales_the_lora_and_0_is_the_network_without(tmp_path: Path):
    host, batch = make_host(host_config(tmp_path)), batch_of()
    full = live_of(host, batch)
    host.set_strength(0.0)
    torch.testing.assert_close(live_of(host, batch), without_lora(batch))
    host.set_strength(0.5)
    half = live_of(host, batch)
    host.set_strength(1.0)
    assert torch.equal(live_of(host, batch), full) and not torch.allclose(half, full)


def test_init_from(tmp_path: Path):
    batch = batch_of()
    first = make_host(host_config(tmp_path))
    path = tmp_path / "first.safetensors"
    write_lora(path, first.export_lora(first.parameters), {"byg.family": "flux"})
    config = host_config(tmp_path, lora={"init_from": str(path)})
    second = DiffusersHost(config, FluxFamily(config), torch.device("cpu"))
    assert torch.equal(live_of(second, batch), live_of(first, batch))
    assert torch.equal(ema_of(second, batch), live_of(first, batch)), "its EMA starts there too"

    def refused(message: str, **sections: dict[str, Any]) -> None:
        changed = host_config(tmp_path, **sections)
        with pytest.raises(ValueError, match=message):
            DiffusersHost(changed, FluxFamily(changed), torch.device("cpu"))

    refused("lora.rank", lora={"init_from": str(path), "rank": 8})
    refused("set lora.targets", lora={"init_from": str(path), "targets": r"transformer_blocks\.0\.attn\.to_q"})
    write_lora(tmp_path / "wan.safetensors", first.export_lora(first.parameters), {"byg.family": "wan"})
    refused("init_from = .*wan.safetensors was trained for 'wan'", lora={"init_from": str(tmp_path / "wan.safetensors")})
    refused("no such file", lora={"init_from": str(tmp_path / "missing.safetensors")})
    save_file({"transformer.x.lora_A.weight": torch.zeros(4, 4)}, tmp_path / "other.safetensors")
    refused(".", lora={"init_from": str(tmp_path / "other.safetensors")})


def test_a_step_under_another_batch_size_is_the_mean(tmp_path: Path):
    """Every loss is a mean over samples: a batch of two is two of one accumulated."""
    host, batch = make_host(host_config(tmp_path)), batch_of(2)
    objective = make_objective(host.config.objective)
    objective.step(host, batch, backward)
    together = gradients(host)
    for i in (0, 1):
        pick = slice(i, i + 1)
        texts = {
            role: {n: v[pick] for n, v in getattr(batch, role).items()}
            for role in ("src_caption", "tgt_caption", "instruction", "reverse_instruction")
        }
        one = replace(batch, source=batch.source[pick], noise=batch.noise[pick], t=batch.t[pick], **texts)
        objective.step(host, one, lambda loss, last: (loss / 2).backward() or 0.5)
    assert relative_difference(gradients(host), together) <= 1e-4
