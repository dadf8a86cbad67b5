"""judge.py against a real local server: what is asked, what is read, repaired or counted, kills, and a judge that does not look."""

from __future__ import annotations

import json
import random
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from byg_plugin.evaluation.items import Item
from byg_plugin.evaluation.judged import IMGEDIT, QUALITY, SEMANTIC
from dataset_tools.judge import judge, pictures, plan, tasks_of
from dataset_tools.judge_prompts import VERSION, words_of
from dataset_tools.settings import JudgeSettings
from tests.support.evaluation import noise, save, write_edits, write_tuples_of
from tests.support.judge_corpus import FORM, KINDS, scores_of
from tests.support.stub_server import JUDGED
from tests.support.tools_helpers import records, run, start, stub

NUMBERED = 'vie_semantic = "preservation of <instruction>"\nvie_quality = "quality of <instruction>"\n'
ONCE = ("--retry-for", 5)


def files(out: Path) -> tuple[dict[tuple[str, str], dict], dict[tuple[str, str], dict]]:
    """Scored and unread records by edit and question; one that stands twice fails."""
    both = records(out), records(out.with_name(f"{out.stem}.rejects.jsonl"))
    names = [(record["id"], record["metric"]) for part in both for record in part]
    assert len(names) == len(set(names)), "a question stands twice"
    one, other = ({(record["id"], record["metric"]): record for record in part} for part in both)
    return one, other


def numbered(folder: Path) -> Path:
    """Words that name the edit in both questions: the stub answers by it."""
    path = folder / "words.toml"
    path.write_text(NUMBERED, encoding="utf-8")
    return path


def test_a_good_judge_is_asked_two_questions_an_edit(tmp_path: Path) -> None:
    edits, out = write_edits(tmp_path, 3), tmp_path / "judged.jsonl"
    with stub(tmp_path / "s", "good") as server:
        done = run("judge", "--edits", edits, "--out", out, "--base-url", server.url, "--model", "m", *ONCE)
        assert done.returncode == 0, done.stderr
        asked = server.requests
    scored, unread = files(out)
    assert len(scored) == 6 and not unread and "6 answers (0 of them after a repair), 0 could not be read" in done.stdout
    assert [entry["images"] for entry in asked if "preservation" in entry["text"]] == [2, 2, 2]
    assert [entry["images"] for entry in asked if "artifacts" in entry["text"]] == [1, 1, 1]
    assert all(entry["options"]["temperature"] == 0 and '"score": [' in entry["text"] for entry in asked)
    record = scored["t2", "vie_semantic"]
    assert record["scores"] == dict(zip(SEMANTIC.parts, scores_of(2, "preservation"), strict=True)) and record["edit_type"] == "add"
    assert record["by"] == {"model": "m", "words": VERSION, "image_side": 1024, "frames": 4}
    assert record["meta"]["prompt_version"] == VERSION and "edit number 2" in record["meta"]["said"]
    assert re.search(r"^6 questions with 9 pictures for m: about \S+ million tokens sent.*no sum; up to 32 at once", done.stdout), (
        done.stdout
    )


def test_a_second_run_asks_nothing_and_a_changed_edit_is_judged_anew(tmp_path: Path) -> None:
    edits, out = write_edits(tmp_path, 3), tmp_path / "judged.jsonl"
    with stub(tmp_path / "s", "good") as server:
        words = ("--edits", edits, "--out", out, "--base-url", server.url, *ONCE)
        for asked, says in ((6, "6 questions"), (6, "0 questions"), (8, "2 questions with 3 pictures")):
            if asked == 8:
                save(edits / "00001_s1.png", noise(9))
            done = run("judge", *words, "--price-in", 1.0, "--price-out", 2.0)
            assert done.returncode == 0 and len(server.requests) == asked and says in done.stdout, done.stderr
        assert "in the currency of --price-in" in done.stdout and "s an answer as so far" in done.stdout
        done = run("judge", *words, "--model", "another")
    assert done.returncode == 2 and "holds answers by" in done.stderr and "give them a file of their own" in done.stderr


