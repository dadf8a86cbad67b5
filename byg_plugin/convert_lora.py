"""Convert a LoRA between the community's key formats, or say what each tool would load of it.

    python byg_plugin/convert_lora.py lora.safetensors --check
    python byg_plugin/convert_lora.py lora.safetensors --to musubi --out lora_musubi.safetensors

Exit status: 0; 1 when `--check` finds that a tool would lose something; 2 for wrong input or a refused conversion. What
diffusers would load is asked of diffusers' own loader.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if __package__ in (None, ""):  # run as a file: Python put this folder on the path, not the one that holds the package
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from byg_plugin import _cli, families

if TYPE_CHECKING:
    from byg_plugin.lora.formats import Lost

_OF_TO, _OF_CHECK = ("out", "overwrite", "allow_loss"), ("tools", "modules")  # options that one of the two honours


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command.

    Raises:
        ValueError: wrong input or a refused conversion.
        SystemExit: with 1 when a tool would lose something.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    mode, others = ("--check", _OF_TO) if args.check else ("--to", _OF_CHECK)
    _cli.refuse_unused(parser, args, mode, *others)
    if not args.lora.is_file():
        raise ValueError(f"{args.lora}: no such file; give a LoRA as .safetensors")
    if not args.check:
        _convert(args)
    elif _check(args):
        raise SystemExit(1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="convert_lora.py", description=__doc__.splitlines()[0])
    parser.add_argument("lora", type=_cli.given_path, help="LoRA file (.safetensors)")
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--to", choices=families.LORA_FORMATS, help="format to convert to")
    action.add_argument("--check", action="store_true", help="report what each tool would load of the file as it is")
    parser.add_argument("--out", type=_cli.given_path, help="file to write (with --to)")
    parser.add_argument("--overwrite", action="store_true", help="replace --out if it exists")
    parser.add_argument("--allow-loss", action="store_true", help="leave out what the target tool would not load")
    parser.add_argument(
        "--tools",
        nargs="+",
        choices=families.LORA_FORMATS,
        help="tools that --check asks about (default: all; diffusers where it is installed)",
    )
    parser.add_argument("--modules", action="store_true", help="with --check: list every layer, also those that load")
    return parser


def _convert(args: argparse.Namespace) -> None:
    if args.out is None:
        raise ValueError("--to needs --out: the file to write")
    if args.out.suffix.lower() != ".safetensors":
        raise ValueError(f"--out {args.out}: a LoRA is a .safetensors file, and tools go by that ending; give it to this one")
    if args.out.exists() and not args.overwrite:
        raise ValueError(f"{args.out} exists; give another --out, or --overwrite")
    from byg_plugin.lora import files as lora_files
    from byg_plugin.lora import formats as lora_formats  # torch: seconds

    tensors, metadata = lora_files.read_lora(args.lora)
    with lora_files.naming(args.lora):
        family = lora_formats.guess_family(tensors, metadata)
        converted = lora_formats.convert(tensors, args.to, family=family, allow_loss=args.allow_loss)
    lora_files.write_lora(args.out, converted, metadata)
    layers = sum(key.endswith((".lora_A.weight", ".lora_down.weight")) for key in converted)
    print(f"{args.out}: {layers} layers in {args.to} format")
    for item in lora_formats.losses(tensors, args.to, family=family) if args.allow_loss else ():
        print(f"left out: {item.name}: {item.why}", file=sys.stderr)


def _check(args: argparse.Namespace) -> bool:
    """Print the report; returns whether a tool would lose something."""
    from byg_plugin.lora import diffusers as lora_diffusers
    from byg_plugin.lora import files as lora_files  # torch: seconds
    from byg_plugin.lora.check import check

    stored = lora_files.read_stored(args.lora)
    lacking = None if args.tools else lora_diffusers.missing()
    tools = args.tools or [tool for tool in families.LORA_FORMATS if tool != "diffusers" or lacking is None]
    with lora_files.naming(args.lora):
        report = check(stored.tensors, stored.metadata, tools, outside=stored.outside)
    print(f"{args.lora}: {report.modules} layers, format {report.format}")
    for where, scale, layers in report.strengths:
        print(f"alpha / rank = {scale:.6g} in {layers} layers, from {where}")
    if lacking:
        print(f"\ndiffusers: not asked, because {lacking}")
    for tool in report.tools:
        print(f"\n{tool.tool}: loads {len(tool.loaded)}, loses {len(tool.lost)}; {tool.runtime}")
        if args.modules:
            for name in tool.loaded:
                print(f"  loaded  {name}")
        for why, names in _by_reason(tool.lost).items():
            print(f"  lost {len(names)}: {why}")
            for name in names if args.modules else names[:3]:
                print(f"  lost    {name}")
            if not args.modules and len(names) > 3:
                print(f"  …       and {len(names) - 3} more (--modules lists them)")
    return report.loses


def _by_reason(lost: Sequence[Lost]) -> dict[str, list[str]]:
    reasons: dict[str, list[str]] = {}
    for item in lost:
        reasons.setdefault(item.why, []).append(item.name)
    return reasons


if __name__ == "__main__":
    _cli.run(main)
