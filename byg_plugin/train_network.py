"""Train an editing LoRA.

accelerate launch byg_plugin/train_network.py --config configs/flux_image.toml [--set train.steps=100] [--resume latest]
python byg_plugin/train_network.py --config ... --print-config     the resolved configuration
python byg_plugin/train_network.py --config ... --dry-run          what would be trained, and the memory sum
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):  # started as a script: the package's parent must be importable, the package's folder must not
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import logging
from collections import Counter
from typing import TYPE_CHECKING, Any

from byg_plugin import _cli, families

if TYPE_CHECKING:
    from byg_plugin.models.base import Family
    from byg_plugin.training.config import Config


def _parser() -> argparse.ArgumentParser:
    parser = _cli.common_parser(__doc__ or "")
    parser.add_argument("--resume", metavar="latest|FOLDER", help="go on from the newest, or this, checkpoint")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration as JSON and stop")
    parser.add_argument(
        "--dry-run", action="store_true", help="print items, buckets, tokens, a decoded sample's place and the memory sum; stop"
    )
    return parser


def main() -> None:
    """The command; `_cli.run` turns errors into one line."""
    args = _parser().parse_args()
    from byg_plugin.training.config import load_config

    config = load_config(args.config, args.set)
    if args.print_config:
        print(config.to_json())
        return
    from byg_plugin.data.tuples import check_places

    check_places(config.dataset)
    # After what needs neither: these import torch and diffusers, seconds.
    if config.model.host == "musubi":
        from byg_plugin.hosts import musubi

        if args.dry_run:
            musubi.dry_run(config)
        else:
            print(f"LoRA: {musubi.train(config, args.resume)}", flush=True)
        return
    from byg_plugin.models import make_family
    from byg_plugin.training.device import resolve_device
    from byg_plugin.training.extras import require_model_extras

    device = resolve_device(config.model.device)
    require_model_extras(config)
    family = make_family(config)
    if args.dry_run:
        dry_run(config, family, device)
        return
    train(config, family, device, args.resume)


def train(config: Config, family: Family, device: Any, resume: str | None) -> Path:
    """Train to the end; returns the LoRA file.

    Raises:
        ValueError: something the user can mend, before any model is loaded.
    """
    from datetime import timedelta

    from accelerate import Accelerator, InitProcessGroupKwargs

    from byg_plugin.training.extras import require_training_extras
    from byg_plugin.training.loop import Interrupted, Trainer, versions

    require_training_extras(config)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    tracker = None if config.train.tracker == "none" else config.train.tracker
    # The other processes wait while the first one saves, validates and previews.
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=3))
    accelerator = Accelerator(cpu=device.type == "cpu", log_with=tracker, project_dir=config.output.dir, kwargs_handlers=[patience])
    _check_launch(accelerator, config)
    trainer = Trainer(config, family, accelerator, resume)
    if accelerator.is_main_process:
        _write_beside(config, versions())
    if tracker:
        accelerator.init_trackers("byg", init_kwargs={"wandb": {"dir": config.output.dir}} if tracker == "wandb" else {})
    try:
        lora = trainer.run()
    except Interrupted as stop:
        _cli.say(str(stop), accelerator.is_main_process)
        raise KeyboardInterrupt from stop
    finally:
        accelerator.end_training()
    _cli.say(f"LoRA: {lora}", accelerator.is_main_process)
    return lora


def dry_run(config: Config, family: Family, device: Any) -> None:
    """Print what would be trained. Loads the VAE for one decoded sample, never the network."""
    from byg_plugin.data.dataset import CachedTuples
    from byg_plugin.images import save_png, to_pil

    try:
        data = CachedTuples(config, family, "train")
    except ValueError:
        side, frames = config.dataset.resolution, family.clip_frames(config.dataset.frames)
        _print_memory(config, family, (side, side, frames))  # needs no caches
        raise
    sizes = [data.bucket(i) for i in range(len(data))]
    whole = [(width, height, *(frames or (1,))) for width, height, *frames in sizes]
    _print_memory(config, family, max(whole, key=lambda size: family.sequence_tokens(size[1], size[0], size[2])))
    buckets = Counter(sizes)
    print(f"tuples: {len(data)} to train, {config.dataset.validation_items} held out")
    for bucket, count in buckets.most_common():
        print(f"  {count:6d} in bucket {bucket}")
    example, item = data[0], data.tuples[0]
    picture = to_pil(family.decode_latents(family.load_vae(device), example["source"][None].to(device))[0, :, 0])
    path = Path(config.output.dir) / "dry_run_sample.png"
    texts = {role: getattr(item, role) for role in ("src_caption", "tgt_caption", "instruction", "reverse_instruction")}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_png(picture, path, texts)
    except OSError as error:
        raise ValueError(f"output.dir = {config.output.dir} is not writable: {error.strerror}; choose another folder") from error
    print(f"first tuple, decoded from its cached latents: {path}")
    for role, text in texts.items():
        print(f"  {role}: {text}")


def _print_memory(config: Config, family: Family, size: tuple[int, ...]) -> None:
    """The model, its LoRA and the memory sum of a step at (width, height, frames)."""
    from byg_plugin.hosts.diffusers import lora_shapes
    from byg_plugin.training import memory

    networks = family.meta_transformers()
    shapes = lora_shapes(next(iter(networks.values())), config, family)
    _, trained = memory.lora_copies(config, len(networks))
    width, blocks = memory.sizes(next(iter(networks.values())))
    tokens = family.sequence_tokens(size[1], size[0], size[2])
    print(
        f"model: {config.model.family}, {sum(p.numel() for n in networks.values() for p in n.parameters()):,} parameters, {blocks} blocks"
    )
    modules, parameters = trained * len(shapes) // 2, trained * sum(a * b for a, b in shapes)
    print(f"LoRA: rank {config.lora.rank}, {modules} modules, {parameters:,} parameters")
    length = f", {size[2]} frames" if size[2] > 1 else ""
    parts = "noisy + source" if config.model.family in families.WAN else "noisy + source + text"
    print(f"longest sequence, at {size[0]} x {size[1]}{length}: {tokens} tokens ({parts})")
    print("device memory of a step:\n" + memory.report(memory.memory_sum(config, networks, shapes, tokens, width, blocks)))


def _check_launch(accelerator: Any, config: Config) -> None:
    """What `accelerate launch` was told and this loop does not do is refused, not ignored."""
    kind = accelerator.distributed_type.value
    if kind not in ("NO", "MULTI_GPU", "MULTI_CPU", "MULTI_XPU"):
        raise ValueError(f"accelerate launch asks for {kind}, which this host does not support: run plain multi-GPU (accelerate config)")
    asked = accelerator.mixed_precision
    if asked not in ("no", config.train.mixed_precision):
        raise ValueError(
            f'accelerate launch asks for mixed precision "{asked}", train.mixed_precision is "{config.train.mixed_precision}": '
            f"set one of them to the other's value"
        )


def _write_beside(config: Config, versions: dict[str, str]) -> None:
    """Resolved configuration, versions and command beside the outputs."""
    import json

    folder = Path(config.output.dir)
    (folder / "config.json").write_text(config.to_json(), encoding="utf-8")
    (folder / "run.json").write_text(json.dumps({"versions": versions, "command": sys.argv}, indent=2), encoding="utf-8")


if __name__ == "__main__":
    _cli.run(main)
