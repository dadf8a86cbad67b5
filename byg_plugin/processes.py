"""The processes of an `accelerate launch`."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from accelerate import PartialState

# That a process waits for the others. Torch's own ten minutes end a run whose shares of clips or images differ in time.
PATIENCE = timedelta(hours=3)


def joined(*, cpu: bool) -> PartialState:
    """This process among the others, which wait for each other as long as `PATIENCE`."""
    from accelerate import PartialState

    return PartialState(cpu=cpu, timeout=PATIENCE)