def test_a_torn_last_answer_is_asked_for_again(tmp_path: Path) -> None:
    edits, out = write_edits(tmp_path, 2), tmp_path / "judged.jsonl"
    words = ("--edits", edits, "--out", out, *ONCE)
    with stub(tmp_path / "s", "good") as server:
        assert run("judge", *words, "--base-url", server.url).returncode == 0
        out.write_bytes(out.read_bytes()[:-40])
        done = run("judge", *words, "--base-url", server.url)
        assert done.returncode == 0 and "1 questions" in done.stdout and len(server.requests) == 5, done.stderr
    assert len(files(out)[0]) == 4


def test_another_judge_takes_no_rejects_back(tmp_path: Path) -> None:
    edits, out, rejects = write_edits(tmp_path, 1), tmp_path / "judged.jsonl", tmp_path / "judged.rejects.jsonl"
    out.write_text('{"of": "y", "scores": [], "by": {"model": "a"}}\n')
    rejects.write_text('{"of": "x", "kind": "parse", "by": {"model": "a"}}\n')
    with pytest.raises(ValueError, match="judged.jsonl holds answers by {'model': 'a'}"):
        judge(JudgeSettings(edits=str(edits), out=str(out), retry="all"), lambda text: None)
    assert len(records(rejects)) == 1


def test_a_wrong_model_that_answered_nothing_is_put_right(tmp_path: Path) -> None:
    edits, out, rejects = write_edits(tmp_path, 1), tmp_path / "judged.jsonl", tmp_path / "judged.rejects.jsonl"
    rejects.write_text('{"of": "x", "kind": "parse", "by": {"model": "a"}}\n')
    words = ("--edits", edits, "--out", out, *ONCE, "--model", "b")
    assert run("judge", *words).returncode == 2 and len(records(rejects)) == 1
    with stub(tmp_path / "s", "good") as server:
        assert run("judge", *words, "--base-url", server.url, "--retry", "all").returncode == 0
    assert records(out) and not records(rejects)


@pytest.mark.parametrize("option", ["edits", "tuples", "prompts"])
def test_what_it_reads_is_never_written(tmp_path: Path, option: str) -> None:
    edits = write_edits(tmp_path, 1)
    given = {"edits": edits / "edits.jsonl", "tuples": write_tuples_of(tmp_path, 1), "prompts": numbered(tmp_path)}
    before = given[option].read_bytes()
    same = edits / ".." / given[option].relative_to(tmp_path)
    with pytest.raises(ValueError, match=f"is the file that {option} = .* reads, and would be spoilt"):
        judge(JudgeSettings(**{name: str(path) for name, path in given.items()}, out=str(same)), lambda text: None)
    assert given[option].read_bytes() == before


def test_what_one_judge_left_unread_is_no_answer_of_another(tmp_path: Path) -> None:
    edits, out = write_edits(tmp_path, 2), tmp_path / "judged.jsonl"
    words = ("--edits", edits, "--out", out, *ONCE)
    with stub(tmp_path / "s", "good", scores=10) as server:
        run("judge", *words, "--base-url", server.url, "--model", "a")
    assert len(files(out)[1]) == 4
    with stub(tmp_path / "t", "good") as server:
        done = run("judge", *words, "--base-url", server.url, "--model", "b")
        assert not server.requests
    assert done.returncode == 2 and "judged.rejects.jsonl holds answers by {'model': 'a'" in done.stderr


