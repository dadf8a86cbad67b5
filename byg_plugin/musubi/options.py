"""musubi-tuner's own options in `[musubi]`: checked against the host's parser, and what this objective cannot honour refused.

The host takes any key of a configuration file in silence. Nothing here imports the host: `surface_of` makes plain data of its
argparse parser.
"""

from __future__ import annotations

import argparse
import difflib
import math
import pathlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from safetensors import SafetensorError, safe_open

from byg_plugin import families
from byg_plugin.config.fields import why_no_path
from byg_plugin.config.loading import shown
from byg_plugin.config.sections import Config, ModelConfig
from byg_plugin.families.spec import MusubiSpec
from byg_plugin.musubi.family import musubi_family
from byg_plugin.musubi.headers import problems_of_headers
from byg_plugin.musubi.network import problems_of_network
from byg_plugin.musubi.rates import problems_of_logs, problems_of_rates
from byg_plugin.musubi.start import problems_of_start

_KINDS = {str: "str", int: "int", float: "float", pathlib.Path: "path", None: "str"}


@dataclass(frozen=True, kw_only=True)
class Option:
    """One option of the host's parser.

    Attributes:
        kind: `flag`, `str`, `int`, `float`, `path`, or `other` for a converter of the host's own.
        many: takes a list.
        choices: allowed values; None: any.
    """

    kind: str
    many: bool = False
    choices: tuple[Any, ...] | None = None


Surface = dict[str, Option]


def surface_of(parser: argparse.ArgumentParser) -> Surface:
    """The options of a parser by name."""
    found: Surface = {}
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        kind = "flag" if action.nargs == 0 else _KINDS.get(action.type, "other")
        choices = None if action.choices is None else tuple(action.choices)
        found[action.dest] = Option(kind=kind, many=action.nargs in ("*", "+"), choices=choices)
    return found


def surface_from_json(recorded: Mapping[str, Mapping[str, Any]]) -> Surface:
    """What `surface_to_json` wrote."""
    return {
        name: Option(kind=o["kind"], many=o["many"], choices=tuple(o["choices"]) if o["choices"] else None) for name, o in recorded.items()
    }


def surface_to_json(surface: Surface) -> dict[str, dict[str, Any]]:
    """A surface as JSON data."""
    return {name: asdict(option) for name, option in surface.items()}


# --- what cannot be honoured: option -> why, and what to do ---

_T = "the objective draws t itself: leave it out and set objective.t_distribution, objective.t_shift, objective.t_min or objective.t_max"
_OURS = "byg_plugin's configuration takes its place: leave it out"
_HUB = "a training state is unpickled when it is read, which can run code; copy it here and give --resume FOLDER"
REFUSED = {
    **dict.fromkeys(
        (
            "timestep_sampling",
            "discrete_flow_shift",
            "sigmoid_scale",
            "logit_mean",
            "logit_std",
            "mode_scale",
            "min_timestep",
            "max_timestep",
            "preserve_distribution_shape",
            "num_timestep_buckets",
            "show_timesteps",
        ),
        _T,
    ),
    "weighting_scheme": "the losses are not weighted by t (Eq. 5 of the paper): leave it out",
    "guidance_scale": "it is HunyuanVideo's; FLUX's guidance embedding is conditioning.guidance: leave it out",
    "config_file": _OURS,
    "resume": "give it on the command line: --resume FOLDER",
    "resume_from_huggingface": _HUB,
    "task": "model.family decides it: leave it out",
    "no_metadata": "edit.py reads from the metadata how the source tokens are placed: leave it out",
    "sage_attn": "SageAttention cannot be trained with: set musubi.sdpa, musubi.flash_attn or musubi.xformers",
    "one_frame": "it gives frames positions of its own, and here the source's tokens have the noisy tokens': leave it out",
    "scale_weight_norms": "it changes the LoRA after the EMA has followed it: leave it out and lower musubi.learning_rate",
    "base_weights": "what is merged into the base is unknown to every tool that edits with the LoRA: merge it into the DiT's file first",
    "base_weights_multiplier": "see musubi.base_weights: leave it out",
    "dim_from_weights": "the host opens a file of the name True: set musubi.network_dim to the rank of musubi.network_weights",
    "dynamo_backend": "it wraps the whole network, inside which the LoRA cannot be taken off: set musubi.compile",
    "dynamo_mode": "see musubi.dynamo_backend: leave it out",
    "dynamo_fullgraph": "see musubi.dynamo_backend: leave it out",
    "dynamo_dynamic": "see musubi.dynamo_backend: leave it out",
    "force_v2_1_time_embedding": "edit.py and other tools have Wan2.2's own time embedding: leave it out",
}
_ATTENTION = ("sdpa", "flash_attn", "xformers", "flash3")
_NEEDED = {
    "dit": "the DiT's .safetensors file (Wan2.2: the low-noise expert's)",
    "dataset_config": "the host's dataset TOML",
    "output_dir": "the folder of results",
    "output_name": "the stem of the LoRA's files",
    "network_dim": "the LoRA's rank; the paper's is 64, the host's default 4",
    "learning_rate": "the host's default of 2e-6 trains nothing; the paper's is 3e-4 with AdamW",
    "optimizer_type": "e.g. 'AdamW' or 'AdamW8bit'",
}


