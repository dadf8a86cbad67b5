"""The embedded host with Wan: two experts, one or two LoRAs, an expert in main memory, LoRA files that other tools read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from safetensors.torch import load_file

from byg_plugin.config.sections import Config
from byg_plugin.data.rules import ROLES
from byg_plugin.hosts import residency
from byg_plugin.hosts.diffusers import DiffusersHost, lora_shapes
from byg_plugin.hosts.quantize import Fp8Linear
from byg_plugin.hosts.residency import OneExpertOnDevice
from byg_plugin.lora import files as lora_files
from byg_plugin.lora import formats as lora_formats
from byg_plugin.models import files, make_family
from byg_plugin.models.networks import Network
from byg_plugin.models.wan import HIGH, LOW, to_wan_timestep
from byg_plugin.objectives import make_objective
from byg_plugin.objectives.base import Batch
from tests.support.tiny import wake
from tests.support.tiny_wan import A14B, T2V, tiny_wan, wan_config, wan_latents, wan_texts

CPU = torch.device("cpu")
X, SOURCE, TEXT = wan_latents(3, 1), wan_latents(3, 2), wan_texts(3, 9)
MIXED = torch.tensor([0.3, 0.95, 0.875])


def host_of(tmp_path: Path, family: str = A14B, awake: bool = True, **sections: dict) -> DiffusersHost:
    config = wan_config(tmp_path, family, **sections)
    host = DiffusersHost(config, make_family(config), CPU)
    if awake:
        wake(host)
    return host


def plain(expert: str) -> torch.nn.Module:
    """The same frozen network without any LoRA around it."""
    return tiny_wan(0 if expert == HIGH else 7)


@torch.no_grad()
def test_base_is_each_experts_model_without_lora_to_the_last_bit(tmp_path: Path):
    host = host_of(tmp_path)
    for expert, t in ((HIGH, torch.tensor([0.9, 0.95, 1.0])), (LOW, torch.tensor([0.1, 0.5, 0.8]))):
        expected = plain(expert)(X, to_wan_timestep(t), TEXT["umt5"], return_dict=False)[0]
        with host.base() as velocity:
            assert torch.equal(velocity(X, t, TEXT, None), expected)
        with host.live() as velocity:
            assert (velocity(X, t, TEXT, None) - expected).abs().max() > 1e-3


@torch.no_grad()
def test_a_batch_on_both_sides_is_split_by_expert(tmp_path: Path):
    host = host_of(tmp_path)
    with host.live() as velocity:
        together = velocity(X, MIXED, TEXT, SOURCE)
        for row in range(3):
            text = {"umt5": TEXT["umt5"][row : row + 1]}
            alone = velocity(X[row : row + 1], MIXED[row : row + 1], text, SOURCE[row : row + 1])
            torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-5, atol=1e-5)
    with host.base() as velocity:
        assert torch.equal(velocity(X, MIXED, TEXT, None)[1:], velocity(X[1:], MIXED[1:], {"umt5": TEXT["umt5"][1:]}, None))


def test_lora_of_each_expert_or_shared(tmp_path: Path):
    separate, shared = host_of(tmp_path), host_of(tmp_path, lora={"experts": "shared"})
    assert {name.partition(".")[0] for name in separate.parameters} == {HIGH, LOW}
    assert {name.partition(".")[0] for name in shared.parameters} == {HIGH}
    assert len(separate.parameters) == 2 * len(shared.parameters) == 2 * 2 * 20
    high, low = shared.networks.values()
    assert high.blocks[0].attn1.to_q.lora_A["byg"].weight is low.blocks[0].attn1.to_q.lora_A["byg"].weight
    t = torch.full((3,), 0.2)
    with shared.edit() as velocity:
        velocity(X, t, TEXT, SOURCE).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in shared.parameters.values())
    with torch.no_grad(), shared.base() as velocity:
        assert torch.equal(velocity(X, t, TEXT, None), plain(LOW)(X, to_wan_timestep(t), TEXT["umt5"], return_dict=False)[0])


def test_lora_of_a_full_size_expert(tmp_path: Path):
    config = wan_config(tmp_path, lora={"rank": 64})
    with torch.device("meta"):
        network = WanTransformer3DModel.from_config(files.shipped_config("wan/transformer"))
    shapes = lora_shapes(network, config.lora, make_family(config))
    assert len(shapes) == 2 * 400 and sum(rows * columns for rows, columns in shapes) == 306_708_480


def test_the_idle_expert_gets_no_gradient(tmp_path: Path):
    host = host_of(tmp_path)
    with host.edit() as velocity:
        velocity(X, torch.tensor([0.9, 0.95, 0.99]), TEXT, SOURCE).square().sum().backward()
    for name, parameter in host.parameters.items():
        assert (parameter.grad is not None) == name.startswith(f"{HIGH}."), name


def batch_at(t: torch.Tensor) -> Batch:
    roles = {role: wan_texts(3, seed) for seed, role in enumerate(ROLES)}
    nodes = 12 * torch.linspace(1, 0, 5) / (1 + 11 * torch.linspace(1, 0, 5))
    return Batch(source=SOURCE, noise=X, t=t, nodes=nodes, **roles)


def gradients(host: DiffusersHost, config: Config, t: torch.Tensor) -> dict[str, torch.Tensor]:
    def backward(loss: torch.Tensor, *, last: bool) -> float:
        loss.backward()
        return 1.0

    for parameter in host.parameters.values():
        parameter.grad = None
    metrics = make_objective(config.objective).step(host, batch_at(t), backward)
    assert all(value.isfinite() for value in metrics.values())
    found = {name: p.grad.clone() for name, p in host.parameters.items() if p.grad is not None}
    assert any(gradient.abs().max() > 1e-6 for gradient in found.values())
    return found


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], limit: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    scale = max(value.abs().max().item() for value in expected.values())
    assert max((found[name] - expected[name]).abs().max().item() for name in expected) <= limit * scale


@pytest.mark.parametrize("t", [(0.9, 0.95, 0.88), (0.2, 0.6, 0.8)], ids=["high", "low"])
def test_a_steps_gradients_with_checkpointing_offloading_and_as_one_graph(tmp_path: Path, t: tuple[float, ...]):
    times, ema = torch.tensor(t), {"ema_decay": 0.9}
    reference = host_of(tmp_path, objective=ema)
    expected = gradients(reference, reference.config, times)
    assert {name.partition(".")[0] for name in expected} == {HIGH if t[0] > 0.875 else LOW}
    variants: list[dict[str, dict]] = [
        {"model": {"gradient_checkpointing": True}},
        {"model": {"offload_inactive_expert": True, "gradient_checkpointing": True}},
        {"objective": ema | {"graph": "joint"}},
        {"objective": ema | {"frozen_batch": 1}},
    ]
    for sections in variants:
        host = host_of(tmp_path, **({"objective": ema} | sections))
        assert_close(gradients(host, host.config, times), expected)


# --- an expert in main memory ---


class Poisoned(OneExpertOnDevice):
    """What is not on the device is not a number: use of an absent expert shows on a CPU too."""

    def _drop(self, name: str) -> None:
        for tensor in self._frozen[name]:
            tensor.data = torch.full_like(tensor.data, float("nan"))


def poison(host: DiffusersHost) -> list[str]:
    """Replace the host's residency; returns the list of experts as they come."""
    assert host._residency is not None
    host._residency = Poisoned(host.networks, host._every_lora.values(), CPU)
    came: list[str] = []
    bring: Callable[[str], None] = host._residency.bring

    def note(name: str) -> None:
        if host._residency.present != name:
            came.append(name)
        bring(name)

    host._residency.bring = note
    return came


