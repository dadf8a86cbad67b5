"""Train an editing LoRA.

accelerate launch byg_plugin/train_network.py --config configs/flux_image.toml [--set train.steps=100] [--resume latest]
accelerate launch byg_plugin/train_network.py --config ... --resume FOLDER --discard-later    go on from an earlier checkpoint
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
import os
from collections import Counter
from typing import TYPE_CHECKING, Any

from byg_plugin import _cli

if TYPE_CHECKING:
    from byg_plugin.config.sections import Config
    from byg_plugin.models.base import Family


logger = logging.getLogger(__name__)


def _parser() -> argparse.ArgumentParser:
    parser = _cli.common_parser(__doc__ or "")
    parser.add_argument("--resume", type=os.path.expanduser, metavar="latest|FOLDER", help="go on from the newest, or this, checkpoint")
    parser.add_argument(
        "--discard-later",
        action="store_true",
        help="with --resume FOLDER: later checkpoints and previews are renamed discarded-step-..., their lines in the logs dropped",
    )
    parser.add_argument(
        "--allow-distilled",
        action="store_true",
        help="train on weights that say that they are distilled, which breaks most of them",
    )
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration as JSON and stop")
    parser.add_argument(
        "--dry-run", action="store_true", help="print items, buckets, tokens, a decoded sample's place and the memory sum; stop"
    )
    return parser


def main() -> None:
    """The command; `_cli.run` turns errors into one line."""
    args = _parser().parse_args()
    _check_arguments(args)
    from byg_plugin.config.loading import load_config

    config = load_config(args.config, args.set)
    if args.print_config:
        print(config.to_json())
        return
    if args.dry_run and args.resume is not None and config.model.host != "musubi":
        raise ValueError("--resume does nothing with --dry-run: leave it out")
    from byg_plugin.data.tuples import check_paths

    check_paths(config.dataset)
    # After what needs neither: these import torch and diffusers, seconds.
    if config.model.host == "musubi":
        from byg_plugin.musubi import host as musubi

        if args.discard_later:
            raise ValueError('--discard-later: model.host = "musubi" gives each part names of its own and overwrites nothing; leave it out')
        if args.dry_run:
            musubi.dry_run(config, args.resume)
        else:
            print(f"LoRA: {musubi.train(config, args.resume)}", flush=True)
        return
    from byg_plugin import places

    places.check_model(config.model, *places.NETWORKS, "vae", *places.ENCODERS)
    if not args.allow_distilled:
        places.check_not_distilled(config.model)
    if config.lora.init_from and args.resume is None:
        places.check_lora(config.lora.init_from, "lora.init_from = ")
    if config.lora.other_expert:
        places.check_lora(config.lora.other_expert, "lora.other_expert = ")
    from byg_plugin.config.device import resolve_device
    from byg_plugin.config.extras import require_model_extras
    from byg_plugin.models import make_family

    device = resolve_device(config.model.device)
    require_model_extras(config.model)
    family = make_family(config)
    if args.dry_run:
        if os.environ.get("RANK", "0") == "0":  # under a launcher once
            dry_run(config, family, device)
        return
    train(config, family, device, args.resume, discard_later=args.discard_later)
    _leave()


def _check_arguments(args: argparse.Namespace) -> None:
    """An option that would not be honoured beside another is refused, not ignored."""
    if args.print_config and args.dry_run:
        raise ValueError("--print-config and --dry-run each do one thing and stop: give one of them")
    if args.resume is not None and not args.resume.strip():
        raise ValueError('--resume "": give latest or the folder of a checkpoint, or leave --resume out to start anew')
    if args.resume is not None and args.print_config:
        raise ValueError("--resume does nothing with --print-config: leave it out")
    if args.discard_later and args.resume in (None, "latest"):
        raise ValueError("--discard-later goes with --resume FOLDER, the checkpoint that is to be the last one")


def train(config: Config, family: Family, device: Any, resume: str | None, *, discard_later: bool = False) -> Path:
    """Train to the end; returns the LoRA file. `output.dir` is this run's alone meanwhile.

    Raises:
        ValueError: something the user can mend, before any model is loaded.
    """
    from contextlib import nullcontext
    from datetime import timedelta

    from accelerate import Accelerator, InitProcessGroupKwargs

    from byg_plugin.config.extras import require_training_extras
    from byg_plugin.folders import alone_in
    from byg_plugin.processes import PATIENCE
    from byg_plugin.training.checkpoint import make_room
    from byg_plugin.training.launch import check_processes, read_launch, take_over
    from byg_plugin.training.loop import Interrupted, Trainer
    from byg_plugin.version import versions

    require_training_extras(config.train)
    evaluation = _evaluation(config)
    launch = read_launch(config, family)
    take_over()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    tracker = None if config.train.tracker == "none" else config.train.tracker
    # The other processes wait while the first one saves, validates and previews. In what they do together the watchdog is sooner.
    patience = InitProcessGroupKwargs(timeout=max(PATIENCE, timedelta(minutes=2 * config.train.collective_timeout)))
    accelerator = Accelerator(cpu=device.type == "cpu", log_with=tracker, project_dir=config.output.dir, kwargs_handlers=[patience])
    check_processes(accelerator)
    folder = Path(config.output.dir)
    with alone_in(folder, "output.dir") if accelerator.is_main_process else nullcontext():
        trainer = Trainer(config, family, accelerator, resume, discard_later=discard_later, launch=launch, evaluate=evaluation)
        if accelerator.is_main_process:
            _write_beside(config, versions(), make_room(trainer.checkpoints))
        if tracker:
            _start_tracker(accelerator, tracker, folder, trainer.step)
        if evaluation is not None:
            evaluation.start(trainer)
        stopped: Interrupted | None = None
        try:
            lora = trainer.run()
        except Interrupted as stop:  # by all processes, at one step
            stopped = stop
        finally:
            _end_trackers(accelerator)
        accelerator.state.destroy_process_group()
        if stopped is not None:
            _cli.say(str(stopped), accelerator.is_main_process)
            raise KeyboardInterrupt from stopped
    _cli.say(f"LoRA: {lora}", accelerator.is_main_process)
    return lora


def _evaluation(config: Config) -> Any:
    """What scores the run's edits; None: nothing does."""
    if not config.evaluate.every:
        return None
    from byg_plugin.evaluation.while_training import TrainingScores

    return TrainingScores(config)


