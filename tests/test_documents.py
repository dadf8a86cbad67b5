"""JSON and TOML of others: a value or a ValueError, whatever they hold."""

from __future__ import annotations

import json

import pytest

from byg_plugin.documents import json_value, toml_table

DEEP = 100_000


def test_what_is_whole_is_read():
    assert json_value('{"a": [1, 2.5, null], "b": "ü"}') == {"a": [1, 2.5, None], "b": "ü"}
    assert json_value(b'{"a": 1, "a": 2}') == {"a": 2}
    assert toml_table('a = 1\n[b]\nc = "x"') == {"a": 1, "b": {"c": "x"}}


@pytest.mark.parametrize("text", ["[" * DEEP, '{"a":' * DEEP, "[" * DEEP + "]" * DEEP])
def test_json_without_an_end_to_its_nesting_is_one_error(text: str):
    with pytest.raises(ValueError, match="nested too deeply"):
        json_value(text)


@pytest.mark.parametrize("text", ["a = " + "[" * DEEP, "a = " + "{b = " * DEEP])
def test_toml_without_an_end_to_its_nesting_is_one_error(text: str):
    with pytest.raises(ValueError, match="nested too deeply"):
        toml_table(text)


@pytest.mark.parametrize("read, text", [(json_value, "9" * 5000), (toml_table, "a = " + "9" * 5000)])
def test_an_integer_of_thousands_of_digits_is_an_error(read, text: str):
    with pytest.raises(ValueError, match="^it holds an integer of more digits than are read$"):
        read(text)


def test_a_key_twice_is_an_error_where_it_is_asked_for():
    with pytest.raises(ValueError, match="a appears twice in one object"):
        json_value('{"a": 1, "b": 2, "a": 3}', unique_keys=True)


def test_control_characters_inside_strings():
    with pytest.raises(json.JSONDecodeError):
        json_value('"a\nb"')
    assert json_value('"a\nb"', strict=False) == "a\nb"
