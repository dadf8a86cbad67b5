"""The host's optimizer and schedule of the learning rate, made here of one matrix as the host makes them of the LoRA, once the DiT is
loaded; and its trackers."""

from __future__ import annotations

import difflib
import inspect
import pathlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from byg_plugin.config.fields import why_no_path
from byg_plugin.config.loading import shown
from byg_plugin.musubi.network import importable
from byg_plugin.musubi.words import literals

_STEPS = 1600  # the host's own number, unless it is given one
# What torch, transformers and diffusers raise for arguments that they do not take.
_REFUSALS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def problems_of_rates(given: Mapping[str, Any]) -> list[str]:
    """What is wrong with optimizer, schedule and their arguments, a sentence each; wrong types are told elsewhere.

    Args:
        given: `[musubi]`.
    """
    name, lr = given.get("optimizer_type"), given.get("learning_rate")
    if not isinstance(name, str) or not name or not isinstance(lr, int | float) or not 0 < lr < 1e9:
        return []
    options, wrong = literals(given, "optimizer_args")
    of_schedule, unreadable = literals(given, "lr_scheduler_args")
    if wrong or unreadable:
        return wrong + unreadable
    return _optimizer(name, float(lr), options) or _schedule(given, name, float(lr), options, of_schedule)


# --- optimizers ---


def _optimizer(name: str, lr: float, options: Mapping[str, Any]) -> list[str]:
    said, kind = f"musubi.optimizer_type = {name!r}", name.lower()
    if kind == "adamw8bit":
        if find_spec("bitsandbytes") is None:
            return [f"{said} needs bitsandbytes: pip install bitsandbytes, or set 'AdamW'"]
        return _unless_known("optimizer_args", options, _OF_8_BIT)
    if kind == "adafactor":
        from transformers.optimization import Adafactor

        relative = _relative(options)
        return _made(lambda: Adafactor(_groups(lr), lr=None if relative else lr, **{**options, "relative_step": relative}))
    module, _, last = name.rpartition(".")
    if module in ("", "torch.optim"):
        last = "AdamW" if kind == "adamw" else last
        known = [one for one, value in vars(torch.optim).items() if isinstance(value, type)]
        if last not in known:
            return _unknown(said, last, ["AdamW8bit", "Adafactor", *known])
        if last in _UNFIT:
            return [f"{said}: {_UNFIT[last]}: set another, e.g. 'AdamW'"]
        return _made(lambda: getattr(torch.optim, last)(_groups(lr), lr=lr, **options))
    return _elsewhere("optimizer_type", name, "optimizer_args", {"params": [], "lr": lr, **options})


_OF_8_BIT = (
    "betas",
    "eps",
    "weight_decay",
    "amsgrad",
    "optim_bits",
    "args",
    "min_8bit_size",
    "percentile_clipping",
    "block_wise",
    "is_paged",
)
_UNFIT = {
    "Optimizer": "it is what the others are made of",
    "LBFGS": "it evaluates the loss several times a step, and here each step has one",
    "SparseAdam": "it is for sparse gradients, which a LoRA has not",
}


def _groups(lr: float) -> list[dict[str, Any]]:
    return [{"params": [torch.nn.Parameter(torch.zeros(4, 4))], "lr": lr}]


def _relative(options: Mapping[str, Any]) -> bool:
    """Whether Adafactor finds its own rate, as the host decides it."""
    return bool(options.get("relative_step", True) or options.get("warmup_init", False))


def _made(make: Callable[[], Any]) -> list[str]:
    try:
        make()
    except _REFUSALS as error:
        return [f"musubi.optimizer_args: {_reason(error)}"]
    return []


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{text or type(error).__name__}: change it or leave it out"


def _unless_known(option: str, options: Mapping[str, Any], known: tuple[str, ...]) -> list[str]:
    return [f"musubi.{option}: {key}: no such argument; known: {', '.join(known)}" for key in options if key not in known]