def spec_of(model: ModelConfig) -> MusubiSpec:
    """What the host has for the family; the configuration refuses one that it has not."""
    spec = families.named(model.family).musubi
    assert spec is not None
    return spec


def problems(config: Config, surface: Surface) -> list[str]:
    """What is wrong with `[musubi]`, a sentence each; empty: nothing.

    Args:
        config: the whole configuration.
        surface: of the host that will run it.
    """
    given = config.musubi
    found = []
    for name, value in given.items():
        if name not in surface:
            found.append(_unknown(name, value, surface))
        elif name in REFUSED or name in spec_of(config.model).decided:
            found.append(f"musubi.{name} = {shown(value)} cannot be honoured: {REFUSED.get(name, REFUSED['task'])}")
        elif why := _wrong_type(value, surface[name]):
            found.append(f"musubi.{name} = {shown(value)}: {why}")
    found += _needed(config) + _named(config) + _together(config)
    return found + problems_of_network(config) + problems_of_rates(given) + problems_of_logs(given)


def _unknown(name: str, value: Any, surface: Surface) -> str:
    close = difflib.get_close_matches(name.replace("-", "_").lstrip("_"), surface, n=1, cutoff=0.6)
    advice = f"did you mean musubi.{close[0]}?" if close else "this version of musubi-tuner has no such option"
    return f"unknown key musubi.{name} = {shown(value)}; {advice}"


def _wrong_type(value: Any, option: Option) -> str | None:
    if option.many:
        if not isinstance(value, list):
            return "must be a list"
        return next((why for item in value if (why := _wrong_scalar(item, option))), None)
    return _wrong_scalar(value, option)


