"""VIEScore and ImgEdit's score of a judge's answers: formulas, unread answers, judges that differ or say one thing alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from byg_plugin import evaluate
from byg_plugin.evaluation import scores
from byg_plugin.evaluation.judged import rejects_of, sameness
from byg_plugin.evaluation.metrics.viescore import overall
from byg_plugin.evaluation.scores import Row
from byg_plugin.evaluation.statistics import by_type
from tests.support.evaluation import noise, save, write_edits
from tests.support.judged import BY, Numbers, write_answers


def score(edits: Path, judged: Path, *words: Any, metric: str = "viescore") -> list[dict[str, float | None]]:
    out = judged.with_suffix("")
    evaluate.main([str(word) for word in ("--edits", edits, "--metrics", metric, "--judged", judged, "--out", out, *words)])
    return [dict(row.scores) for row in scores.read(out)]


NUMBERS: Numbers = [([8, 2], [9, 4]), ([5, 10], [0, 7]), ([3, 3], None)]


def test_official_is_the_lesser_number_and_overall_a_geometric_mean_an_item(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    edits = write_edits(tmp_path, 3)
    judged = write_answers(tmp_path / "judged.jsonl", edits, NUMBERS)
    rows = score(edits, judged)
    assert [row["vie_semantic"] for row in rows] == [2, 5, 3] and [row["vie_quality"] for row in rows] == [4, 0, None]
    assert [row["vie_overall"] for row in rows] == [pytest.approx(8**0.5), 0, None]
    assert [row["vie_unread"] for row in rows] == [0, 0, 1] and rows[1]["vie_success"] == 5 and rows[1]["vie_artifacts"] == 7
    summary = json.loads((tmp_path / "judged" / "summary.json").read_text(encoding="utf-8"))["all"]
    assert summary["vie_unread"]["mean"] == pytest.approx(1 / 3), "counted"
    assert summary["vie_root_of_means"] == {"n": 2, "mean": pytest.approx((10 / 3 * 2) ** 0.5), "sem": None}
    assert summary["vie_overall"]["mean"] == pytest.approx(2**0.5), "the mean of the roots, beside it"
    assert "vie_root_of_means" in capsys.readouterr().out
    assert ">t1</td>" in (tmp_path / "judged" / "report.html").read_text(encoding="utf-8")


def test_the_papers_reading_is_success_and_freedom_from_artifacts(tmp_path: Path):
    edits = write_edits(tmp_path, 3)
    rows = score(edits, write_answers(tmp_path / "judged.jsonl", edits, NUMBERS), "--vie-reading", "paper")
    assert [row["vie_semantic"] for row in rows] == [8, 5, 3] and [row["vie_quality"] for row in rows] == [4, 7, None]


def test_an_item_that_was_judged_anew_is_scored_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    edits, judged = write_edits(tmp_path, 3), tmp_path / "judged.jsonl"
    assert score(edits, write_answers(judged, edits, NUMBERS))[2]["vie_overall"] is None
    judged.unlink()
    rejects_of(judged).unlink()
    rows = score(edits, write_answers(judged, edits, [([0, 0], [0, 0]), NUMBERS[1], ([9, 9], [4, 4])]))
    assert [row["vie_overall"] for row in rows] == [0, 0, 6] and rows[2]["vie_unread"] == 0
    assert "3 edits, 2 of them scored now" in capsys.readouterr().out


def test_runs_of_other_judges_or_readings_are_not_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    edits, other = write_edits(tmp_path, 3), write_edits(tmp_path, 3, level=9)
    judged = write_answers(tmp_path / "judged.jsonl", edits, NUMBERS)
    score(edits, judged)
    theirs = tmp_path / "judged"
    another = write_answers(tmp_path / "another.jsonl", other, NUMBERS, model="b")
    with pytest.raises(ValueError, match=r"judged: viescore was scored there with .*\"m\".* and here with .*\"b\".* leave viescore out"):
        score(other, another, "--compare", theirs)
    alike = write_answers(tmp_path / "alike.jsonl", other, [([1, 1], [1, 1])] * 3)
    with pytest.raises(ValueError, match=r"\"official\".* and here with .*\"paper\""):
        score(other, alike, "--compare", theirs, "--vie-reading", "paper")
    score(other, alike, "--compare", theirs)
    assert "| this run - judged |" in (said := capsys.readouterr().out) and "do not say" not in said
    lines = [json.loads(line) for line in (theirs / "scores.jsonl").read_text(encoding="utf-8").splitlines()]
    assert all(line.pop("settings") == {"by": BY, "reading": "official"} for line in lines)
    (theirs / "scores.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    score(other, alike, "--compare", theirs, "--vie-reading", "paper")
    assert capsys.readouterr().out.count("do not say their settings are taken as made with this run's (judged: viescore)") == 1


def test_imgedit_is_the_mean_of_three(tmp_path: Path):
    edits = write_edits(tmp_path, 2)
    judged = write_answers(tmp_path / "judged.jsonl", edits, [([5, 4, 1],), (None,)], "imgedit")
    rows = score(edits, judged, metric="imgedit")
    assert rows[0]["imgedit"] == pytest.approx(10 / 3) and rows[0]["imgedit_unread"] == 0
    assert rows[1]["imgedit"] is None and rows[1]["imgedit_unread"] == 1


def test_overall_in_closed_form_and_the_papers_table_2():
    assert overall(4, 9) == 6 and overall(0, 10) == 0 and overall(10, 10) == 10 and overall(None, 3) is None
    rows = [Row(id="a", scores={"vie_semantic": 7.67, "vie_quality": 8.99})]
    assert round(by_type(rows)["all"]["vie_root_of_means"].mean, 2) == 8.30, "Ours, style to photorealistic"


def refused(edits: Path, *words: Any) -> str:
    with pytest.raises(ValueError) as caught:
        evaluate.main([str(word) for word in ("--edits", edits, "--metrics", "viescore", "--out", edits / "scores", *words)])
    return str(caught.value)


def test_what_was_not_judged_as_it_is_now_is_named(tmp_path: Path):
    edits = write_edits(tmp_path, 3)
    judged = write_answers(tmp_path / "judged.jsonl", edits, NUMBERS)
    save(edits / "00001_s1.png", noise(9))
    said = refused(edits, "--judged", judged)
    assert "1 problem(s), nothing was scored" in said and "t1: not judged as it is now (vie_semantic, vie_quality)" in said
    again = write_edits(tmp_path / "again", 3)
    judged = write_answers(tmp_path / "again.jsonl", again, NUMBERS)
    manifest = (again / "edits.jsonl").read_text(encoding="utf-8").replace('"instruction 2"', '"something else"')
    (again / "edits.jsonl").write_text(manifest, encoding="utf-8")
    said = refused(again, "--judged", judged)
    assert "1 problem(s)" in said and "t2: not judged as it is now (vie_semantic, vie_quality)" in said
    assert "--metrics viescore needs --judged FILE" in refused(edits)
    assert "none.jsonl: no such file; python dataset_tools/judge.py" in refused(edits, "--judged", tmp_path / "none.jsonl")


def test_answers_of_two_judges_and_damaged_lines_are_refused_and_shards_are_one_judges(tmp_path: Path):
    edits, other = write_edits(tmp_path, 3), write_edits(tmp_path / "other", 3, level=1)
    judged, more = write_answers(tmp_path / "a.jsonl", edits, NUMBERS), write_answers(tmp_path / "b.jsonl", other, NUMBERS)
    assert len(score(edits, judged, "--judged", judged, more)) == 3
    strange = write_answers(tmp_path / "c.jsonl", other, NUMBERS, model="another")
    assert "scores of two judges cannot be compared" in refused(edits, "--judged", judged, strange)
    unread = write_answers(tmp_path / "e.jsonl", other, [(None, None)] * 3, model="another")
    unread.touch()
    assert "e.rejects.jsonl: line 1 is by model another" in refused(edits, "--judged", judged, unread)
    for broken in ({"success": 11, "preservation": 1}, {"success": 1}, [1, 2], {"success": True, "preservation": 1}):
        line = {"of": "x", "id": "x", "metric": "vie_semantic", "scores": broken, "by": BY}
        (tmp_path / "d.jsonl").write_text(json.dumps(line), encoding="utf-8")
        assert "line 1 has not the scores of vie_semantic; remove it" in refused(edits, "--judged", tmp_path / "d.jsonl")


def test_a_judge_that_says_one_thing_alone_is_seen_in_the_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    edits = write_edits(tmp_path, 5)
    numbers: Numbers = [([10, 10], [number, 3]) for number in range(5)]
    score(edits, write_answers(tmp_path / "judged.jsonl", edits, numbers))
    said = (tmp_path / "judged" / "summary.md").read_text(encoding="utf-8")
    assert said.count("warning: ") == 1 and "vie_semantic: all 5 answers are the same (success 10, preservation 10)" in said
    assert said in capsys.readouterr().out
    assert not sameness({"a": [{"x": 10}] * 4}), "four agree by chance"
    assert not sameness({"a": [{"x": 10}] * 9 + [{"x": 9}]})