def _elsewhere(option: str, name: str, arguments: str, given: Mapping[str, Any]) -> list[str]:
    """A class of another library: that it is there and has these arguments. It is not made: it may want a GPU for that."""
    module, _, last = name.rpartition(".")
    if not importable(module):
        return [f"musubi.{option} = {name!r}: no module {module} here: install it, or set another"]
    try:
        kind = getattr(import_module(module), last, None)
    except ImportError as error:
        return [f"musubi.{option} = {name!r}: {module} cannot be imported ({error}): install what it needs, or set another"]
    if not callable(kind):
        return [f"musubi.{option} = {name!r}: {module} has no {last}"]
    try:
        inspect.signature(kind).bind(**_named(kind, given))
    except TypeError as error:
        return [f"musubi.{arguments}: {_reason(error)}"]
    except ValueError:  # of a class in C: it has no signature to ask
        return []
    return []


def _named(kind: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """The first argument is given by its place, whatever its name."""
    first = next(iter(inspect.signature(kind).parameters), "params")
    placed, *_ = given
    return {first if key == placed else key: value for key, value in given.items()}


# --- schedules ---


def _schedule(given: Mapping[str, Any], optimizer: str, lr: float, of_optimizer: Mapping[str, Any], options: dict[str, Any]) -> list[str]:
    if optimizer.lower().endswith("schedulefree"):
        return []  # the host makes none
    if kind := given.get("lr_scheduler_type"):
        return _of_type(str(kind), lr, options) if isinstance(kind, str) else []
    name = given.get("lr_scheduler", "constant")
    if not isinstance(name, str):
        return []
    said = f"musubi.lr_scheduler = {name!r}"
    is_adafactor = optimizer.lower() == "adafactor"
    if is_adafactor and _relative(of_optimizer):
        name = f"adafactor:{lr}"  # the host's own choice then
    if name.startswith("adafactor"):
        if not is_adafactor:
            return [f"{said}: is for musubi.optimizer_type = 'Adafactor': set another"]
        if not _is_number(name.partition(":")[2]):
            return [f"{said}: needs a first rate after a colon, 'adafactor:1e-3'"]
        if given.get("lr_warmup_steps"):
            return [f"musubi.lr_warmup_steps = {shown(given['lr_warmup_steps'])}: Adafactor's own schedule has none: leave it out"]
        return []
    if wrong := _unknown_schedule(name):
        return wrong
    steps = given.get("max_train_steps")
    total = steps if isinstance(steps, int) and not given.get("max_train_epochs") else _STEPS
    numbers = {key: _count(given.get(key, 0), total) for key in ("lr_warmup_steps", "lr_decay_steps")}
    if None in numbers.values():
        return []  # told by the host's own converter
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _make(name, given, lr, total, numbers, options)
    except _REFUSALS as error:
        return [f"{said}: {_reason(error)}{_hint(name)}"]
    return []


def _unknown_schedule(name: str) -> list[str]:
    from transformers.trainer_utils import SchedulerType

    known = [*(kind.value for kind in SchedulerType), "rex", "piecewise_constant"]
    if name in known or name.lower() == "rex":
        return []
    return _unknown(f"musubi.lr_scheduler = {name!r}", name, known)


def _unknown(said: str, name: str, known: Sequence[str]) -> list[str]:
    """What begins with `said`, of a name that is none of the known ones."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return [f"{said}: unknown; {f'did you mean {close[0]!r}?' if close else 'known: ' + ', '.join(known)}"]


def _hint(name: str) -> str:
    return {
        "piecewise_constant": "; musubi.lr_scheduler_args = [\"step_rules='1:100,0.1'\"]",
        "cosine_with_min_lr": "; set musubi.lr_scheduler_min_lr_ratio",
    }.get(name, "")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _count(value: Any, total: int) -> int | None:
    """Steps, or a share of all, as the host's converter reads them; None: it would not."""
    text = str(value)
    try:
        number = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
    return int(number) if number >= 1 and number.is_integer() else int(number * total)


def _make(name: str, given: Mapping[str, Any], lr: float, total: int, numbers: Mapping[str, Any], options: dict[str, Any]) -> None:
    """A schedule of one of the names that the host knows, by the arguments that it gives each."""
    optimizer = torch.optim.SGD(_groups(lr), lr=lr)
    if name.lower() == "rex":
        if unknown := options.keys() - {"rex_alpha", "rex_beta", "last_epoch"}:
            raise ValueError(f"no such argument: {', '.join(sorted(unknown))}")
        ratio = given.get("lr_scheduler_min_lr_ratio")
        if isinstance(ratio, int | float) and ratio > 1:
            raise ValueError(f"musubi.lr_scheduler_min_lr_ratio = {ratio} is above 1")
        return  # whether the warm-up is longer than the run: the host knows, by epochs and processes
    if name == "piecewise_constant":
        from diffusers.optimization import get_piecewise_constant_schedule

        get_piecewise_constant_schedule(optimizer, **options).step()
        return
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
    from transformers.trainer_utils import SchedulerType

    TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(name)](optimizer, **_given_by_host(name, given, total, numbers), **options).step()


