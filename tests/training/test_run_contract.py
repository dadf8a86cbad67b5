"""What a run promises about its start: earlier LoRAs, changed data, names in the metadata, memory."""

import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel

from byg_plugin.hosts.blocks import blocks_of
from byg_plugin.hosts.sharding import Sharding
from byg_plugin.lora.card import LoraCard
from byg_plugin.training import checkpoint
from byg_plugin.training.launch import Launch
from byg_plugin.training.memory import memory_sum, report
from tests.support import tiny
from tests.support.tiny_wan import tiny_wan, wan_config

SHORT = {"train": {"steps": 1, "save_every": 1}}


def one_step_lora(out: Path) -> Path:
    return tiny.make_trainer(tiny.run_config(out, **SHORT)).run()


def test_a_resumed_run_needs_no_init_from_file(tmp_path: Path):
    init = Path(shutil.copy(one_step_lora(tmp_path / "first"), tmp_path / "init.safetensors"))
    sections = {"lora": {"init_from": str(init)}}
    tiny.make_trainer(tiny.run_config(tmp_path / "second", **SHORT, **sections)).run()
    init.unlink()
    longer = {"train": {**SHORT["train"], "steps": 2}}
    assert tiny.make_trainer(tiny.run_config(tmp_path / "second", **longer, **sections), "latest").run().is_file()


def test_init_from_keeps_its_position(tmp_path: Path):
    init = one_step_lora(tmp_path / "first")
    config = tiny.run_config(tmp_path / "second", **SHORT, lora={"init_from": str(init)}, conditioning={"position": "kontext"})
    with pytest.raises(ValueError, match="conditioning.position = 'same', here it is 'kontext'"):
        tiny.make_trainer(config)


def test_a_run_past_its_end_is_refused(tmp_path: Path):
    longer = {"train": {**SHORT["train"], "steps": 2}}
    tiny.make_trainer(tiny.run_config(tmp_path / "out", **longer)).run()
    with pytest.raises(ValueError, match="train.steps = 1 is below the checkpoint's 2"):
        tiny.make_trainer(tiny.run_config(tmp_path / "out", **SHORT), "latest")


def test_changed_tuples_are_told_on_resume(tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch):
    one_step_lora(tmp_path / "out")
    config = tiny.run_config(tmp_path / "out", **SHORT)
    with caplog.at_level(logging.WARNING):
        tiny.make_trainer(config, "latest")
    assert "the tuples are not those" not in caplog.text
    load = checkpoint.load
    monkeypatch.setattr(checkpoint, "load", lambda path: replace(load(path), data="another order"))
    with caplog.at_level(logging.WARNING):
        tiny.make_trainer(config, "latest")
    assert "the tuples are not those" in caplog.text


def test_the_digest_follows_the_tuples(tmp_path: Path):
    data = tiny.make_trainer(tiny.run_config(tmp_path / "out", **SHORT)).data
    before = data.digest()
    data.tuples[:2] = data.tuples[1::-1]
    assert data.digest() != before


def test_a_loaded_checkpoint_is_not_mapped(tmp_path: Path):
    if not Path("/proc/self/maps").exists():
        pytest.skip("no /proc/self/maps here")
    one_step_lora(tmp_path / "out")
    state = checkpoint.load(checkpoint.find(tmp_path / "out" / "checkpoints", "latest"))
    assert state.adapters["edit"].lora
    assert str(tmp_path) not in Path("/proc/self/maps").read_text(encoding="utf-8")


def test_the_metadata_names_the_network_that_was_used(tmp_path: Path):
    config = tiny.run_config(tmp_path / "out", model={"path": "org/FLUX.1-dev", "transformer": "models/my_finetune.safetensors"})
    assert LoraCard.of(config, 1, "live").base == "my_finetune.safetensors"


