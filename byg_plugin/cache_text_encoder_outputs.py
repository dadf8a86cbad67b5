"""Cache the encodings of the four texts of all tuples.

    python byg_plugin/cache_text_encoder_outputs.py --config configs/flux_image.toml
    accelerate launch --num_processes 4 byg_plugin/cache_text_encoder_outputs.py --config ...    several GPUs

What is cached already is kept; an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from byg_plugin import _cli


def main() -> None:
    """The command; see the module."""
    parser = _cli.common_parser(__doc__ or "")
    parser.add_argument("--prune", action="store_true", help="then remove entries that this configuration does not use")
    args = parser.parse_args()
    from byg_plugin.caching import run

    run("texts", args.config, args.set, prune=args.prune)


if __name__ == "__main__":
    _cli.run(main)
