"""The demo inside musubi-tuner: the same tuples, base, objective and figures, trained by that host.

    python -m benchmarks.demo_musubi --host-path ../musubi-tuner --out out/demo_musubi

Run it from the repository's root, in an environment that can import the host (docs/musubi.md) and has `.[demo]`. The host's own
scripts know FLUX.1-dev's autoencoder and encoders alone, so its cache files are written from the demo's caches; what is trained,
saved and read back is the host's. configs/demo.toml is the recipe; `recipe` has what is said in the host's words, and docs/musubi.md
what differs. Figures go into benchmarks/results/demo_musubi.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from benchmarks.tiny_world_run import base_digest, commit, write_json
from byg_plugin import _cli
from byg_plugin import caching as run_cache
from byg_plugin.config.loading import load_config, parse_config
from byg_plugin.config.sections import Config
from byg_plugin.data.dataset import CachedTuples
from byg_plugin.demo import metrics, sheet, world
from byg_plugin.demo.__main__ import EVAL_TUPLES, TRAIN_TUPLES
from byg_plugin.demo.commands import run as run_command
from byg_plugin.models import flux_files, make_family
from byg_plugin.musubi import cache as musubi_cache
from byg_plugin.musubi import host as musubi
from byg_plugin.musubi.family import musubi_family

ROOT = Path(__file__).resolve().parents[1]
BASE = ROOT / "byg_plugin" / "demo" / "base"
RESULT = ROOT / "benchmarks" / "results" / "demo_musubi.json"
# Of the host's FLUX: every linear of the blocks but the modulation, and the two embedders, as lora.targets of the demo.
_ADAPTED = r"(img_in|txt_in|double_blocks\.\d+\.(img|txt)_(attn\.(qkv|proj)|mlp\.[02])|single_blocks\.\d+\.linear[12])"


def create_arch_network(multiplier: float, dim: int, alpha: float, vae: Any, encoders: Any, transformer: nn.Module, **options: Any) -> Any:
    """musubi.network_module: the host's LoRA on the embedders too, without which a base this small cannot copy."""
    from musubi_tuner.networks import lora

    whole = [type(transformer).__name__]
    options |= {"exclude_patterns": [".*"], "include_patterns": [_ADAPTED]}
    return lora.create_network(whole, "lora_unet", multiplier, dim, alpha, vae, encoders, transformer, **options)


def recipe(demo: Config, out: Path, host_path: str | None) -> Config:
    """configs/demo.toml in the host's words."""
    # The host has no merged weights; the identity pass runs by itself (the same but for rounding), and the reverse pass has the prior too,
    # as when the committed figures were made.
    train, objective = demo.train, demo.objective.model_dump(mode="json", exclude={"rollout_weights", "merge_identity", "reverse_prior"})
    assert train.optimizer == "muon" and train.lr_schedule == "cosine"
    own = {
        "dit": str(out / "dit.safetensors"),
        "dataset_config": str(out / "dataset.toml"),
        "output_dir": str(out / "training"),
        "output_name": "demo",
        "network_module": "benchmarks.demo_musubi",
        "network_dim": demo.lora.rank,
        "network_alpha": demo.lora.rank,
        "optimizer_type": "torch.optim.Muon",
        "optimizer_args": [f"weight_decay={train.weight_decay}", "adjust_lr_fn='match_rms_adamw'"],
        "learning_rate": train.lr,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": train.lr_warmup_steps,
        "max_grad_norm": train.max_grad_norm,
        "max_train_steps": train.steps,
        "mixed_precision": train.mixed_precision,
        "save_every_n_steps": train.save_every,
        "max_data_loader_n_workers": 0,
        "seed": train.seed,
        "sdpa": True,
    }
    model = {"family": "flux", "host": "musubi", "device": "cpu", **({"host_path": host_path} if host_path else {})}
    conditioning = demo.conditioning.model_dump(mode="json")
    dataset = {"tuples": str(out / "train" / "trained.jsonl")}
    return parse_config({"model": model, "dataset": dataset, "conditioning": conditioning, "objective": objective, "musubi": own})


def shrink(base: Path) -> None:
    """The host knows one size of FLUX; here it means the demo's."""
    from musubi_tuner.flux import flux_models

    sizes = json.loads((base / "transformer" / "config.json").read_text(encoding="utf-8"))
    spec = flux_models.configs_flux_dev_context
    params = dataclasses.replace(
        spec.params,
        hidden_size=sizes["num_attention_heads"] * sizes["attention_head_dim"],
        num_heads=sizes["num_attention_heads"],
        depth=sizes["num_layers"],
        depth_single_blocks=sizes["num_single_layers"],
        axes_dim=sizes["axes_dims_rope"],
        context_in_dim=sizes["joint_attention_dim"],
        vec_in_dim=sizes["pooled_projection_dim"],
    )
    flux_models.configs_flux_dev_context = dataclasses.replace(spec, params=params)