@pytest.mark.parametrize("t", [(0.9, 0.95, 0.88), (0.2, 0.6, 0.8)], ids=["high", "low"])
def test_a_step_uses_no_absent_expert_and_moves_between_passes_only(tmp_path: Path, t: tuple[float, ...]):
    times = torch.tensor(t)
    sections = {"model": {"offload_inactive_expert": True, "gradient_checkpointing": True}}
    expected = gradients(host := host_of(tmp_path, **sections), host.config, times)
    other = host_of(tmp_path, **sections)
    came = poison(other)
    assert_close(gradients(other, other.config, times), expected)
    # The rollout goes from noise to data once; the frozen base and what has gradients stay on the side of t.
    assert came == ([HIGH, LOW, HIGH] if t[0] > 0.875 else [HIGH, LOW])


def test_an_expert_that_does_not_fit_leaves_nothing_on_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    host = host_of(tmp_path, model={"offload_inactive_expert": True})
    assert host._residency is not None
    masters = {name: [tensor.data_ptr() for tensor in tensors] for name, tensors in host._residency._masters.items()}
    copies = 0

    def copied(master: torch.Tensor, device: torch.device) -> torch.Tensor:
        nonlocal copies
        copies += 1
        if copies == 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return master.clone()

    monkeypatch.setattr(residency, "_copied", copied)
    host._residency.clear()
    with pytest.raises(torch.OutOfMemoryError):
        host._residency.bring(LOW)
    assert host._residency.present is None
    assert [tensor.data_ptr() for tensor in host._residency._frozen[LOW]] == masters[LOW]
    host._residency.bring(LOW)
    assert not {tensor.data_ptr() for tensor in host._residency._frozen[LOW]} & set(masters[LOW])