def test_a_thousand_malformed_answers_are_scored_repaired_or_counted(tmp_path: Path) -> None:
    count, out = 500, tmp_path / "judged.jsonl"
    edits = write_edits(tmp_path, count)
    words = ("--edits", edits, "--out", out, "--prompts", numbered(tmp_path), "--in-flight", 48, "--timeout", 5)
    with stub(tmp_path / "s", "corpus") as server:
        done = run("judge", *words, "--base-url", server.url)
        assert done.returncode == 0, done.stderr
    scored, unread = files(out)
    assert len(scored) + len(unread) == 2 * count and not scored.keys() & unread.keys()
    for name, record in {**scored, **unread}.items():
        number, question = int(name[0][1:]), {"vie_semantic": SEMANTIC, "vie_quality": QUALITY}[name[1]]
        kind = list(JUDGED)[number % len(JUDGED)]
        refusal = KINDS[kind][1]
        repaired = name in scored and record["meta"].get("repaired", False)
        if refusal is not None and number % 2:
            assert record.get("reason") == refusal and record["kind"] == "parse" and len(record["answers"]) == 2, (kind, record)
            continue
        assert name in scored and repaired == (refusal is not None), (kind, record)
        wanted = scores_of(number, "preservation" if question is SEMANTIC else "quality")
        assert record["scores"] == dict(zip(question.parts, wanted, strict=True)), (kind, "never another score")
    assert {list(JUDGED)[int(name[1:]) % len(JUDGED)] for name, _ in unread} == KINDS.keys() - {*FORM}
    assert f"{len(unread)} could not be read" in done.stdout and "not scored because" in done.stdout


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows cannot send SIGKILL")
def test_killed_at_ten_moments_it_loses_what_was_in_flight_alone(tmp_path: Path) -> None:
    count, in_flight, draw = 100, 4, random.Random(0)
    edits, out = write_edits(tmp_path, count), tmp_path / "judged.jsonl"
    kills = 0
    with stub(tmp_path / "s", "good", seconds=0.05) as server:
        words = ("--edits", edits, "--out", out, "--prompts", numbered(tmp_path), "--base-url", server.url, "--in-flight", in_flight)
        for _ in range(10):
            before = len(server.requests)
            process = start("judge", *words)
            deadline = time.monotonic() + 120
            while len(server.requests) == before and process.poll() is None:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            time.sleep(draw.random() * 0.3)
            kills += process.poll() is None
            process.kill()
            process.communicate()
        done = run("judge", *words)
        assert done.returncode == 0, done.stderr
        asked = len(server.requests)
    scored, unread = files(out)
    assert len(scored) == 2 * count and not unread and kills >= 8
    assert 2 * count <= asked <= 2 * count + kills * in_flight, "asked again: at most what was in flight"


def test_a_judge_that_only_says_10_is_seen(tmp_path: Path) -> None:
    edits = write_edits(tmp_path, 6)
    for plan_, says in (
        ({"scores": [10, 10]}, "vie_semantic: all 6 answers are the same (success 10, preservation 10)"),
        ({"scores": 10}, ""),
    ):
        out = tmp_path / f"{len(says)}.jsonl"
        with stub(tmp_path / f"s{len(says)}", "good", **plan_) as server:
            done = run("judge", "--edits", edits, "--out", out, "--base-url", server.url, *ONCE)
        if says:
            assert done.returncode == 0 and f"warning: {says}: this judge tells nothing apart" in done.stdout
        else:
            assert done.returncode == 2 and "no answer could be read" in done.stderr and "12 count" in done.stdout
            assert len(files(out)[1]) == 12


def test_imgedits_question_by_the_tuples_own_results_and_words_by_edit_type(tmp_path: Path) -> None:
    write_edits(tmp_path, 2)
    tuples, out = write_tuples_of(tmp_path, 2, edit_type="add"), tmp_path / "judged.jsonl"
    for number in range(2):
        save(tmp_path / "results" / f"t{number}.png", noise(number))
    words = tmp_path / "prompts.json"
    words.write_text(json.dumps({"add": "compliance of number 7: <edit_prompt>", "remove": "x"}), encoding="utf-8")
    given = ("--tuples", tuples, "--results", tmp_path / "results", "--out", out, "--ask", "imgedit", "--prompts", words)
    with stub(tmp_path / "s", "good") as server:
        done = run("judge", *given, "--base-url", server.url, *ONCE)
        assert done.returncode == 0, done.stderr
        assert {entry["text"].split("\n")[0] for entry in server.requests} == {"compliance of number 7: add the snow"}
        assert all(entry["images"] == 2 for entry in server.requests)
    assert records(out)[0]["scores"] == dict(zip(IMGEDIT.parts, scores_of(7, "compliance"), strict=True))
    words.write_text(json.dumps({"remove": "x"}), encoding="utf-8")
    done = run("judge", *given)
    assert done.returncode == 2 and "t0: no words for imgedit" in done.stderr


