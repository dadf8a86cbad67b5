"""A person's DeepSpeed configuration is honoured or refused, key by key; needs no DeepSpeed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from byg_plugin.config.sections import TrainConfig
from byg_plugin.training.deepspeed_settings import Terms, asked, resolved

AUTO = {
    "zero_optimization": {"stage": 2, "overlap_comm": True, "reduce_bucket_size": "auto", "offload_optimizer": {"device": "none"}},
    "bf16": {"enabled": "auto"},
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "train_batch_size": "auto",
    "steps_per_print": 2000,
}


def train(**values: Any) -> TrainConfig:
    return TrainConfig(**({"steps": 9, "global_batch_size": 8, "batch_size": 2, "max_grad_norm": 0.5} | values))


def of(settings: dict[str, Any], **values: Any) -> dict[str, Any]:
    """On two processes, so that a step has two micro-steps."""
    return resolved(settings, "ds.json", Terms.of(train(**values), 2))


def test_auto_is_the_toml_s_value():
    made = of(AUTO)
    assert made["gradient_clipping"] == 0.5 and made["gradient_accumulation_steps"] == 2 and made["train_micro_batch_size_per_gpu"] == 2
    assert made["zero_optimization"]["reduce_bucket_size"] == 50_000_000 and made["zero_optimization"]["overlap_comm"] is True
    assert "offload_optimizer" not in made["zero_optimization"] and not {"bf16", "train_batch_size"} & made.keys()
    assert made["zero_force_ds_cpu_optimizer"] is False


def test_what_says_the_same_in_both_is_taken():
    same = {"gradient_clipping": 0.5, "train_batch_size": 8, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2}
    assert of({**AUTO, **same, "bf16": {"enabled": True}, "fp16": {"enabled": False}}) == of(AUTO)


def test_stage_3_is_of_the_frozen_base():
    zero = of({**AUTO, "zero_optimization": {"stage": 3, "stage3_max_live_parameters": 7, "offload_param": {"device": "cpu"}}})
    assert zero["zero_optimization"]["memory_efficient_linear"] is False
    assert zero["zero_optimization"]["stage3_max_live_parameters"] == 7 and zero["zero_optimization"]["stage3_prefetch_bucket_size"] == 0
    assert zero["zero_optimization"]["offload_param"] == {"device": "cpu"}


def zero(**keys: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": 2, **keys}}


NOT_OF_ZERO = {"zero_hpz_partition_size": 2, "mics_shard_size": 4, "legacy_stage1": True, "zenflow": {}, "zero_quantized_weights": True}
REFUSED = [
    ({"gradient_clipping": 1.0}, {}, r"ds.json: gradient_clipping = 1.0, and train.max_grad_norm = 0.5: set gradient_clipping to \"auto\""),
    ({"gradient_accumulation_steps": 4}, {}, r"gradient_accumulation_steps = 4, and train.global_batch_size / .* = 2"),
    ({"train_batch_size": 16}, {}, "train_batch_size = 16, and train.global_batch_size = 8"),
    ({"train_micro_batch_size_per_gpu": 1}, {}, "train_micro_batch_size_per_gpu = 1, and train.batch_size = 2"),
    ({"bf16": {"enabled": True}}, {"mixed_precision": "no"}, 'bf16.enabled = true, and train.mixed_precision = "no"'),
    ({"bf16": {"enabled": False}}, {}, 'bf16.enabled = false, and train.mixed_precision = "bf16"'),
    ({"fp16": {"enabled": True}}, {}, 'fp16.enabled = true, and train.mixed_precision = "bf16"'),
    ({"optimizer": {"type": "AdamW"}}, {}, "optimizer: the optimizer is train.optimizer; leave it out"),
    ({"scheduler": {"type": "WarmupLR"}}, {}, "scheduler: the schedule is train.lr_schedule"),
    ({"flops_profiler": {"enabled": True}}, {}, "flops_profiler: it is not done here"),
    (zero(stage=0), {}, "zero_optimization.stage = 0: give 1, 2 or 3"),
    (zero(stage="auto"), {}, "zero_optimization.stage = 'auto'"),
    (zero(sub_group_size="auto"), {}, 'zero_optimization.sub_group_size = "auto": here it has no value'),
    (zero(round_robin_gradients=True), {}, "round_robin_gradients is not done here"),
    (zero(offload_param={"device": "cpu"}), {}, "offload_param is for stage 3, the stage is 2"),
    (zero(), {"optimizer": "muon"}, 'train.optimizer = "muon" does not step as whole matrices'),
    (zero(), {"optimizer": "adamw8bit"}, 'train.optimizer = "adamw8bit"'),
    (zero(stage=3, offload_optimizer={"device": "cpu"}), {}, "offload_optimizer: with stage 3 the frozen base is sharded"),
    (zero(offload_optimizer={"device": "nvme"}), {}, "offload_optimizer.device = 'nvme': give \"cpu\""),
    (zero(stage=3, offload_param="cpu"), {}, "offload_param = 'cpu': give a block"),
    (zero(stage=3, offload_param={"device": "disk"}), {}, 'offload_param.device = \'disk\': give "cpu", "nvme" or "none"'),
    (zero(stage=3, offload_param={"device": "nvme"}), {}, "nvme_path = '' is no folder: give one on a fast local disk"),
    (zero(stage=3, offload_param={"device": "nvme", "nvme_path": "/no/such"}), {}, "nvme_path = '/no/such' is no folder"),
    *((zero(stage=3, **{key: value}), {}, f"zero_optimization.{key} is not done here") for key, value in NOT_OF_ZERO.items()),
    ({"prescale_gradients": True}, {}, "prescale_gradients: it is not done here"),
    ({"communication_data_type": "fp16"}, {}, "communication_data_type: it is not done here"),
    ({"train_batchsize": 1}, {}, "train_batchsize: it is not done here"),
    ({"aio": "x"}, {}, "aio = 'x': give a block"),
    ({"comms_logger": True}, {}, "comms_logger = True: give a block"),
    ({"bf16": {"enabled": "false"}}, {}, "bf16 = {'enabled': 'false'}: give a block"),
    ({"bf16": True}, {}, "bf16 = True: give a block"),
    ({"fp16": True}, {}, "fp16 = True: give a block"),
    (
        {"bf16": {"enabled": "auto", "immediate_grad_update": True}},
        {},
        "bf16.immediate_grad_update: the LoRA and its optimizer stay float32",
    ),
    (zero(stage=3, memory_efficient_linear=True), {}, "memory_efficient_linear = true keeps the inputs"),
]


@pytest.mark.parametrize(("settings", "values", "says"), REFUSED)
def test_what_contradicts_or_is_not_done_is_refused(settings: dict[str, Any], values: dict[str, Any], says: str):
    with pytest.raises(ValueError, match=says):
        of({**AUTO, **settings}, **values)


def test_what_the_launcher_answers_beside_a_file_is_refused(tmp_path: Path):
    (tmp_path / "ds.json").write_text(json.dumps(AUTO), encoding="utf-8")
    environment = {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(tmp_path / "ds.json")}
    assert asked(environment | {"ACCELERATE_CONFIG_DS_FIELDS": "deepspeed_config_file,zero3_init_flag"})[0] == AUTO
    with pytest.raises(ValueError, match=r"gradient_clipping, zero_stage beside deepspeed_config_file = .*ds.json: say it there"):
        asked(environment | {"ACCELERATE_CONFIG_DS_FIELDS": "deepspeed_config_file,zero_stage,gradient_clipping"})


@pytest.mark.parametrize(("variable", "key"), [("GRADIENT_CLIPPING", "gradient_clipping"), ("DEEPSPEED_ZERO_STAGE", "zero_stage")])
def test_an_answer_that_is_no_number_is_named(variable: str, key: str):
    with pytest.raises(ValueError, match=f"accelerate's deepspeed_config: {key} = 'abc': give a number"):
        asked({f"ACCELERATE_{variable}": "abc"})


MISSPELT = [
    ({"stage": 2, "overlap_com": True}, "zero_optimization.overlap_com = True: Extra inputs are not permitted; mend it, or leave it out"),
    ({"stage": 3, "offload_param": {"device": "cpu", "pin": True}}, "zero_optimization.offload_param.pin = True"),
    ({"stage": 2, "reduce_bucket_size": "5e8"}, "zero_optimization.reduce_bucket_size = '5e8': Input should be a valid integer"),
]


@pytest.mark.parametrize(("settings", "says"), MISSPELT)
def test_deepspeed_s_own_rules_are_asked_before_anything_is_loaded(settings: dict[str, Any], says: str):
    pytest.importorskip("deepspeed", reason='DeepSpeed is not installed: pip install -e ".[deepspeed]"')
    from byg_plugin.hosts.deepspeed import check_zero

    with pytest.raises(ValueError, match=re.escape(f"ds.json: {says}")):
        check_zero({"zero_optimization": settings}, "ds.json")
    check_zero(of(AUTO), "ds.json")


def test_a_block_that_is_switched_off_asks_for_nothing():
    assert of({**AUTO, "prescale_gradients": False}) == of(AUTO)
    assert of({**AUTO, "flops_profiler": {"enabled": False}}) == of(AUTO)


def test_the_file_is_read(tmp_path: Path):
    path = tmp_path / "ds.json"
    for text, says in (("{", "not JSON"), ("[]", 'has no "zero_optimization"'), ("{}", 'has no "zero_optimization"')):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=f"deepspeed_config_file = .*{says}"):
            asked({"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path)})
    with pytest.raises(ValueError, match="no such file"):
        asked({"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(tmp_path / "other.json")})
    path.write_text(json.dumps(AUTO), encoding="utf-8")
    assert asked({"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path)}) == (AUTO, str(path))


def test_the_answers_of_accelerate_config_are_read():
    environment = {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1"}
    assert asked(environment)[0] == {"zero_optimization": {"stage": 3}}, "the launcher always sends 1: it is nobody's choice"
    environment |= {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4", "ACCELERATE_GRADIENT_CLIPPING": "0.5"}
    environment |= {"ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "nvme", "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_NVME_PATH": "/local"}
    environment |= {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none"}
    assert asked(environment)[0] == {
        "zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/local"}},
        "gradient_accumulation_steps": 4,
        "gradient_clipping": 0.5,
    }
