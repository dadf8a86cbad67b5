"""What a command asks of the processes that it is run by."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

import pytest


class _Joining(Exception):
    pass


def patience_of(command: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> timedelta:
    """How long a command lets processes wait for each other; it ends where it joins them."""

    def join(*, timeout: timedelta, cpu: bool) -> None:
        raise _Joining(timeout)

    monkeypatch.setattr("accelerate.PartialState", join)
    with pytest.raises(_Joining) as caught:
        command()
    (patience,) = caught.value.args
    assert isinstance(patience, timedelta)
    return patience
