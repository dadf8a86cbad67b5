"""Means, standard errors and intervals beside small cases by hand and scipy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from byg_plugin.evaluation.scores import Row
from byg_plugin.evaluation.statistics import by_run, by_type, differences, interval, markdown, markdown_runs, mean_of


def rows(*values: float | None, kinds: tuple[str | None, ...] = ("a",)) -> list[Row]:
    return [Row(id=str(number), edit_type=kinds[number % len(kinds)], scores={"x": value}) for number, value in enumerate(values)]


def test_the_standard_error_by_hand_and_by_scipy():
    found = mean_of([1.0, 2.0, 6.0])
    assert (found.n, found.mean) == (3, 3) and found.sem == pytest.approx((7 / 3) ** 0.5) == pytest.approx(stats.sem([1, 2, 6]))
    assert mean_of([5.0]).sem is None


def test_types_in_order_all_last_and_what_has_no_value_is_left_out():
    table = by_type(rows(1, None, 3, 5, kinds=("b", "a")))
    assert list(table) == ["a", "b", "all"]
    assert (table["a"]["x"].n, table["a"]["x"].mean, table["all"]["x"].n) == (1, 5, 3)
    assert list(by_type(rows(1, 2, kinds=(None,)))) == ["all"]
    assert by_type(rows(None)) == {"a": {}, "all": {}}
    named = by_type(rows(1, 5, kinds=("add", "all")))
    assert {name: means["x"].mean for name, means in named.items()} == {"add": 1, "all (type)": 5, "all": 3}
    assert "| a | 1 | 5 |\n| b | 2 | 2 +- 1 |" in markdown(table)


def test_a_cell_of_fewer_values_than_its_row_says_how_many():
    some = [Row(id=str(number), scores={"x": float(number), "y": 1.0 if number else None, "z": None}) for number in range(3)]
    assert "| all | 3 | 1 +- 0.58 | 1 +- 0 (n=2) |\n" in markdown(by_type(some))
    runs = markdown_runs(by_run({"a": some, "b": some}))
    assert "| b | 3 | 1 +- 0.58 | 1 +- 0 (n=2) |\n" in runs


def test_a_difference_takes_the_items_that_both_have():
    one = rows(1, 2, 3, None)
    other = [Row(id="1", scores={"x": 1.0}), Row(id="2", scores={"x": 0.0}), Row(id="9", scores={"x": 100.0})]
    found = differences(one, other)["x"]
    assert (found.n, found.mean) == (2, 2) and (found.low, found.high) == (1, 3)
    with pytest.raises(ValueError, match="in common: score both on the same tuples"):
        differences(one, [Row(id="0", scores={"y": 1.0})])


def test_pairs_are_kept_where_items_differ_more_than_the_runs():
    draw = np.random.default_rng(0)
    level = 100 * draw.normal(size=50)
    one, other = rows(*(level + 1 + 0.1 * draw.normal(size=50))), rows(*level)
    found = differences(one, other)["x"]
    assert 0.9 < found.low < found.mean < found.high < 1.1
    assert differences(one, other) == differences(one, other), "the same seed"


def test_the_interval_is_near_that_of_the_normal_law_and_covers():
    values = np.random.default_rng(1).normal(size=400)
    low, high = interval(values)
    assert (high - low) / 2 == pytest.approx(1.96 * stats.sem(values), rel=0.05)
    draw = np.random.default_rng(2)
    covered = [low <= 0 <= high for low, high in (interval(draw.normal(size=40), seed) for seed in range(60))]
    assert np.mean(covered) > 0.85
    assert interval(np.array([2.0, 2.0])) == (2, 2)
