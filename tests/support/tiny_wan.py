"""Tiny random Wan models of the real classes in a real diffusers folder."""

from __future__ import annotations

import atexit
import json
import re
import shutil
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from torch import nn
from transformers import UMT5Config, UMT5EncoderModel

from byg_plugin.config.loading import parse_config
from byg_plugin.config.sections import Config
from tests.support.tiny import _tokenizer, known_to

TEXT_WIDTH, TEXT_TOKENS = 24, 8
TINY_WAN: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": TEXT_WIDTH,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 2,
    "rope_max_seq_len": 64,
}
A14B, T2V = "wan2.2-t2v-a14b", "wan2.1-t2v-1.3b"


def tiny_wan(seed: int = 0, **changes: Any) -> WanTransformer3DModel:
    """A random Wan whose output head is not zero and whose modulation is alive."""
    torch.manual_seed(seed)
    network = WanTransformer3DModel(**(TINY_WAN | changes))
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return network.eval()


def tiny_vae(**changes: Any) -> AutoencoderKLWan:
    torch.manual_seed(1)
    return AutoencoderKLWan(**({"base_dim": 4, "z_dim": 16, "num_res_blocks": 1} | changes)).eval()


def tiny_umt5(vocabulary: int) -> UMT5EncoderModel:
    torch.manual_seed(2)
    config = UMT5Config(
        vocab_size=vocabulary,
        d_model=TEXT_WIDTH,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
    )
    return UMT5EncoderModel(config).eval()


def write_wan(folder: Path, experts: int = 2, **changes: Any) -> Path:
    """A diffusers folder with every part; `changes` to the transformers' configuration."""
    tiny_wan(0, **changes).save_pretrained(folder / "transformer")
    if experts == 2:
        tiny_wan(7, **changes).save_pretrained(folder / "transformer_2")
    tiny_vae().save_pretrained(folder / "vae")
    tokenizer = _tokenizer(["<pad>", "</s>", "<unk>"], "$A </s>", TEXT_TOKENS, eos_token="</s>", pad_token="<pad>")
    tokenizer.save_pretrained(folder / "tokenizer")
    tiny_umt5(len(tokenizer)).save_pretrained(folder / "text_encoder")
    index = {"_class_name": "WanPipeline", **({"boundary_ratio": 0.875} if experts == 2 else {})}
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


@lru_cache(maxsize=2)
def wan_folder(experts: int = 2) -> Path:
    """One such folder a test process."""
    folder = Path(tempfile.mkdtemp(prefix="byg-tiny-wan-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return write_wan(folder, experts)


def wan_config(folder: Path, family: str = A14B, **sections: dict[str, Any]) -> Config:
    """A float32 CPU configuration of the tiny folder; sections are merged in."""
    raw: dict[str, dict[str, Any]] = {
        "model": {
            "family": family,
            "path": str(wan_folder(2 if family == A14B else 1)),
            "dtype": "float32",
            "device": "cpu",
            "gradient_checkpointing": False,
        },
        "dataset": {"tuples": str(folder / "tuples.jsonl"), "cache_dir": str(folder / "cache"), "resolution": 32, "frames": 5},
        "conditioning": {"max_text_tokens": TEXT_TOKENS},
        "lora": {"rank": 4},
        "objective": known_to(sections.get("objective", {}), {"rollout_steps": 4, "identity_warmup_steps": 0}),
        "train": {"steps": 4, "global_batch_size": 2, "mixed_precision": "no", "tracker": "none", "lr": 1e-2},
        "output": {"dir": str(folder / "out")},
    }
    for name, values in sections.items():
        raw.setdefault(name, {}).update(values)
    return parse_config(raw)


def wan_texts(batch: int, seed: int) -> dict[str, torch.Tensor]:
    """Random encodings of the tiny Wan's width."""
    return {"umt5": torch.randn(batch, TEXT_TOKENS, TEXT_WIDTH, generator=torch.Generator().manual_seed(seed))}


def wan_latents(batch: int, seed: int, frames: int = 2) -> torch.Tensor:
    return torch.randn(batch, 16, frames, 4, 6, generator=torch.Generator().manual_seed(seed))


def write_pipeline(folder: Path, **parts: Any) -> None:
    """diffusers' whole Wan pipeline of tiny parts, as it saves itself; `parts` beside or in place of the one expert."""
    tokenizer = _tokenizer(["<pad>", "</s>", "<unk>"], "$A </s>", TEXT_TOKENS, eos_token="</s>", pad_token="<pad>")
    whole: dict[str, Any] = {
        "tokenizer": tokenizer,
        "text_encoder": tiny_umt5(len(tokenizer)),
        "vae": tiny_vae(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
        "transformer": tiny_wan(0),
    }
    WanPipeline(**(whole | parts)).save_pretrained(folder)


def native_vae_state(vae: nn.Module) -> dict[str, torch.Tensor]:
    """Wan's own names, by hand: the inverse of diffusers' converter, for two residual blocks a level."""
    out = {}
    residual = {"norm1": "residual.0", "conv1": "residual.2", "norm2": "residual.3", "conv2": "residual.6", "conv_shortcut": "shortcut"}
    for name, tensor in vae.state_dict().items():
        new = re.sub(r"^(en|de)coder\.conv_in", r"\1coder.conv1", name)
        new = re.sub(r"^(en|de)coder\.norm_out", r"\1coder.head.0", new)
        new = re.sub(r"^(en|de)coder\.conv_out", r"\1coder.head.2", new)
        new = re.sub(r"^quant_conv", "conv1", new).replace("post_quant_conv", "conv2")
        new = new.replace("mid_block.attentions.0", "middle.1").replace("encoder.down_blocks.", "encoder.downsamples.")
        new = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"middle.{2 * int(m[1])}", new)
        new = re.sub(r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"upsamples.{4 * int(m[1]) + int(m[2])}", new)
        new = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"upsamples.{4 * int(m[1]) + 3}", new)
        new = (
            re.sub(r"\.(norm1|conv1|norm2|conv2|conv_shortcut)\.(?=weight|bias|gamma)", lambda m: f".{residual[m[1]]}.", new)
            if ("samples." in new or "middle." in new)
            else new
        )
        out[new] = tensor.contiguous()
    return out
