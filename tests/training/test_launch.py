"""What `accelerate launch` asks for and no host does is refused before anything is loaded."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from byg_plugin import train_network
from byg_plugin.config.sections import Config
from byg_plugin.hosts.sharding import Sharding
from byg_plugin.models.flux import FluxFamily
from byg_plugin.training import launch
from byg_plugin.training.launch import Launch, check_launch, check_processes, read_launch, take_over
from tests.support import tiny

ASKED = {
    ("ACCELERATE_USE_MEGATRON_LM", "1"): "asks for Megatron",
    ("ACCELERATE_USE_PARALLELISM_CONFIG", "true"): "asks for a parallelism_config, and here every process holds all of the LoRA",
    ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR"): "asks for dynamo, inside which the LoRA cannot be taken off: answer NO",
    ("ACCELERATE_MIXED_PRECISION", "fp16"): 'asks for mixed precision "fp16", train.mixed_precision is "no": set one of them',
    ("ACCELERATE_USE_FSDP", "true"): "fsdp_version = 1: .* set fsdp_version: 2",
}


@pytest.mark.parametrize(("variable", "value"), ASKED)
def test_the_embedded_host_refuses_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str):
    monkeypatch.setenv(variable, value)
    config = tiny.run_config(tmp_path / "out")
    with pytest.raises(ValueError, match=ASKED[variable, value]):
        train_network.train(config, FluxFamily(config), torch.device("cpu"), None)
    assert not (tmp_path / "out").exists()


def test_what_asks_for_nothing_is_accepted(monkeypatch: pytest.MonkeyPatch):
    for variable, _ in ASKED:
        monkeypatch.setenv(variable, {"ACCELERATE_DYNAMO_BACKEND": "no", "ACCELERATE_MIXED_PRECISION": "bf16"}.get(variable, "false"))
    check_launch("train.mixed_precision", "bf16")
    check_launch("musubi.mixed_precision", None)  # follows the launcher
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    check_launch("train.mixed_precision", "bf16")


def test_processes_that_are_not_plain_are_refused():
    for kind in ("NO", "MULTI_GPU", "MULTI_CPU", "MULTI_XPU"):
        check_processes(SimpleNamespace(distributed_type=SimpleNamespace(value=kind)))
    for kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "XLA"):
        with pytest.raises(ValueError, match=f"asks for {kind}, which is not done here"):
            check_processes(SimpleNamespace(distributed_type=SimpleNamespace(value=kind)))


FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true", "FSDP_OFFLOAD_PARAMS": "false"}
DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3", "WORLD_SIZE": "2"}


def config(tmp_path: Path, **sections: Any) -> Config:
    return tiny.run_config(tmp_path / "out", **sections)


def test_shards_on_a_card_need_nccl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made = config(tmp_path, train={"sharding": "fsdp2"})
    monkeypatch.setattr(launch, "resolve_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    assert read_launch(made, environment={}).sharding
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    with pytest.raises(ValueError, match="FSDP2 shards the frozen base by NCCL, which this torch has not .*Windows.*model.quantization"):
        read_launch(made, environment={})


def test_fsdp2_is_taken_from_the_launcher_or_the_configuration(tmp_path: Path):
    assert read_launch(config(tmp_path), environment={}) == Launch()
    fsdp2 = Launch(sharding=Sharding(kind="fsdp2"))
    assert (
        read_launch(config(tmp_path), environment=FSDP)
        == fsdp2
        == read_launch(config(tmp_path, train={"sharding": "fsdp2"}), environment={})
    )
    offloaded = Launch(sharding=Sharding(kind="fsdp2", offload="cpu"))
    for value in ("true", "yes", "1"):
        assert read_launch(config(tmp_path), environment=FSDP | {"FSDP_OFFLOAD_PARAMS": value}) == offloaded
    assert read_launch(config(tmp_path, train={"sharding": "fsdp2", "sharding_offload": True}), environment={}) == offloaded
    assert offloaded.name == "FSDP2, cpu offload" and Launch().name == "plain"


def test_an_offload_that_launcher_and_configuration_say_otherwise_is_refused(tmp_path: Path):
    made = config(tmp_path, train={"sharding": "fsdp2", "sharding_offload": True})
    with pytest.raises(ValueError, match="fsdp_offload_params: false, and train.sharding_offload = true: set both to one value"):
        read_launch(made, environment=FSDP | {"FSDP_OFFLOAD_PARAMS": "false"})
    assert read_launch(made, environment=FSDP | {"FSDP_OFFLOAD_PARAMS": "true"}).sharding.offload == "cpu"


REFUSED_FSDP = [
    ("FSDP_RESHARD_AFTER_FORWARD", "false", "fsdp_reshard_after_forward: false keeps the whole base"),
    ("FSDP_RESHARD_AFTER_FORWARD", "0", "fsdp_reshard_after_forward: false keeps the whole base"),
    ("FSDP_RESHARD_AFTER_FORWARD", "SHARD_GRAD_OP", "fsdp_reshard_after_forward: false keeps the whole base"),
    ("FSDP_SHARDING_STRATEGY", "HYBRID_SHARD", "fsdp_sharding_strategy: HYBRID_SHARD is FSDP1's: leave it out"),
    ("FSDP_OFFLOAD_PARAMS", "perhaps", "fsdp_offload_params: perhaps: give true or false"),
    ("FSDP_AUTO_WRAP_POLICY", "SIZE_BASED_WRAP", "set TRANSFORMER_BASED_WRAP"),
    ("FSDP_IGNORED_MODULES", "norm", "fsdp_ignored_modules"),
    ("FSDP_ACTIVATION_CHECKPOINTING", "true", "and model.gradient_checkpointing = false"),
    ("FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD", "true", "is not done here"),
    ("FSDP_TRANSFORMER_CLS_TO_WRAP", "LlamaLayer", "the units of flux are FluxSingleTransformerBlock, FluxTransformerBlock"),
]


@pytest.mark.parametrize(("variable", "value", "says"), REFUSED_FSDP)
def test_what_fsdp2_does_not_do_here_is_refused(tmp_path: Path, variable: str, value: str, says: str):
    made = config(tmp_path)
    with pytest.raises(ValueError, match=says):
        read_launch(made, FluxFamily(made), FSDP | {variable: value})


def test_what_accelerate_writes_down_of_itself_is_accepted(tmp_path: Path):
    said = {"STATE_DICT_TYPE": "SHARDED_STATE_DICT", "CPU_RAM_EFFICIENT_LOADING": "true", "SYNC_MODULE_STATES": "true"}
    said |= {"AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "TRANSFORMER_CLS_TO_WRAP": "FluxTransformerBlock, FluxSingleTransformerBlock"}
    said |= {"ACTIVATION_CHECKPOINTING": "true", "IGNORED_MODULES": "None", "USE_ORIG_PARAMS": "true"}
    made = config(tmp_path, model={"gradient_checkpointing": True})
    assert read_launch(made, FluxFamily(made), FSDP | {f"FSDP_{key}": value for key, value in said.items()}).sharding


NOT_IN_SHARDS: list[tuple[dict[str, str], dict[str, Any], str]] = [
    (
        FSDP,
        {"model": {"quantization": "int8", "dtype": "bfloat16"}},
        'model.quantization = "int8" cannot be cut: with FSDP2 set it to "fp8"',
    ),
    (DEEPSPEED, {"model": {"quantization": "fp8"}}, 'model.quantization is "fp8": launch with FSDP2'),
    (FSDP, {"objective": {"rollout_weights": "merged"}}, 'objective.rollout_weights = "merged" would be a whole copy'),
    (DEEPSPEED, {"lora": {"forward": "merged"}}, 'lora.forward = "merged" reads weights outside the pass'),
    (DEEPSPEED, {"train": {"sharding": "fsdp2"}}, 'asks for DeepSpeed, and train.sharding = "fsdp2"'),
]


@pytest.mark.parametrize(("environment", "sections", "says"), NOT_IN_SHARDS)
def test_what_cannot_be_in_shards_is_refused_by_its_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], sections: dict[str, Any], says: str
):
    pretend_deepspeed(monkeypatch)
    with pytest.raises(ValueError, match=says):
        read_launch(config(tmp_path, **sections), environment=environment)


def pretend_deepspeed(monkeypatch: pytest.MonkeyPatch, version: str = "0.19.8+cu12") -> None:
    monkeypatch.setattr("byg_plugin.training.launch.require", lambda *names: None)
    monkeypatch.setattr("byg_plugin.training.launch.version", lambda name: version)
    monkeypatch.setattr("byg_plugin.config.extras.version", lambda name: version)
    monkeypatch.setattr("byg_plugin.hosts.deepspeed.check_zero", lambda settings, origin: None)


@pytest.mark.parametrize("version", ["0.19.7", "0.9.10"])
def test_a_deepspeed_whose_norms_hide_what_is_not_finite_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str):
    pretend_deepspeed(monkeypatch, version)
    with pytest.raises(ValueError, match=f"this is {version}: pip install 'deepspeed>=0.19.8'"):
        read_launch(config(tmp_path), environment=DEEPSPEED)
    pretend_deepspeed(monkeypatch, "0.20.0")
    assert read_launch(config(tmp_path), environment=DEEPSPEED).name == "ZeRO-3"


def test_deepspeed_that_is_not_installed_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("byg_plugin.config.extras.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs deepspeed, which is not installed: .*\[deepspeed\]"):
        read_launch(config(tmp_path), environment=DEEPSPEED)


def test_nvme_needs_what_its_reader_is_compiled_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pretend_deepspeed(monkeypatch)
    environment = DEEPSPEED | {
        "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "nvme",
        "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_NVME_PATH": str(tmp_path),
    }
    monkeypatch.setattr("byg_plugin.hosts.deepspeed.can_use_nvme", lambda: False)
    with pytest.raises(ValueError, match='offload_param.device = "nvme" needs .* apt install g.. ninja-build libaio-dev'):
        read_launch(config(tmp_path), environment=environment)
    monkeypatch.setattr("byg_plugin.hosts.deepspeed.can_use_nvme", lambda: True)
    assert read_launch(config(tmp_path), environment=environment).name == "ZeRO-3, nvme offload"


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"objective": {"name": "np_edit", "identity_warmup_steps": 0}}, "trains one set of weights, here are edit and fake; launch with"),
        ({"train": {"skip_grad_norm": 9.0}}, r"train.skip_grad_norm = 9.0: DeepSpeed ZeRO-\d leaves out no update; set it to 0, or"),
    ],
)
def test_what_zero_1_and_2_cannot_train_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: int, sections: dict[str, Any], says: str
):
    pretend_deepspeed(monkeypatch)
    environment = DEEPSPEED | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage)}
    assert read_launch(config(tmp_path), environment=environment).stage == stage
    with pytest.raises(ValueError, match=says):
        read_launch(config(tmp_path, **sections), environment=environment)
    assert read_launch(config(tmp_path, **sections), environment=DEEPSPEED).name == "ZeRO-3"


def test_an_offloaded_expert_is_no_shard(tmp_path: Path):
    from tests.support import wan_runs

    made = wan_runs.run_config(tmp_path / "out", model={"offload_inactive_expert": True}, train={"sharding": "fsdp2"})
    with pytest.raises(ValueError, match="model.offload_inactive_expert = true moves it whole"):
        read_launch(made, environment={})


def test_accelerate_finds_nothing_to_wrap(monkeypatch: pytest.MonkeyPatch):
    """It would wrap the network, or on a CPU accept the configuration and do nothing."""
    wishes = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_USE_FSDP": "true", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "auto"}
    for variable, value in wishes.items():
        monkeypatch.setenv(variable, value)
    plain = SimpleNamespace(distributed_type=SimpleNamespace(value="NO"))
    with pytest.raises(AssertionError, match="taken over before"):
        check_processes(plain)
    take_over()
    assert not wishes.keys() & set(os.environ)
    check_processes(plain)
