"""Tiny random models of the real classes in a real diffusers folder: they prove plumbing, not learning."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, FluxTransformer2DModel
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from byg_plugin.config.loading import parse_config
from byg_plugin.config.sections import SECTIONS_OF_OBJECTIVES, Config
from byg_plugin.data import cache
from byg_plugin.data.tuples import read_tuples
from byg_plugin.hosts.diffusers import DiffusersHost
from byg_plugin.models import make_family
from byg_plugin.training.loop import Trainer

TINY_FLUX = {
    "in_channels": 64,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "pooled_projection_dim": 20,
    "guidance_embeds": True,
    "axes_dims_rope": (4, 6, 6),
}
WORDS = ["add", "remove", "make", "a", "the", "snow", "sky", "blue", "red", "dog", "cat", "beach", "mountain", "of", "in", "house", "photo"]
# Overrides that make a few steps of a demo's recipe; FEW_STEPS are a whole demo's, of which a study sets the rest itself.
SHORT_TRAINING = [
    "train.steps=3",
    "objective.identity_warmup_steps=1",
    "objective.rollout_steps=2",
    "train.global_batch_size=4",
    "train.batch_size=4",
    "train.save_every=2",
    "sample.steps=2",
]
FEW_STEPS = [*SHORT_TRAINING, "train.log_every=1", "dataset.validation_items=2", "train.validate_every=3", "sample.every=0"]


def tiny_flux(seed: int = 0, **changes: Any) -> FluxTransformer2DModel:
    """A random FLUX whose output head is not zero and whose modulation is alive."""
    torch.manual_seed(seed)
    network = FluxTransformer2DModel(**(TINY_FLUX | changes))
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.12)
    return network.eval()


def tiny_config(folder: Path, **sections: dict[str, Any]) -> Config:
    """A float32 CPU configuration; sections are merged in."""
    raw: dict[str, dict[str, Any]] = {
        "model": {"path": str(folder / "model"), "dtype": "float32", "device": "cpu", "gradient_checkpointing": False},
        "dataset": {"tuples": str(folder / "tuples.jsonl"), "cache_dir": str(folder / "cache"), "resolution": 64},
        "conditioning": {"max_text_tokens": 8},
        "lora": {"rank": 4},
        "train": {"steps": 4, "global_batch_size": 2, "mixed_precision": "no", "tracker": "none", "lr": 1e-2},
        "output": {"dir": str(folder / "out")},
    }
    for name, values in sections.items():
        raw.setdefault(name, {}).update(values)
    return parse_config(raw)


def tiny_texts(batch: int, seed: int) -> dict[str, torch.Tensor]:
    """Random encodings of the tiny FLUX's widths."""
    rng = torch.Generator().manual_seed(seed)
    return {"t5": torch.randn(batch, 8, 24, generator=rng), "pooled": torch.randn(batch, 20, generator=rng)}


# --- a whole model folder, and a cached dataset ---


def _tokenizer(specials: list[str], template: str, length: int, **names: str) -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate([*specials, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    used = [(name, vocabulary[name]) for name in specials if name in template.split()]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=used)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", model_max_length=length, **names)


def tiny_flux_vae() -> AutoencoderKL:
    """A random autoencoder with FLUX.1's latent scale."""
    torch.manual_seed(1)
    return AutoencoderKL(
        block_out_channels=(4, 4, 4, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=2,
        latent_channels=16,
        sample_size=64,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=0.3611,
        shift_factor=0.1159,
    )


def write_model(folder: Path, **changes: Any) -> Path:
    """A diffusers FLUX folder with random weights of every part; `changes` to the transformer's configuration."""
    tiny_flux(**changes).save_pretrained(folder / "transformer")
    tiny_flux_vae().save_pretrained(folder / "vae")
    clip = _tokenizer(["<s>", "</s>", "<unk>"], "<s> $A </s>", 10, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    t5 = _tokenizer(["<pad>", "</s>", "<unk>"], "$A </s>", 8, eos_token="</s>", pad_token="<pad>")
    clip.save_pretrained(folder / "tokenizer")
    t5.save_pretrained(folder / "tokenizer_2")
    CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(clip),
            hidden_size=20,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            projection_dim=20,
            max_position_embeddings=10,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    ).save_pretrained(folder / "text_encoder")
    T5EncoderModel(
        T5Config(
            vocab_size=len(t5), d_model=24, d_kv=8, d_ff=24, num_layers=1, num_heads=2, dropout_rate=0.0, feed_forward_proj="gated-gelu"
        )
    ).save_pretrained(folder / "text_encoder_2")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}), encoding="utf-8")
    return folder