@pytest.mark.parametrize("quantization", ["none", "fp8"])
def test_an_expert_that_a_rollout_brought_can_be_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantization: str):
    """As on a card, where what is brought is a copy: made in inference mode it would make the weights inference tensors."""
    sections = {"model": {"offload_inactive_expert": True, "quantization": quantization}}
    times = torch.tensor((0.2, 0.6, 0.8))
    expected = gradients(host := host_of(tmp_path, **sections), host.config, times)
    monkeypatch.setattr(residency, "_copied", lambda master, device: master.clone())
    other = host_of(tmp_path, **sections)
    for enter in (other.ema, other.base):
        with enter() as velocity:
            for t in (0.9, 0.2):
                velocity(X, torch.full((3,), t), TEXT, SOURCE if enter == other.ema else None)
    assert_close(gradients(other, other.config, times), expected)
    assert not any(tensor.is_inference() for network in other.networks.values() for tensor in network.parameters())


def test_what_is_pinned_replaces_its_first_copy_at_once(monkeypatch: pytest.MonkeyPatch):
    """Two copies of one tensor at a time, not of both experts."""
    networks = {HIGH: plain(HIGH), LOW: plain(LOW)}
    every = [tensor for network in networks.values() for tensor in (*network.parameters(), *network.buffers())]
    before = [tensor.clone() for tensor in every]
    pinned: list[torch.Tensor] = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        assert {copy.data_ptr() for copy in pinned} <= {tensor.data_ptr() for tensor in every}
        pinned.append(tensor.clone())
        return pinned[-1]

    monkeypatch.setattr(residency, "_pinned", pin)
    OneExpertOnDevice(networks, [], torch.device("cuda"))
    assert [tensor.data_ptr() for tensor in every] == [copy.data_ptr() for copy in pinned]
    assert all(torch.equal(a, b) for a, b in zip(every, before, strict=True))


def test_an_expert_cannot_leave_before_its_backward_pass(tmp_path: Path):
    host = host_of(tmp_path, model={"offload_inactive_expert": True})
    high, low = torch.full((3,), 0.9), torch.full((3,), 0.2)
    with host.edit() as velocity:
        loss = velocity(X, high, TEXT, SOURCE).square().sum()
        with pytest.raises(AssertionError, match="push out transformer, whose backward pass is still to come"), torch.no_grad():
            velocity(X, low, TEXT, SOURCE)
        loss.backward()
    with host.live() as velocity:
        assert velocity(X, low, TEXT, SOURCE).isfinite().all()


def test_the_wrong_order_is_caught_where_it_would_be_silent(tmp_path: Path):
    """Without the guard, recomputed activations would see weights that are not there: the gradients come out as NaN."""
    host = host_of(tmp_path, model={"offload_inactive_expert": True, "gradient_checkpointing": True})
    poison(host)
    with host.edit() as velocity:
        loss = velocity(X, torch.full((3,), 0.9), TEXT, SOURCE).square().sum()
        host._residency.held = None
        with torch.no_grad():
            velocity(X, torch.full((3,), 0.2), TEXT, SOURCE)
        loss.backward()
    assert any(p.grad is not None and p.grad.isnan().any() for p in host.parameters.values())


# --- LoRA files ---