def _leave() -> None:
    """Sharded engines abort now and then in the interpreter's teardown, after all work, which a launcher would call a failed run."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _start_tracker(accelerator: Any, tracker: str, folder: Path, step: int) -> None:
    """Curves of steps after `step`, of a killed start or of discarded checkpoints, are hidden by TensorBoard."""
    options = {"wandb": {"dir": str(folder)}, "tensorboard": {"purge_step": step + 1}}
    try:
        accelerator.init_trackers("byg", init_kwargs={tracker: options[tracker]})
    except OSError as error:
        raise ValueError(f"train.tracker = {tracker!r} cannot write into output.dir = {folder}: {error.strerror}; make room") from error


def _end_trackers(accelerator: Any) -> None:
    """A disk that is full ends the run by its own message, not by the last lines of a curve.

    The process group stays after an error: its end would wait for the others, which wait for this process, and nothing be said.
    """
    try:
        for tracker in accelerator.trackers:
            tracker.finish()
    except OSError as error:
        logger.warning("the tracker's last lines were not written: %s", error)


def dry_run(config: Config, family: Family, device: Any) -> None:
    """Print what would be trained. Loads the VAE for one decoded sample, never the network."""
    from byg_plugin.data.dataset import CachedTuples
    from byg_plugin.data.rules import ROLES
    from byg_plugin.images import save_png, to_pil

    try:
        data = CachedTuples(config, family, "train")
    except ValueError:
        side, frames = config.dataset.resolution, family.clip_frames(config.dataset.frames)
        _print_memory(config, family, device, (side, side, frames))  # needs no caches
        raise
    sizes = [data.bucket(i) for i in range(len(data))]
    whole = [(width, height, *(frames or (1,))) for width, height, *frames in sizes]
    _print_memory(config, family, device, max(whole, key=lambda size: family.sequence_tokens(size[1], size[0], size[2])))
    buckets = Counter(sizes)
    print(f"tuples: {len(data)} to train, {data.held_out} held out")
    for bucket, count in buckets.most_common():
        print(f"  {count:6d} in bucket {bucket}")
    example, item = data[0], data.tuples[0]
    picture = to_pil(family.decode_latents(family.load_vae(device), example["source"][None].to(device))[0, :, 0])
    path = Path(config.output.dir) / "dry_run_sample.png"
    texts = {role: getattr(item, role) for role in ROLES}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_png(picture, path, texts)
    except OSError as error:
        raise ValueError(f"output.dir = {config.output.dir} is not writable: {error.strerror}; choose another folder") from error
    print(f"first tuple, decoded from its cached latents: {path}")
    for role, text in texts.items():
        print(f"  {role}: {text}")


def _print_memory(config: Config, family: Family, device: Any, size: tuple[int, ...]) -> None:
    """The model, its LoRA and the memory sum of a step at (width, height, frames)."""
    from byg_plugin.hosts.diffusers import lora_shapes
    from byg_plugin.training import memory
    from byg_plugin.training.launch import read_launch

    processes = int(os.environ.get("WORLD_SIZE", "1"))
    launch = read_launch(config, family)
    networks = family.meta_transformers()
    shapes = lora_shapes(next(iter(networks.values())), config.lora, family)
    _, trained = memory.lora_copies(config.lora, len(networks))
    width, blocks = memory.sizes(next(iter(networks.values())))
    tokens = family.sequence_tokens(size[1], size[0], size[2])
    print(
        f"model: {config.model.family}, {sum(p.numel() for n in networks.values() for p in n.parameters()):,} parameters, {blocks} blocks"
    )
    modules, parameters = trained * len(shapes) // 2, trained * sum(a * b for a, b in shapes)
    print(f"LoRA: rank {config.lora.rank}, {modules} modules, {parameters:,} parameters")
    length = f", {size[2]} frames" if size[2] > 1 else ""
    parts = "noisy + source + text" if family.spec.text_in_sequence else "noisy + source"
    print(f"longest sequence, at {size[0]} x {size[1]}{length}: {tokens} tokens ({parts})")
    if processes > 1:
        print(f"engine: {launch.name}, {processes} processes; the memory is one process's")
    lines = memory.memory_sum(config, networks, shapes, tokens, width, blocks, launch, processes)
    if config.objective.criticised:
        lines = _with_critic(lines, config, family, device, size)
    print("device memory of a step:\n" + memory.report(lines))


def _with_critic(lines: Any, config: Config, family: Family, device: Any, size: tuple[int, ...]) -> Any:
    """The memory sum with the critic's parts; says what it is and what it keeps at (width, height)."""
    from byg_plugin.critics import check_critic, shares_device
    from byg_plugin.critics.memory import critic_memory
    from byg_plugin.training import memory

    described = check_critic(config)
    kept = critic_memory(config.critic, described, family, size[0], size[1])
    shown = described.view.size(size[1], size[0])
    shared = shares_device(config.critic, device)
    where = "the networks' device" if shared else config.critic.device
    print(f"critic: {described.config.model_type} on {where}, shown {shown[1]} x {shown[0]} pixels")
    parts = {"its weights": kept.model, "its VAE": kept.vae, "the graph of a question": kept.answer, "of the decoder": kept.decoder}
    print("  " + ", ".join(f"{name} {size / memory.GIB:.2f} GiB" for name, size in parts.items()) + " (the graphs one after the other)")
    return memory.with_critic(lines, kept, elsewhere=not shared)


def _write_beside(config: Config, versions: dict[str, str], remedy: str) -> None:
    """Resolved configuration, versions and command beside the outputs."""
    import json

    from byg_plugin.folders import write_text

    folder = Path(config.output.dir)
    texts = {"config.json": config.to_json(), "run.json": json.dumps({"versions": versions, "command": sys.argv}, indent=2)}
    for name, text in texts.items():
        try:
            write_text(folder / name, text)
        except OSError as error:
            raise ValueError(f"cannot write {folder / name}: {error.strerror}. {remedy}") from error


if __name__ == "__main__":
    _cli.run(main)