def kept(name: str, write: Callable[[Path], Path]) -> Path:
    """A folder that lives as long as the process, with what is written into it."""
    root = Path(tempfile.mkdtemp(prefix=f"byg-{name}-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    return write(root / name)


@lru_cache(maxsize=1)
def model_folder() -> Path:
    """One tiny model folder for the whole run; nobody may write into it."""
    return kept("tiny-flux", write_model)


def write_tuples(folder: Path, sizes: list[tuple[int, int]] | None = None) -> Path:
    """Smooth random pictures of these (width, height), two tuples on the first, and their JSONL."""
    rng = np.random.default_rng(0)
    lines = []
    for index, size in enumerate(sizes or [(64, 64), (80, 80), (96, 64), (90, 60)]):
        coarse = rng.integers(0, 255, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(folder / f"photo{index}.png")
        for variant in range(2 if index == 0 else 1):
            lines.append(
                {
                    "source": f"photo{index}.png",
                    "src_caption": f"photo of a {WORDS[8 + index]}",
                    "tgt_caption": f"photo of a {WORDS[8 + index]} in the {WORDS[5 + variant]}",
                    "instruction": f"add the {WORDS[5 + variant]}",
                    "reverse_instruction": f"remove the {WORDS[5 + variant]}",
                }
            )
    (folder / "tuples.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return folder / "tuples.jsonl"


@lru_cache(maxsize=1)
def workspace() -> Path:
    """A folder with tuples and their caches, shared by all tests; outputs belong into each test's own folder."""
    root = Path(tempfile.mkdtemp(prefix="byg-work-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    write_tuples(root)
    config = run_config(root / "unused")
    fill_caches(config)
    return root


def fill_caches(config: Config) -> None:
    """What the two caching commands do."""
    family, tuples = make_family(config), read_tuples(config.dataset)
    cache.cache_latents(config, family, tuples, torch.device("cpu"))
    cache.cache_texts(config, family, tuples, torch.device("cpu"))


def run_config(out: Path, **sections: dict[str, Any]) -> Config:
    """A training run on the shared workspace that writes into `out`: two identity steps, then Algorithm 1."""
    folder = out.parent if out.name == "unused" else workspace()
    defaults: dict[str, dict[str, Any]] = {
        "model": {"path": str(model_folder())},
        "objective": {"rollout_steps": 2, "identity_warmup_steps": 2, "ema_decay": 0.9},
        "train": {"steps": 6, "save_every": 2, "keep_last": 0, "lr_warmup_steps": 2, "lr_schedule": "cosine"},
        "output": {"dir": str(out)},
    }
    defaults["objective"] = known_to(sections.get("objective", {}), defaults["objective"])
    for name, values in sections.items():
        defaults.setdefault(name, {}).update(values)
    return tiny_config(folder, **defaults)


def known_to(objective: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """Those of the defaults for Algorithm 1 that the section's objective has too."""
    fields = SECTIONS_OF_OBJECTIVES[objective.get("name", "unpaired_cycle")].model_fields
    return {key: value for key, value in defaults.items() if key in fields}


def make_trainer(config: Config, resume: str | None = None, *, discard_later: bool = False) -> Trainer:
    """A trainer in this process, on one CPU."""
    return Trainer(config, make_family(config), Accelerator(cpu=True), resume, discard_later=discard_later)


def make_host(config: Config, seed: int = 5) -> DiffusersHost:
    """A host whose LoRA is awake: B is not zero, and the EMA weights differ from the live ones."""
    host = DiffusersHost(config, make_family(config), torch.device("cpu"))
    wake(host, seed)
    return host


def wake(host: DiffusersHost, seed: int = 5) -> None:
    """Random live and EMA weights, all different."""
    rng = torch.Generator().manual_seed(seed)
    for parameter in host.parameters.values():
        parameter.data = torch.randn(parameter.shape, generator=rng) * 0.2
    if host.ema_weights.decay:
        host.ema_weights.load({n: torch.randn(p.shape, generator=rng) * 0.2 for n, p in host.parameters.items()})


def curve(out: Path, name: str = "log.jsonl") -> list[dict[str, Any]]:
    """The log without its only entry that time decides."""
    lines = [json.loads(line) for line in (out / name).read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


# --- processes ---


def in_child(work: Callable[[], object], stderr: Path | None = None) -> int:
    """Run `work` in a forked child, which may be killed in it; returns the exit code (negative: a signal).

    Skips the test where processes cannot fork (Windows).
    """
    if not hasattr(os, "fork"):
        pytest.skip("no os.fork on this system")
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        code = 70
        try:
            target = os.open(stderr or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(target, 1)
            os.dup2(target, 2)
            # pytest's capture holds other files than 1 and 2.
            sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
            sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
            work()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        except BaseException:  # noqa: BLE001 - a child must never return into pytest
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