def saved(host: DiffusersHost, folder: Path, name: str = "byg", **metadata: str) -> dict[str, Path]:
    """What a run writes of the live weights, by suffix."""
    paths = {}
    for suffix, tensors in host.lora_files(host.parameters).items():
        paths[suffix] = folder / f"{name}{suffix}.safetensors"
        expert = {"byg.expert": suffix.removeprefix("_")} if suffix else {}
        lora_files.write_lora(paths[suffix], tensors, {"byg.family": A14B, "byg.position": "same", **expert, **metadata})
    return paths


def pipeline(**parts: object) -> WanPipeline:
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=12.0)
    return WanPipeline(None, None, None, scheduler, **parts)


@torch.no_grad()
def test_files_load_into_diffusers_pipeline_of_both_experts(tmp_path: Path):
    host = host_of(tmp_path, lora={"alpha": 2.0})
    paths = saved(host, tmp_path)
    assert list(paths) == ["_high_noise", "_low_noise"]
    for path in paths.values():
        keys = load_file(path)
        assert len(keys) == 2 * 20 and all(key.startswith("diffusion_model.blocks.") for key in keys)
        assert "diffusion_model.blocks.1.cross_attn.o.lora_A.weight" in keys and not any(key.endswith("alpha") for key in keys)
    pipe = pipeline(transformer=plain(HIGH), transformer_2=plain(LOW), boundary_ratio=0.875)
    pipe.load_lora_weights(paths["_high_noise"], adapter_name="high")
    pipe.load_lora_weights(paths["_low_noise"], adapter_name="low", load_into_transformer_2=True)
    for network, value in ((pipe.transformer, 0.9), (pipe.transformer_2, 0.4)):
        t = torch.full((3,), value)
        theirs = network(X, to_wan_timestep(t), TEXT["umt5"], return_dict=False)[0]
        with host.live() as velocity:
            ours = velocity(X, t, TEXT, None)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_reading_a_pair_back_by_any_of_its_names(tmp_path: Path):
    host = host_of(tmp_path, lora={"alpha": 2.0})
    paths = saved(host, tmp_path)
    for name in (*paths.values(), tmp_path / "byg.safetensors"):
        tensors, _ = lora_formats.read_named(name, A14B)
        other = host_of(tmp_path, awake=False, lora={"alpha": 2.0})
        other.load_lora(tensors)
        for key, parameter in host.parameters.items():
            torch.testing.assert_close(other.parameters[key], parameter)
    started = host_of(tmp_path, awake=False, lora={"alpha": 2.0, "init_from": str(paths["_low_noise"])})
    torch.testing.assert_close(dict(started.parameters), dict(host.parameters))


def test_half_a_pair_and_swapped_names_are_refused(tmp_path: Path):
    host = host_of(tmp_path)
    paths = saved(host, tmp_path)
    moved = paths["_low_noise"].read_bytes()
    paths["_low_noise"].unlink()
    with pytest.raises(ValueError, match="byg_low_noise.safetensors is not beside it"):
        lora_formats.read_named(paths["_high_noise"], A14B)
    paths["_low_noise"].write_bytes(paths["_high_noise"].read_bytes())
    paths["_high_noise"].write_bytes(moved)
    with pytest.raises(ValueError, match="for the low-noise expert; was it renamed"):
        lora_formats.read_named(tmp_path / "byg.safetensors", A14B)
    with pytest.raises(ValueError, match=f"was trained for '{A14B}', model.family is '{T2V}'"):
        lora_formats.read_named(paths["_low_noise"], T2V)


@pytest.mark.parametrize("expert", ["high_noise", "low_noise"])
def test_one_experts_file_under_another_name_is_no_shared_lora(tmp_path: Path, expert: str):
    renamed = saved(host_of(tmp_path), tmp_path)[f"_{expert}"].rename(tmp_path / "mine.safetensors")
    with pytest.raises(ValueError, match=f"{expert.replace('_', '-')} expert; was it renamed. .* end in _{expert}.safetensors"):
        lora_formats.read_named(renamed, A14B)


