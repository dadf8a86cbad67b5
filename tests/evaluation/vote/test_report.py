"""The statistics of a vote beside the paper's own counts, published cases, cases by hand and scipy."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.stats import binom

from byg_plugin.evaluation.vote import report
from byg_plugin.evaluation.vote.__main__ import _report, main
from byg_plugin.evaluation.vote.ballots import Pair, Vote, order, read_pairs
from byg_plugin.evaluation.vote.report import fleiss_kappa, kappa_interval, p_value, plot, rate_of, summarise, text
from tests.support.evaluation import write_edits


def votes(**raters: str) -> list[Vote]:
    """A rater's choices on pairs 0, 1, ...; a dot is none."""
    return [
        Vote(key=str(number), rater=rater, choice=choice)
        for rater, choices in raters.items()
        for number, choice in enumerate(choices)
        if choice != "."
    ]


def pairs(*kinds: str | None) -> list[Pair]:
    from byg_plugin.evaluation.items import Item

    items = [Item(id=str(number), source=Path("s"), edit=Path("e"), edit_type=kind) for number, kind in enumerate(kinds)]
    return [Pair(key=item.id, a=item, b=item) for item in items]


def test_the_papers_tests_from_its_counts():
    """75.3 % of 238 votes are 179; the paper says p < 3e-15 and, of 77 of 94 items, p < 3e-10."""
    assert p_value(77, 94) == pytest.approx(2 * binom.sf(76, 94, 0.5)) and p_value(77, 94) < 3e-10
    assert p_value(179, 238) == pytest.approx(2 * binom.sf(178, 238, 0.5), rel=1e-6) and binom.sf(178, 238, 0.5) < 3e-15
    assert p_value(1, 2) == 1 and p_value(0, 0) is None


def test_rates_and_both_errors_by_hand():
    found = rate_of(votes(ada="aab", bob="aaaaab"))
    assert (found.votes, found.wins, found.rate) == (9, 7, 7 / 9)
    assert found.sem == pytest.approx((7 / 9 * 2 / 9 / 9) ** 0.5)
    assert found.sem_of_raters == pytest.approx((5 / 6 - 2 / 3) / 2)
    assert rate_of(votes(ada="ab")).sem_of_raters is None


def test_kappa_is_fleiss_own_example_and_its_ends():
    # Fleiss 1971, as on many pages: 10 items, 14 raters, 5 categories, kappa 0.210.
    counts = "0 0 0 0 14|0 2 6 4 2|0 0 3 5 6|0 3 9 2 0|2 2 8 1 1|7 7 0 0 0|3 2 6 3 0|2 5 3 2 2|6 5 2 1 0|0 2 2 3 7"
    assert fleiss_kappa(np.array([row.split() for row in counts.split("|")], dtype=int)) == pytest.approx(0.210, abs=5e-4)
    assert fleiss_kappa(np.array([[3, 0], [0, 3]])) == 1
    assert fleiss_kappa(np.array([[1, 1], [1, 1]])) == -1
    assert fleiss_kappa(np.array([[3, 0], [2, 0]])) is None and fleiss_kappa(np.array([[1, 0]])) is None
    assert fleiss_kappa(np.array([[3, 0], [0, 3], [1, 0]])) == 1, "an item with one vote says nothing of agreement"


def test_kappa_by_hand_where_items_have_different_numbers_of_raters():
    agreement, chance = (1 + 1 / 3) / 2, (4 / 5) ** 2 + (1 / 5) ** 2
    assert fleiss_kappa(np.array([[2, 0], [2, 1]])) == pytest.approx((agreement - chance) / (1 - chance))


def test_the_interval_of_kappa_covers_and_narrows():
    draw = np.random.default_rng(0)
    agreed = np.array([[3, 0], [0, 3], [2, 1], [1, 2]])
    few, many = agreed[draw.integers(0, 4, 20)], agreed[draw.integers(0, 4, 200)]
    for counts in (few, many):
        low, high = kappa_interval(counts)
        assert low < fleiss_kappa(counts) < high
    assert np.ptp(kappa_interval(many)) < np.ptp(kappa_interval(few)) / 2
    assert kappa_interval(np.array([[3, 0]])) is None


