"""The two caching commands: configuration, processes and the closing line around `cache.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from byg_plugin import _cli, places
from byg_plugin.config.loading import load_config
from byg_plugin.config.sections import Config
from byg_plugin.data.tuples import read_tuples
from byg_plugin.processes import joined


def run(what: Literal["latents", "texts"], config_path: str, overrides: Sequence[str], *, prune: bool) -> None:
    """Cache `latents` or `texts` of a configuration, by all processes of an `accelerate launch`.

    Raises:
        ValueError: configuration, tuples or images are wrong; what can be cached is cached.
    """
    config = load_config(config_path, tuple(overrides))
    if config.model.host == "musubi":
        _in_musubi(what, config, prune=prune)
        return
    tuples = read_tuples(config.dataset)
    places.check_model(config.model, "vae", *(places.ENCODERS if what == "texts" else ()))

    # After what may be wrong in configuration and tuples: these import torch, seconds.
    from accelerate.utils import gather_object

    from byg_plugin.config.device import resolve_device
    from byg_plugin.config.extras import require_model_extras
    from byg_plugin.data import cache
    from byg_plugin.models import make_family

    require_model_extras(config.model)
    device = resolve_device(config.model.device)
    state = joined(cpu=device.type == "cpu")
    processes = cache.Processes(rank=state.process_index, world=state.num_processes, gather=gather_object)
    work = cache.cache_latents if what == "latents" else cache.cache_texts
    try:
        family = make_family(config)
        summary = work(config, family, tuples, state.device, processes, prune=prune)
    except cache.UnusableImages as error:
        state.destroy_process_group()
        if state.is_main_process:
            raise
        raise SystemExit(2) from error  # every process has the same list; one shows it
    # Not after what one process alone has raised: the group's end would wait for the others, which wait for this one, and nothing be said.
    state.destroy_process_group()
    unit = "texts" if what == "texts" else "images and clips" if config.dataset.frames > 1 else "images"
    line = f"{summary.encoded} {unit} encoded, {summary.kept} were cached already, in {config.dataset.cache_dir}"
    if summary.pruned:
        line += f"; {summary.pruned} unused entries removed"
    _cli.say(line, state.is_main_process)
    if summary.lost:
        listed = "".join(f"\n  - {reason}" for reason in summary.lost)
        _cli.say(
            f"note: {len(summary.lost)} are left out, dataset.max_lost = {config.dataset.max_lost} allows it:{listed}",
            state.is_main_process,
        )
        if prune:
            _cli.say(
                "not pruned: entries of what is left out cannot be told from unused ones; mend or remove its tuples and run this again",
                state.is_main_process,
            )
    if what == "latents" and (frames := family.clip_frames(config.dataset.frames)) != config.dataset.frames:
        _cli.say(
            f"note: clips have {frames} frames: dataset.frames = {config.dataset.frames} is rounded down to 4n + 1", state.is_main_process
        )
    if summary.small:
        _cli.say(
            f"note: {summary.small} {unit} are below dataset.resolution = {config.dataset.resolution}; they keep their size, "
            f"nothing is scaled up",
            state.is_main_process,
        )
    if state.is_main_process:
        _say_cut(summary.cut, config.conditioning.max_text_tokens)


def _say_cut(cut: Sequence[str], limit: int) -> None:
    if cut:
        _cli.say(f"note: {len(cut)} texts are longer than conditioning.max_text_tokens = {limit} tokens and were cut, e.g. {cut[0]!r}")


def _in_musubi(what: Literal["latents", "texts"], config: Config, *, prune: bool) -> None:
    if what == "latents":
        from byg_plugin.musubi.family import musubi_family

        script = musubi_family(config.model.family).latents_script
        raise ValueError(f"model.host = 'musubi': latents are cached by the host's own {script} with its dataset TOML")
    from byg_plugin.musubi import host as musubi

    _say_cut(musubi.cache_texts(config, prune=prune), config.conditioning.max_text_tokens)