def _wrong_scalar(value: Any, option: Option) -> str | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    fits = {
        "flag": isinstance(value, bool),
        "str": isinstance(value, str),
        "path": isinstance(value, str),
        "int": isinstance(value, int) and is_number,
        "float": is_number,
        "other": is_number or isinstance(value, str),
    }
    wanted = {"flag": "true or false", "str": "a text", "path": "a path", "int": "a whole number", "float": "a number"}
    if not fits[option.kind]:
        return f"must be {wanted.get(option.kind, 'a text or a number')}"
    if is_number and not abs(value) < math.inf:  # unlike math.isfinite, also for integers beyond every float
        return "must be finite"
    if is_number and value < 0:
        return "must not be negative"
    if is_number and value > _MOST[isinstance(value, int)]:
        return f"must not be above {_MOST[isinstance(value, int)]:g}"
    if isinstance(value, str) and value and (why := why_no_path(value)):
        return why
    if option.choices is not None and value not in option.choices:
        close = difflib.get_close_matches(str(value), [str(choice) for choice in option.choices], n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        return f"must be one of {', '.join(map(repr, option.choices))}{hint}"
    return None


# Of a float, float32's largest; of an integer, int64's.
_MOST = (3.4e38, 2**63 - 1)
# The texts that the host takes for a dtype.
_FP8 = tuple(f"{start}{kind}" for kind in ("e4m3fn", "e4m3fnuz", "e5m2", "e5m2fnuz") for start in ("fp8_", "", "float8_"))
_DTYPES = ("bf16", "bfloat16", "fp16", "float16", "fp32", "float32", "float", "fp8", "float8", *_FP8)
# What would start as many processes, or hold a step back as long, as it says.
_AT_MOST = {"max_data_loader_n_workers": 256, "gradient_accumulation_steps": 100_000, "max_train_epochs": 10**6, "max_train_steps": 10**8}


def _needed(config: Config) -> list[str]:
    given = config.musubi
    found = [f"musubi.{name} is missing: {what}" for name, what in _NEEDED.items() if given.get(name) in (None, "")]
    chosen = [name for name in _ATTENTION if given.get(name)]
    if len(chosen) != 1:
        what = f"{' and '.join(chosen)} are set" if chosen else "none is set"
        found.append(f"set exactly one of {', '.join(f'musubi.{name}' for name in _ATTENTION)}; {what}")
    has_experts = families.named(config.model.family).has_experts
    if has_experts and not given.get("dit_high_noise"):
        found.append("musubi.dit_high_noise is missing: a rollout from noise to data passes through both experts")
    if not has_experts and given.get("dit_high_noise"):
        found.append(f"musubi.dit_high_noise: {config.model.family} has one network; leave it out")
    for name in ("dit", "dit_high_noise", "dataset_config", "sample_prompts", "network_weights"):
        path = given.get(name)
        if isinstance(path, str) and path and not why_no_path(path) and not pathlib.Path(path).is_file():
            found.append(f"musubi.{name} = {path!r}: no such file")
        elif name == "network_weights" and isinstance(path, str) and path:
            found += problems_of_start(config, path)
    return found + problems_of_headers(given)


def _named(config: Config) -> list[str]:
    """Names and numbers that the host looks at only when the model is loaded."""
    given, found = config.musubi, []
    for name in ("network_dim", "learning_rate", "max_train_steps", "max_train_epochs", "gradient_accumulation_steps"):
        if given.get(name) == 0:
            found.append(f"musubi.{name} = 0: must be above 0")
    for name in ("save_every_n_steps", "save_every_n_epochs", "sample_every_n_steps", "sample_every_n_epochs"):
        if given.get(name) == 0:
            found.append(f"musubi.{name} = 0: the host divides by it; leave it out for never")
    for name, largest in _AT_MOST.items():
        if isinstance(value := given.get(name), int) and value > largest:
            found.append(f"musubi.{name} = {shown(value)}: must not be above {largest:,}")
    found += _boundary(config)
    swapped, most = given.get("blocks_to_swap"), spec_of(config.model).most_swapped
    if isinstance(swapped, int) and swapped > most:
        found.append(f"musubi.blocks_to_swap = {shown(swapped)}: {config.model.family} has no more than {most} to swap")
    if isinstance(dtype := given.get("vae_dtype"), str) and dtype not in _DTYPES:
        found.append(f"musubi.vae_dtype = {dtype!r}: must be one of {', '.join(map(repr, _DTYPES))}")
    if given.get("lr_warmup_steps") and given.get("lr_scheduler") in (None, "constant"):
        found.append("musubi.lr_warmup_steps is not for a constant learning rate: set musubi.lr_scheduler = 'constant_with_warmup'")
    return found


def _boundary(config: Config) -> list[str]:
    """The host takes what is above 1 for thousandths; at 0 or 1 one expert would serve all t, and the other be loaded for nothing."""
    given, spec = config.musubi.get("timestep_boundary"), families.named(config.model.family)
    if not spec.has_experts or not isinstance(given, int | float) or 0 < (given / 1000 if given > 1 else given) < 1:
        return []
    assert spec.boundary is not None
    return [
        f"musubi.timestep_boundary = {shown(given)}: t from which the high-noise expert serves, in thousandths, 2 to 999: leave it out for "
        f"the checkpoint's own, {spec.boundary * 1000:g}"
    ]


def _together(config: Config) -> list[str]:
    """Combinations that fail, or go wrong in silence."""
    given, found = config.musubi, []
    swapped = bool(given.get("blocks_to_swap"))
    if given.get("fp8_scaled") and not given.get("fp8_base"):
        found.append("musubi.fp8_scaled needs musubi.fp8_base = true")
    if swapped and given.get("offload_inactive_dit"):
        found.append(
            "musubi.blocks_to_swap and musubi.offload_inactive_dit exclude each other; Wan2.2 on a small card: musubi.blocks_to_swap"
        )
    if given.get("block_swap_h2d_only") and not given.get("gradient_checkpointing"):
        found.append(
            "musubi.block_swap_h2d_only overwrites weights that a backward pass needs, unless musubi.gradient_checkpointing = true"
        )
    if given.get("block_swap_h2d_only") and families.named(config.model.family).has_experts:
        found.append(
            "musubi.block_swap_h2d_only keeps the first expert's weights when the host exchanges the experts: leave it out, "
            "musubi.blocks_to_swap alone is right"
        )
    if given.get("gradient_checkpointing_cpu_offload") and not given.get("gradient_checkpointing"):
        found.append("musubi.gradient_checkpointing_cpu_offload does nothing without musubi.gradient_checkpointing = true")
    samples = [name for name in ("sample_every_n_steps", "sample_every_n_epochs", "sample_at_first") if given.get(name)]
    if samples and not given.get("sample_prompts"):
        found.append(
            f"musubi.{samples[0]} needs musubi.sample_prompts, a file of instructions, each with its source: make it snow --ci photo.jpg"
        )
    if given.get("sample_prompts"):
        for name in ("vae", *spec_of(config.model).text_encoders):
            path = given.get(name)
            if not isinstance(path, str) or why_no_path(path) or not pathlib.Path(path).is_file():
                found.append(f"musubi.sample_prompts needs musubi.{name} = {path!r}: no such file")
    if given.get("persistent_data_loader_workers") and given.get("max_data_loader_n_workers") == 0:
        found.append("musubi.persistent_data_loader_workers needs workers: set musubi.max_data_loader_n_workers above 0, or leave it out")
    if given.get("fp8_t5") and given.get("sample_prompts") and not spec_of(config.model).previews_with_fp8_t5:
        found.append("musubi.fp8_t5 stops the host's previews of FLUX (it names a dtype that torch has not): leave it out")
    return found


def check_precision(given: Mapping[str, Any]) -> None:
    """The host's Wan computes in its DiT file's 16 bit type, and asserts in its own words that `mixed_precision` is that one.

    Raises:
        ValueError: the two do not fit, or the file is no DiT of Wan.
    """
    path, key = given["dit"], "blocks.0.cross_attn.k.weight"
    try:
        with safe_open(path, framework="pt") as file:
            names = {key, f"model.diffusion_model.{key}"}.intersection(file.keys())
            stored = file.get_slice(names.pop()).get_dtype() if names else None
    except (OSError, SafetensorError) as error:
        raise ValueError(f"musubi.dit = {path!r}: not a readable safetensors file ({error}); download it again") from error
    if stored is None:
        raise ValueError(f"musubi.dit = {path!r}: no Wan DiT in the original layout (it has no {key})")
    if stored.startswith("F8") and given.get("fp8_scaled"):
        raise ValueError(f"musubi.fp8_scaled: {path} is in 8 bit already; leave it out, or give the file in 16 bit")
    wanted, asked = {"F16": "fp16", "BF16": "bf16"}.get(stored), given.get("mixed_precision")
    if wanted is not None and asked not in (wanted, "no"):
        raise ValueError(f"musubi.mixed_precision = {asked!r}: {path} is in {wanted}, and the host needs the same: set {wanted!r}")


def arguments(config: Config, parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The namespace that the host's own entry point would make, with our choices in it.

    Raises:
        ValueError: `[musubi]` has problems; lists all of them.
    """
    surface = surface_of(parser)
    if found := problems(config, surface):
        raise ValueError("[musubi]:\n" + "\n".join(f"  - {line}" for line in found))
    args = parser.parse_args([])
    converters = {action.dest: action.type for action in parser._actions if callable(action.type)}
    for name, value in config.musubi.items():
        convert = converters.get(name)
        try:
            setattr(args, name, _converted(value, surface[name], convert))
        except (ValueError, argparse.ArgumentTypeError) as error:
            raise ValueError(f"[musubi]:\n  - musubi.{name} = {value!r}: {error}") from error
    spec = spec_of(config.model)
    for name, value in spec.decided.items():
        setattr(args, name, value)
    args.network_module = args.network_module or spec.network_module
    args.network_args = _network_args(config)
    # Every rank draws from the same seed; without one the host gives each rank its own.
    args.seed = config.train.seed
    # As the host's entry points do.
    args.dit_dtype = None
    args.vae_dtype = args.vae_dtype or "bfloat16"
    return args


def _network_args(config: Config) -> list[str] | None:
    """The host's, and what leaves out the layers that the embedded host does not adapt, unless the user has patterns of his own."""
    given = config.musubi.get("network_args")
    left_out = musubi_family(config.model.family).left_out(config.musubi)
    if not left_out or any(one.startswith("exclude_patterns=") for one in given or ()):
        return given
    return [*(given or ()), f"exclude_patterns={list(left_out)!r}"]


def _converted(value: Any, option: Option, convert: Any) -> Any:
    if option.kind == "path":
        return pathlib.Path(value)
    if option.kind == "other":
        return convert(str(value))
    return float(value) if option.kind == "float" and not option.many else value