def test_ties_unanswered_and_changed_votes_are_counted():
    cast = [*votes(ada="aaab", bob="ab.."), Vote(key="3", rater="ada", choice="a"), Vote(key="gone", rater="ada", choice="b")]
    found = summarise(cast, pairs("x", "y", "x", None))
    assert found["all"]["votes"] == 6 and found["all"]["wins"] == 5
    assert found["items"] == {"won": 3, "lost": 0, "tied": 1}
    assert (found["unanswered"], found["changed"], found["votes_on_other_edits"]) == (2, 1, 1)
    assert {kind: one["rate"] for kind, one in found["by_type"].items()} == {"(no type)": 1, "x": 1, "y": 0.5}
    assert found["by_rater"]["bob"]["rate"] == 0.5
    said = text(found)
    assert "all: 83.3 % +- 15.2 (SEM over votes" in said and "3 won, 0 lost, 1 tied" in said and "unanswered: 2" in said
    with pytest.raises(ValueError, match="no vote on these edits yet"):
        summarise([Vote(key="gone", rater="ada", choice="b")], pairs("x"))


def test_sides_are_balanced_random_and_a_raters_own(tmp_path: Path):
    both = pairs(*["x"] * 40)
    seen = order(both, "ada")
    assert sorted(index for index, _ in seen) == list(range(40)) and seen == order(both, "ada") != order(both, "bob")
    lefts = [sum(left == "a" for _, left in order(both[:size], name)) for size in (40, 39) for name in "abcdefgh"]
    assert lefts[:8] == [20] * 8 and set(lefts[8:]) == {19, 20}
    assert len({tuple(left for _, left in order(both, str(number))) for number in range(20)}) == 20
    first = [order(both, str(number))[0][1] for number in range(100)]
    assert 30 < first.count("a") < 70


def test_the_report_is_text_json_and_a_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    a, b = write_edits(tmp_path, 3, level=10), write_edits(tmp_path, 3, level=90)
    lines = [{"key": pair.key, "rater": "ada", "choice": "a"} for pair in read_pairs(a, b)]
    path = tmp_path / "v.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    words = ["--a", str(a / "edits.jsonl"), "--b", str(b), "--votes", str(path), "--report"]
    with pytest.raises(ValueError, match="--report has no use for --host, --port: leave it out"):
        main([*words, "--host", "0.0.0.0", "--port", "1"])
    main(words)
    assert "all: 100.0 % +- 0.0" in capsys.readouterr().out
    assert json.loads((tmp_path / "v.report.json").read_text(encoding="utf-8"))["items"]["won"] == 3
    assert Image.open(tmp_path / "v.report.png").size[0] > 500
    path.write_text('{"key": "x"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match="line 1 is no vote"):
        main(words)


def test_names_with_dollars_are_plotted_as_they_are_and_the_figures_come_before_the_plot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    cast, both = votes(**{r"$\frac{$": "ab", "$a_b$": "b"}), pairs(r"$\x$", "y")
    plot(summarise(cast, both), tmp_path / "plot.png")
    assert Image.open(tmp_path / "plot.png").size[0] > 500
    monkeypatch.setattr(report, "plot", lambda found, path: print("plotted"))
    _report(tmp_path / "v.jsonl", cast, both)
    assert capsys.readouterr().out.splitlines()[-1] == "plotted"
    assert (tmp_path / "v.report.json").is_file()


def test_runs_that_do_not_go_together_are_refused(tmp_path: Path):
    a, b = write_edits(tmp_path, 2, level=10), write_edits(tmp_path, 2, level=90)
    manifest = b / "edits.jsonl"
    written = manifest.read_text(encoding="utf-8")
    manifest.write_text(written.replace("instruction 1", "another"), encoding="utf-8")
    with pytest.raises(ValueError, match="t1: the runs have different sources or instructions"):
        read_pairs(a, b)
    manifest.write_text(written.replace('"id": "t', '"id": "u'), encoding="utf-8")
    with pytest.raises(ValueError, match="have no edit of the same tuple"):
        read_pairs(a, b)
    manifest.write_text(written, encoding="utf-8")
    with pytest.raises(ValueError, match="--a and --b are the same run"):
        read_pairs(a, a.parent / "x" / ".." / a.name / "edits.jsonl")
    (b / "00000_s0.png").unlink()
    with pytest.raises(ValueError, match="t0: edit: no such file"):
        read_pairs(a, b)