def _given_by_host(name: str, given: Mapping[str, Any], total: int, numbers: Mapping[str, Any]) -> dict[str, Any]:
    warmup, decay = numbers["lr_warmup_steps"], numbers["lr_decay_steps"]
    cycles, ratio = given.get("lr_scheduler_num_cycles", 1), given.get("lr_scheduler_min_lr_ratio")
    both = {"num_warmup_steps": warmup, "num_training_steps": total}
    own: dict[str, dict[str, Any]] = {
        "constant": {},
        "constant_with_warmup": {"num_warmup_steps": warmup},
        "inverse_sqrt": {"num_warmup_steps": warmup, "timescale": given.get("lr_scheduler_timescale")},
        "cosine_with_restarts": both | {"num_cycles": cycles},
        "polynomial": both | {"power": given.get("lr_scheduler_power", 1)},
        "cosine_with_min_lr": both | {"num_cycles": cycles / 2, "min_lr_rate": ratio},
        "linear": both,
        "cosine": both,
        "warmup_stable_decay": {
            "num_warmup_steps": warmup,
            "num_stable_steps": total - warmup - decay,
            "num_decay_steps": decay,
            "num_cycles": cycles / 2,
            "min_lr_ratio": ratio or 0.0,
        },
    }
    return own.get(name, both | {"num_decay_steps": decay})


_BASES = ("LRScheduler", "_LRScheduler")


def _of_type(name: str, lr: float, options: Mapping[str, Any]) -> list[str]:
    """`lr_scheduler_type`: a class of torch's, or of another library."""
    module, _, last = name.rpartition(".")
    if module not in ("", "torch.optim.lr_scheduler"):
        return _elsewhere("lr_scheduler_type", name, "lr_scheduler_args", {"optimizer": None, **options})
    kinds = torch.optim.lr_scheduler
    known = [
        one for one, value in vars(kinds).items() if isinstance(value, type) and issubclass(value, kinds.LRScheduler) and one not in _BASES
    ]
    if last not in known:
        return _unknown(f"musubi.lr_scheduler_type = {name!r}", last, known)
    optimizer = torch.optim.SGD(_groups(lr), lr=lr, momentum=0.9)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            getattr(kinds, last)(optimizer, **options).step()
    except _REFUSALS as error:
        return [f"musubi.lr_scheduler_type = {name!r} with musubi.lr_scheduler_args: {_reason(error)}"]
    return []


# --- what follows a run ---


def problems_of_logs(given: Mapping[str, Any]) -> list[str]:
    """What the host would stop at when it starts its trackers, a sentence each."""
    wrong = []
    log_with, config = given.get("log_with"), given.get("log_tracker_config")
    if log_with in ("tensorboard", "all") and not given.get("logging_dir"):
        wrong.append(f"musubi.log_with = {log_with!r} needs musubi.logging_dir, the folder of its curves")
    if log_with in ("wandb", "all") and find_spec("wandb") is None:
        wrong.append(f"musubi.log_with = {log_with!r} needs wandb: pip install wandb, or set 'tensorboard'")
    if isinstance(config, str) and config and not why_no_path(config) and not pathlib.Path(config).is_file():
        wrong.append(f"musubi.log_tracker_config = {config!r}: no such file")
    return wrong