def test_images_are_shown_in_the_sources_size_and_clips_as_frames_of_the_same_moments(tmp_path: Path) -> None:
    wide = np.zeros((1, 96, 200, 3), dtype=np.uint8)
    wide[:, :, 40:160] = 200  # what a centred crop to 5 : 4 keeps
    item = Item(id="a", source=save(tmp_path / "a.png", wide), edit=save(tmp_path / "b.png", noise(1)), instruction="x")
    source, edit = pictures(item, SEMANTIC, 4, 1024)
    assert source.image().size == edit.image().size == (120, 96) and np.asarray(source.image()).min() > 190
    assert [one.image().size for one in pictures(item, QUALITY, 4, 60)] == [(60, 48)]
    frames = np.stack([np.full((32, 40, 3), 20 * index, dtype=np.uint8) for index in range(9)])
    clip = Item(id="c", source=save(tmp_path / "c.mkv", frames), edit=save(tmp_path / "d.mkv", 255 - frames), instruction="x")
    shown = [np.asarray(one.image()).mean() for one in pictures(clip, SEMANTIC, 3, 1024)]
    assert shown == pytest.approx([0, 80, 160, 255, 175, 95], abs=3)
    assert "you see 3 frames, in order, first the source's" in words_of(None).ask(SEMANTIC, "x", frames=3)


def test_an_edit_type_named_as_a_question_gets_no_other_questions_words(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text(json.dumps({"system": "s", "vie_semantic": "a", "vie_quality": "b", "add": "c"}), encoding="utf-8")
    words = words_of(tmp_path / "p.json")
    said = {name: words.ask(SEMANTIC, "x", name).split("\n")[0] for name in ("system", "vie_quality", "remove", "add")}
    assert said == {"system": "a", "vie_quality": "a", "remove": "a", "add": "c"}
    assert words.lacks(IMGEDIT, "system") and not words.lacks(IMGEDIT, "add")


def test_what_it_will_cost_is_a_sum_over_shapes(tmp_path: Path) -> None:
    edits = write_edits(tmp_path, 2)
    settings = JudgeSettings(edits=str(edits), out=str(tmp_path / "o.jsonl"), price_in=1e6, price_out=0.0, in_flight=2, image_side=64)
    words = words_of(None)
    tasks = tasks_of(settings, words)
    letters = sum(len(words.system) + len(words.ask(task.question, task.item.instruction or "")) for task in tasks)
    sent = round(6 * 32 * 40 / 784 + letters / 4)
    found = re.search(
        r"; (\d+)\.\d\d in the currency.*2 at once, (\S+) min at 5 s an answer \[assumed\]", plan(tasks, settings, words, None)
    )
    assert found and abs(int(found[1]) - sent) <= 4 and float(found[2]) == pytest.approx(4 * 5 / 2 / 60, abs=0.05)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "give --edits DIR, or --tuples FILE"),
        (("--edits", "{edits}", "--backend", "rules"), "backend = 'rules' cannot judge"),
        (("--edits", "{edits}", "--price-in", "1.0"), "give price_in and price_out, both or none"),
        (("--edits", "{edits}", "--prompts", "{edits}/none.toml"), "none.toml: no such file"),
        (("--edits", "{edits}", "--prompts", "{bad}"), "expected texts by name (vie_semantic, vie_quality, imgedit, or edit types)"),
        (("--edits", "{gone}"), "t0: edit: no such file"),
    ],
)
def test_bad_input_is_told_before_anything_is_asked(tmp_path: Path, words: tuple[str, ...], says: str) -> None:
    edits, gone = write_edits(tmp_path, 1), write_edits(tmp_path / "gone", 1)
    next(gone.glob("*.png")).unlink()
    (tmp_path / "bad.json").write_text('{"vie_quality": 3}', encoding="utf-8")
    named = [word.format(edits=edits, gone=gone, bad=tmp_path / "bad.json") for word in words]
    done = run("judge", *named, "--out", tmp_path / "o.jsonl", "--base-url", "http://127.0.0.1:1/v1")
    assert done.returncode == 2 and says in done.stderr, done.stderr
    assert not (tmp_path / "o.jsonl").exists()
