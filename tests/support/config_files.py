"""What tests of the configuration share: the least that a file must say, and what an error says."""

from __future__ import annotations

from typing import Any

import pydantic
import pytest

from byg_plugin.config.loading import parse_config
from tests.support import ROOT

CONFIGS = ROOT / "configs"


def raw(**sections: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The minimal configuration as a dictionary, with sections merged in."""
    whole: dict[str, dict[str, Any]] = {
        "model": {"path": "models/flux"},
        "dataset": {"tuples": "tuples.jsonl", "cache_dir": "cache"},
        "train": {"steps": 10},
        "output": {"dir": "out"},
    }
    for name, values in sections.items():
        whole[name] = whole.get(name, {}) | values
    return whole


def message_of(whole: Any) -> str:
    with pytest.raises(ValueError) as caught:
        parse_config(whole)
    assert not isinstance(caught.value, pydantic.ValidationError), "a user is not to read pydantic's own text"
    return str(caught.value)
