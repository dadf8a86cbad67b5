"""Convert a LoRA between the community's key formats, or say what each tool would load of it.

    python byg_plugin/convert_lora.py lora.safetensors --check
    python byg_plugin/convert_lora.py lora.safetensors --to musubi --out lora_musubi.safetensors

Exit status: 0; 1 when `--check` finds that a tool would lose something; 2 for wrong input or a refused conversion.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if __package__ in (None, ""):  # run as a file: Python put this folder on the path, not the one that holds the package
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from byg_plugin import families

if TYPE_CHECKING:
    from byg_plugin.lora_formats import Lost


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    args = _parser().parse_args(argv)
    try:
        if not args.lora.expanduser().is_file():
            raise ValueError(f"{args.lora}: no such file; give a LoRA as .safetensors")
        return _check(args) if args.check else _convert(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="convert_lora.py", description=__doc__.splitlines()[0])
    parser.add_argument("lora", type=Path, help="LoRA file (.safetensors)")
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--to", choices=families.LORA_FORMATS, help="format to convert to")
    action.add_argument("--check", action="store_true", help="report what each tool would load of the file as it is")
    parser.add_argument("--out", type=Path, help="file to write (with --to)")
    parser.add_argument("--overwrite", action="store_true", help="replace --out if it exists")
    parser.add_argument("--allow-loss", action="store_true", help="leave out what the target tool would not load")
    parser.add_argument(
        "--tools",
        nargs="+",
        choices=families.LORA_FORMATS,
        default=families.LORA_FORMATS,
        help="tools that --check asks about (default: all)",
    )
    parser.add_argument("--modules", action="store_true", help="with --check: list every layer, also those that load")
    return parser


def _convert(args: argparse.Namespace) -> int:
    if args.out is None:
        raise ValueError("--to needs --out: the file to write")
    if args.out.exists() and not args.overwrite:
        raise ValueError(f"{args.out} exists; give another --out, or --overwrite")
    from byg_plugin import lora_formats  # torch: seconds

    tensors, metadata = lora_formats.read_lora(args.lora)
    family = lora_formats.guess_family(tensors, metadata)
    converted = lora_formats.convert(tensors, args.to, family=family, allow_loss=args.allow_loss)
    lora_formats.write_lora(args.out, converted, metadata)
    layers = sum(key.endswith((".lora_A.weight", ".lora_down.weight")) for key in converted)
    print(f"{args.out}: {layers} layers in {args.to} format")
    for item in lora_formats.losses(tensors, args.to, family=family) if args.allow_loss else ():
        print(f"left out: {item.name}: {item.why}", file=sys.stderr)
    return 0


def _check(args: argparse.Namespace) -> int:
    from byg_plugin import lora_formats  # torch: seconds

    report = lora_formats.check(*lora_formats.read_lora(args.lora, as_stored=True), tools=args.tools)
    print(f"{args.lora}: {report.modules} layers, format {report.format}")
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
    return 1 if report.loses else 0


def _by_reason(lost: Sequence[Lost]) -> dict[str, list[str]]:
    reasons: dict[str, list[str]] = {}
    for item in lost:
        reasons.setdefault(item.why, []).append(item.name)
    return reasons


if __name__ == "__main__":
    sys.exit(main())