def write_host_files(demo: Config, out: Path) -> None:
    """The base in the host's layout, and its caches and dataset TOML from ours."""
    network = flux_files.TRANSFORMER.load(BASE / "transformer", dtype=torch.float32)
    native = flux_files.to_native_layout(network.state_dict())
    save_file({name: value.contiguous().clone() for name, value in native.items()}, out / "dit.safetensors")
    data = CachedTuples(demo, make_family(demo))
    lines = [line for line in (out / "train" / "tuples.jsonl").read_text(encoding="utf-8").splitlines() if line.strip()]
    kept = {item.source.name for item in data.tuples}
    trained = [line for line in lines if Path(json.loads(line)["source"]).name in kept]
    (out / "train" / "trained.jsonl").write_text("\n".join(trained) + "\n", encoding="utf-8")
    folder, size = out / "host_cache", demo.dataset.resolution
    folder.mkdir(exist_ok=True)
    for index, item in enumerate(data.tuples):
        latents = data[index]["source"][:, 0]
        shape = "x".join(map(str, (1, *latents.shape[1:])))
        save_file({f"latents_{shape}_float32": latents.contiguous()}, folder / f"{item.source.stem}_{size:04d}x{size:04d}_fk.safetensors")
        cached = musubi_cache.Item(stem=item.source.stem, path=folder / f"{item.source.stem}_fk_te.safetensors")

        def encoding(text: str) -> dict[str, torch.Tensor]:
            found = data.encoding(text)
            return {"t5": found["t5"], "pooled": found["pooled"][None]}

        musubi_cache.write_roles(cached, [item], encoding, musubi_family("flux"), "demo")
    (out / "dataset.toml").write_text(
        f"[general]\nresolution = [{size}, {size}]\nbatch_size = {demo.train.batch_size}\nenable_bucket = false\n"
        f"[[datasets]]\nimage_directory = {json.dumps(str(out / 'train' / 'images'))}\ncache_directory = {json.dumps(str(folder))}\n",
        encoding="utf-8",
    )


def run(out: Path, host_path: str | None, overrides: list[str]) -> dict[str, Any]:
    """All stages; returns what is written as the result."""
    out.mkdir(parents=True, exist_ok=True)
    world.write_dataset(out / "train", TRAIN_TUPLES, seed=0, split="train")
    world.write_dataset(out / "eval", EVAL_TUPLES, seed=0, split="eval")
    paths = {"model.path": BASE, "dataset.tuples": out / "train" / "tuples.jsonl", "dataset.cache_dir": out / "cache", "output.dir": out}
    settings = [f"{key}={json.dumps(str(value))}" for key, value in paths.items()] + overrides
    toml = str(ROOT / "configs" / "demo.toml")
    demo = load_config(toml, settings)
    for what in ("latents", "texts"):
        run_cache.run(what, toml, settings, prune=False)
    write_host_files(demo, out)

    config = recipe(demo, out, host_path)
    musubi.open_checkout(config)
    shrink(BASE)
    os.environ["ACCELERATE_USE_CPU"] = "true"
    wall, cpu = time.perf_counter(), time.process_time()
    lora = musubi.train(config)
    seconds = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    lora = lora.with_name("demo-ema.safetensors")

    words = [word for setting in settings for word in ("--set", setting)]
    tuples = ["--tuples", str(out / "eval" / "tuples.jsonl"), "--schedule", "uniform", "--batch-size", "16"]
    run_command("-m", "byg_plugin.edit", "--config", toml, *words, "--lora", lora, *tuples, "--out", out / "edits")
    truths = world.load_scenes(out / "eval")
    pictures = sorted(path for path in (out / "edits").glob("*.png") if not path.stem.endswith("_side_by_side"))
    images = {edit.id: np.asarray(Image.open(path).convert("RGB")) for edit, path in zip(truths, pictures, strict=True)}
    tables = {"host musubi": metrics.evaluate(images, truths)}
    metrics.write_tables(out, tables)
    sheet.contact_sheet(out / "contact_sheet.png", truths, images, columns=8, rows=2)
    print("\n" + metrics.markdown(tables) + f"look at {out / 'contact_sheet.png'}")
    settings_of_host = {key: value for key, value in config.musubi.items() if key not in ("dit", "dataset_config", "output_dir")}
    return {
        "commit": commit(),
        "base": base_digest(BASE),
        "torch": torch.__version__,
        "objective": config.objective.model_dump(mode="json"),
        "musubi": settings_of_host,
        "training_seconds": seconds,
        "table": tables["host musubi"],
    }


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.demo_musubi", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--host-path", help="folder of a musubi-tuner checkout (default: the one that is installed)")
    parser.add_argument("--out", type=Path, default=Path("out/demo_musubi"), help="folder of everything that is made; not there yet")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override configs/demo.toml; repeatable")
    args = parser.parse_args()
    if args.out.exists():
        raise ValueError(f"--out {args.out} exists: choose a new folder, or delete it")
    record = run(args.out, args.host_path, args.set)
    if not args.set:
        write_json(RESULT, record)
        print(f"figures: {RESULT}")


if __name__ == "__main__":
    _cli.run(main)
