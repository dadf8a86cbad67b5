"""`best.json`: the checkpoint that scored best so far, which is kept whatever `train.keep_last` says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from accelerate.logging import get_logger

from byg_plugin.documents import json_value
from byg_plugin.folders import write_text

logger = get_logger(__name__)
NAME = "best.json"


def write(output: Path, values: Mapping[str, Any] | None) -> None:
    """`values` with `checkpoint`, a path from `output`; None: there is none, and no file.

    Raises:
        OSError: it cannot be written.
    """
    if values is None:
        (output / NAME).unlink(missing_ok=True)
    else:
        write_text(output / NAME, json.dumps(values, indent=1, allow_nan=False) + "\n")


def checkpoint_in(output: Path) -> str | None:
    """Name of the folder of the best checkpoint; None where no file says one."""
    path = output / NAME
    if not path.is_file():
        return None
    try:
        record = json_value(path.read_text(encoding="utf-8"))
        return PurePosixPath(record["checkpoint"]).name
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s names no checkpoint (%s): none is kept for it", path, error)
        return None