@pytest.mark.parametrize("expert", ["high_noise", "low_noise"])
def test_an_expert_that_is_trained_alone_starts_from_its_own_file_under_any_name(tmp_path: Path, expert: str):
    host = host_of(tmp_path)
    paths = saved(host, tmp_path)
    mine, other = tmp_path / "mine.safetensors", tmp_path / "other.safetensors"
    mine.write_bytes(paths[f"_{expert}"].read_bytes())
    other.write_bytes(paths["_low_noise" if expert == "high_noise" else "_high_noise"].read_bytes())
    sections = {"experts": expert, "init_from": str(mine), "other_expert": str(other)}
    started = host_of(tmp_path, awake=False, lora=sections)
    own = HIGH if expert == "high_noise" else LOW
    assert {name.partition(".")[0] for name in started.parameters} == {own}
    for name, parameter in started.parameters.items():
        torch.testing.assert_close(parameter, host.parameters[name])
    with pytest.raises(ValueError, match=f"for the {expert.replace('_', '-')} expert; was it renamed"):
        host_of(tmp_path, awake=False, lora={"init_from": str(mine)})


def test_a_shared_lora_and_one_networks_are_one_file(tmp_path: Path):
    for family, sections in ((A14B, {"lora": {"experts": "shared"}}), (T2V, {})):
        host = host_of(tmp_path, family, **sections)
        files = host.lora_files(host.parameters)
        assert list(files) == [""] and len(files[""]) == 2 * 20


def test_one_expert_alone_beside_the_others_lora(tmp_path: Path):
    paths = saved(host_of(tmp_path), tmp_path)
    before = {key: value.clone() for key, value in load_file(paths["_high_noise"]).items()}
    alone = host_of(tmp_path, lora={"experts": "low_noise", "other_expert": str(paths["_high_noise"])})
    assert {name.partition(".")[0] for name in alone.parameters} == {LOW}
    frozen = [p for name, p in alone._every_lora.items() if name.startswith(f"{HIGH}.")]
    assert frozen and not any(p.requires_grad for p in frozen) and all(p.requires_grad for p in alone.parameters.values())
    files = alone.lora_files(alone.parameters)
    assert list(files) == ["_high_noise", "_low_noise"]
    for key, value in files["_high_noise"].items():
        torch.testing.assert_close(value, before[key])
    assert not torch.equal(files["_low_noise"][key], load_file(paths["_low_noise"])[key])
    with pytest.raises(ValueError, match="is for the low_noise expert, which is the one that is trained"):
        host_of(tmp_path, lora={"experts": "low_noise", "other_expert": str(paths["_low_noise"])})


def test_the_other_experts_lora_must_be_of_this_family_and_position(tmp_path: Path):
    path = saved(host_of(tmp_path), tmp_path)["_high_noise"]
    lora = {"experts": "low_noise", "other_expert": str(path)}
    with pytest.raises(ValueError, match=r"other_expert = .*high_noise.* with conditioning.position = 'same', here it is 'bernini'"):
        host_of(tmp_path, lora=lora, conditioning={"position": "bernini"})
    tensors, metadata = lora_files.read_lora(path)
    lora_files.write_lora(path, tensors, metadata | {"byg.family": "wan2.1-t2v-14b"})
    with pytest.raises(ValueError, match=f"other_expert = .* was trained for 'wan2.1-t2v-14b', model.family is '{A14B}'"):
        host_of(tmp_path, lora=lora)


def test_quantised_experts_run_and_have_gradients(tmp_path: Path):
    host = host_of(tmp_path, model={"quantization": "fp8", "offload_inactive_expert": True, "dtype": "bfloat16"})
    with host.edit() as velocity:
        velocity(X, torch.full((3,), 0.95), TEXT, SOURCE).square().sum().backward()
    touched = [name for name, p in host.parameters.items() if p.grad is not None and p.grad.abs().max() > 0]
    assert touched and all(name.startswith(f"{HIGH}.") for name in touched)


def test_an_expert_is_quantised_before_the_other_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    networks: list[torch.nn.Module] = []
    found: list[set[type]] = []
    read = Network.load

    def reading(*path: Any, **options: Any) -> torch.nn.Module:
        found.extend({type(m) for name, m in network.named_modules() if name.endswith(".base_layer")} for network in networks)
        networks.append(read(*path, **options))
        return networks[-1]

    monkeypatch.setattr(Network, "load", reading)
    host_of(tmp_path, model={"quantization": "fp8"})
    assert len(networks) == 2 and found == [{Fp8Linear}]