def test_the_memory_sum_follows_the_switches(tmp_path: Path):
    def bytes_of(**sections: dict[str, object]) -> float:
        config = tiny.run_config(tmp_path / "out", **sections)
        parts = memory_sum(config, {"transformer": tiny.tiny_flux()}, [(4, 32), (32, 4)], tokens=100, width=32, blocks=4)
        assert "estimate" in report(parts)
        return sum(part.bytes for part in parts)

    sequential = bytes_of()
    assert bytes_of(objective={"graph": "joint"}) > bytes_of(objective={"merge_identity": True}) > sequential
    assert bytes_of(model={"gradient_checkpointing": True}) < sequential
    assert bytes_of(model={"quantization": "fp8"}) < sequential
    assert bytes_of(objective={"ema_decay": 0.0}) == sequential - 4 * 2 * 4 * 32
    assert bytes_of(objective={"name": "paired", "ema_decay": 0.0}) < bytes_of(objective={"name": "paired"})


def test_lora_files_can_be_read_by_others(tmp_path: Path):
    lora = one_step_lora(tmp_path / "out")
    inside = checkpoint.find(tmp_path / "out" / "checkpoints", "latest") / lora.name
    (tmp_path / "plain").write_bytes(b"")
    assert lora.stat().st_mode == inside.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_the_memory_sum_counts_a_lora_for_each_expert_that_has_one(tmp_path: Path):
    networks = {"transformer": tiny_wan(), "transformer_2": tiny_wan()}

    def parts(**lora: object) -> dict[str, float]:
        config = wan_config(tmp_path, lora=lora, objective={"ema_decay": 0.9, "rollout_weights": "merged"})
        found = memory_sum(config, networks, [(4, 24), (32, 4)], tokens=100, width=24, blocks=2)
        return {part.name.partition(" (")[0]: part.bytes for part in found}

    one, merged = 4.0 * 4 * (24 + 32), 2 * 4.0 * 24 * 32
    two, shared, alone = parts(), parts(experts="shared"), parts(experts="low_noise", other_expert="other.safetensors")
    names = ("LoRA weights", "LoRA gradients", "optimizer moments", "EMA weights", "merged weights of the rollout")
    assert [two[name] for name in names] == [2 * one, one, 4 * one, 2 * one, merged]
    assert [shared[name] for name in names] == [one, one, 2 * one, one, merged]
    assert [alone[name] for name in names] == [2 * one, one, 2 * one, one, merged]


def test_the_memory_sum_of_a_published_wan_block(tmp_path: Path):
    """What the recipes' headers say of 320 x 576, 81 frames."""
    shape = {"num_attention_heads": 40, "attention_head_dim": 128, "ffn_dim": 13824, "num_layers": 1}
    with torch.device("meta"):
        network = WanTransformer3DModel(**shape)
    config = wan_config(tmp_path, model={"gradient_checkpointing": True}, train={"mixed_precision": "bf16"})
    last = memory_sum(config, {"transformer": network}, [(4, 24), (32, 4)], tokens=30240, width=5120, blocks=40)[-1]
    assert last.bytes / 2**30 == pytest.approx(11.5 + 12.1, abs=0.15) and not last.exact


def test_the_memory_sum_is_one_process_s_under_the_launch(tmp_path: Path):
    network = tiny.tiny_flux()
    whole = sum(4 * p.numel() for p in network.parameters())
    block = max(sum(4 * p.numel() for p in b.parameters()) for b in blocks_of(network))

    def parts(launch: Launch, processes: int) -> dict[str, float]:
        config = tiny.run_config(tmp_path / "out")
        found = memory_sum(config, {"transformer": network}, [(4, 32), (32, 4)], 100, 32, 4, launch, processes)
        return {part.name.partition(" (")[0]: part.bytes for part in found}

    plain, two = parts(Launch(), 2), parts(Launch(stage=2), 2)
    assert plain["frozen weights"] == two["frozen weights"] == whole
    assert two["optimizer moments"] == plain["optimizer moments"] / 2 and two["DeepSpeed's copy of the LoRA"] == plain["LoRA weights"] / 2
    for kind in ("fsdp2", "zero3"):
        shards = parts(Launch(sharding=Sharding(kind=kind)), 4)
        assert shards["frozen weights"] == whole / 4 and shards["blocks gathered for their pass, at most 2"] == 2 * block
        assert "frozen weights" not in parts(Launch(sharding=Sharding(kind=kind, offload="cpu")), 4)
