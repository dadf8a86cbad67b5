"""generate_edits.py against a real local server: failures of every kind, kills, resuming, what leaks and what does not."""

from __future__ import annotations

import json
import random
import re
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from byg_plugin.data.rules import EDIT_TYPES, ROLES, RULES
from byg_plugin.data.tuples import read_tuples_file
from dataset_tools.settings import GenerateSettings, read_settings
from tests.support.answer_corpus import FORM, KINDS
from tests.support.stub_server import kind_of
from tests.support.tools_helpers import KEY, photos, records, run, start, stub


def files(out: Path) -> tuple[dict[str, dict], dict[str, dict]]:
    """Accepted and rejected records by source; a source that stands twice fails."""
    both = records(out), records(out.with_name(f"{out.stem}.rejects.jsonl"))
    names = [record["source"] for part in both for record in part]
    assert len(names) == len(set(names)), "an input stands twice"
    return {r["source"]: r for r in both[0]}, {r["source"]: r for r in both[1]}


def number(source: str) -> int:
    return int(Path(source).stem[1:])


@pytest.mark.parametrize("options", [[], ["--stream"]])
def test_a_good_server(tmp_path: Path, options: list[str]) -> None:
    photos(tmp_path / "photos", 24)
    out = tmp_path / "data" / "t.jsonl"
    with stub(tmp_path / "s", "good") as server:
        done = run("generate_edits", "--images", tmp_path / "photos", "--out", out, "--base-url", server.url, "--model", "m", *options)
        assert done.returncode == 0, done.stderr
        asked = server.requests
    accepted, rejected = files(out)
    assert len(accepted) == 24 and not rejected and not (tmp_path / "data" / "t.rejects.jsonl").exists()
    assert "24 accepted (0 of them after a repair), 0 rejected" in done.stdout
    bar = done.stderr.replace("\r", "\n").strip().splitlines()[-1]
    assert re.search(r"24input .*input/s, accepted 24 repaired 0 rejected 0 \| \w+ \d+%", bar), bar
    assert len(read_tuples_file(out)) == 24
    record = next(iter(accepted.values()))
    assert set(record) == {"source", "src_caption", "tgt_caption", "instruction", "reverse_instruction", "edit_type", "meta"}
    assert record["meta"].keys() >= {"backend", "model", "prompt_version", "seed", "seconds", "offered"}
    assert (tmp_path / "data" / "t.summary.png").stat().st_size > 5000
    assert len(asked) == 24
    for entry in asked:
        assert entry["images"] == 1 and entry["key"] == KEY and len(set(entry["offered"])) == 3 and set(entry["offered"]) <= set(EDIT_TYPES)
        assert entry["options"]["model"] == "m" and entry["options"].get("stream", False) == bool(options)
        assert "A caption of the image" in entry["text"] and "red car" in entry["text"]
    assert len({entry["options"]["seed"] for entry in asked}) == 24
    styled = [entry for entry in asked if "style_change" in entry["offered"]]
    assert styled and all("watercolor" in entry["text"] and "ukiyo-e" in entry["text"] for entry in styled)


@pytest.mark.parametrize("shape", ["reasoning_content", "tool_calls", "parts"])
@pytest.mark.parametrize("options", [[], ["--stream"]])
def test_answers_that_stand_elsewhere_and_errors_that_are_sent_as_answers(tmp_path: Path, shape: str, options: list[str]) -> None:
    photos(tmp_path / "photos", 6)
    out = tmp_path / "t.jsonl"
    with stub(tmp_path / "s", "good", shape=shape, busy=True) as server:
        done = run("generate_edits", "--images", tmp_path / "photos", "--out", out, "--base-url", server.url, *options)
        assert done.returncode == 0, done.stderr
        assert len(server.requests) == 12
    accepted, rejected = files(out)
    assert len(accepted) == 6 and not rejected and not any("repaired" in record["meta"] for record in accepted.values())


@pytest.mark.parametrize("options", [[], ["--stream"]])
def test_a_thousand_malformed_answers_of_a_hostile_server(tmp_path: Path, options: list[str]) -> None:
    count = 1000
    photos(tmp_path / "photos", count)
    out = tmp_path / "t.jsonl"
    with stub(tmp_path / "s", "hostile") as server:
        done = run(
            "generate_edits",
            "--images",
            tmp_path / "photos",
            "--out",
            out,
            "--base-url",
            server.url,
            "--timeout",
            5,
            "--in-flight",
            48,
            *options,
        )
        assert done.returncode == 0, done.stderr
        asked = server.requests
    accepted, rejected = files(out)
    assert {number(source) for source in accepted} | {number(source) for source in rejected} == set(range(count))
    for source in {**accepted, **rejected}:
        n = number(source)
        kind = kind_of(n)
        refusal = KINDS[kind][1]
        if refusal is None:
            assert source in accepted and "repaired" not in accepted[source]["meta"], kind
        elif n % 2 == 0:
            assert accepted.get(source, {"meta": {}})["meta"].get("repaired") is True, (kind, rejected.get(source))
        else:
            reject = rejected[source]
            assert reject["reason"] == refusal.removeprefix("RULE:"), (kind, reject)
            assert reject["kind"] == ("rules" if refusal.startswith("RULE:") else "parse")
            assert len(reject["answers"]) == 2 and reject["message"]
    for source, record in accepted.items():
        assert f"number {number(source)} " in record["src_caption"], "an answer went to another image"
    # Every kind was met, on both ways.
    assert len({kind_of(number(source)) for source in accepted}) == len(KINDS)
    assert len({kind_of(number(source)) for source in rejected}) == len(KINDS) - len(FORM)
    for entry in (entry for entry in asked if entry["last"]):
        refusal = KINDS[kind_of(entry["number"])][1] or ""
        if refusal.removeprefix("RULE:") in RULES:
            assert RULES[refusal.removeprefix("RULE:")] in entry["last"], "the repair turn does not quote the rule"
    assert f"{len(rejected)} rejected" in done.stdout


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows cannot send SIGKILL")
def test_killed_at_twenty_random_moments(tmp_path: Path) -> None:
    count, rng = 300, random.Random(0)
    photos(tmp_path / "photos", count)
    out = tmp_path / "t.jsonl"
    kills = 0
    with stub(tmp_path / "s", "corpus", seconds=0.1) as server:
        arguments = ("--images", tmp_path / "photos", "--out", out, "--base-url", server.url, "--in-flight", 4)
        for _ in range(20):
            before = len(server.requests)
            process = start("generate_edits", *arguments)
            deadline = time.monotonic() + 120
            while len(server.requests) == before and process.poll() is None:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.35))
            if process.poll() is None:
                process.kill()
                kills += 1
            process.communicate()
            files(out)  # whole lines and no duplicates at every moment
        assert kills == 20, "the work was over before the last kill"
        done_before = sum(map(len, files(out)))
        assert 0 < done_before < count
        done = run("generate_edits", *arguments)
        assert done.returncode == 0, done.stderr
        assert f"{count - done_before} images done in this run" in done.stdout
        asked = Counter(entry["number"] for entry in server.requests if entry["turns"] == 2)
    accepted, rejected = files(out)
    assert {number(source) for source in {**accepted, **rejected}} == set(range(count))
    for source in accepted:
        assert KINDS[kind_of(number(source))][1] is None or number(source) % 2 == 0
    # Only what was in flight is asked again.
    assert sum(asked.values()) - count <= 4 * kills


def test_a_line_that_a_power_cut_tore_is_done_again(tmp_path: Path) -> None:
    photos(tmp_path / "photos", 4)
    out = tmp_path / "t.jsonl"
    with stub(tmp_path / "s", "good") as server:
        arguments = ("--images", tmp_path / "photos", "--out", out, "--base-url", server.url)
        assert run("generate_edits", *arguments).returncode == 0
        whole = out.read_bytes().splitlines(keepends=True)
        out.write_bytes(b"".join(whole[:3]) + whole[3][:57])
        done = run("generate_edits", *arguments)
    assert done.returncode == 0 and "1 images done in this run" in done.stdout
    assert len(files(out)[0]) == 4 and out.read_bytes().startswith(b"".join(whole[:3]))


def test_shards_share_the_inputs_and_write_apart(tmp_path: Path) -> None:
    photos(tmp_path / "photos", 30)
    with stub(tmp_path / "s", "good") as server:
        for shard in ("1/3", "2/3", "3/3"):
            done = run(
                "generate_edits", "--images", tmp_path / "photos", "--out", tmp_path / "t.jsonl", "--base-url", server.url, "--shard", shard
            )
            assert done.returncode == 0, done.stderr
    parts = [files(tmp_path / f"t.{i}of3.jsonl")[0] for i in (1, 2, 3)]
    assert sum(map(len, parts)) == 30 == len({source for part in parts for source in part}) and min(map(len, parts)) >= 3


def test_balance_is_restored_when_a_run_goes_on(tmp_path: Path) -> None:
    photos(tmp_path / "photos", 40)
    texts = dict.fromkeys(ROLES, "x")
    used = [{"source": f"gone{k}.jpg", **texts, "edit_type": EDIT_TYPES[k % 5], "meta": {"repaired": k < 7}} for k in range(5000)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(record) + "\n" for record in used))
    with stub(tmp_path / "s", "good") as server:
        done = run("generate_edits", "--images", tmp_path / "photos", "--out", tmp_path / "t.jsonl", "--base-url", server.url)
        assert "5040 accepted (7 of them after a repair)" in done.stdout, done.stderr
        offered = Counter(name for entry in server.requests for name in entry["offered"])
    # A type that was used 1000 times weighs a thousandth of an unused one, and of those there are five for three places.
    assert sum(offered[name] for name in EDIT_TYPES[:5]) <= 6 and min(offered[name] for name in EDIT_TYPES[5:]) >= 10


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for another process")
def test_ctrl_c_keeps_what_is_done_and_leaves_no_traceback(tmp_path: Path) -> None:
    photos(tmp_path / "photos", 40)
    out = tmp_path / "t.jsonl"
    with stub(tmp_path / "s", "good", seconds=0.3) as server:
        arguments = ("--images", tmp_path / "photos", "--out", out, "--base-url", server.url, "--in-flight", 4)
        process = start("generate_edits", *arguments)
        deadline = time.monotonic() + 60
        while len(records(out)) < 8:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
        assert process.returncode == 130 and "Traceback" not in errors, errors
        done_before = len(files(out)[0])
        assert 8 <= done_before < 40
        assert f"{40 - done_before} images done in this run" in run("generate_edits", *arguments).stdout
    assert len(files(out)[0]) == 40


def test_two_processes_never_write_one_file(tmp_path: Path) -> None:
    photos(tmp_path / "photos", 30)
    with stub(tmp_path / "s", "good", seconds=60) as server:
        arguments = ("--images", tmp_path / "photos", "--out", tmp_path / "t.jsonl", "--base-url", server.url)
        first = start("generate_edits", *arguments)
        while not server.requests:
            time.sleep(0.05)
        second = run("generate_edits", *arguments)
        first.kill()
        first.communicate()
    assert second.returncode == 2 and "another process is writing it" in second.stderr


def test_a_slow_image_holds_no_other(tmp_path: Path) -> None:
    photos(tmp_path / "photos", 60)
    out = tmp_path / "t.jsonl"
    with stub(tmp_path / "s", "hostile") as server:
        process = start("generate_edits", "--images", tmp_path / "photos", "--out", out, "--base-url", server.url, "--in-flight", 4)
        deadline = time.monotonic() + 60
        while len(files(out)[0]) + len(files(out)[1]) < 59:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.1)
        assert not [source for part in files(out) for source in part if number(source) == 7]
        process.kill()
        process.communicate()


def test_no_key_and_no_prompt_in_outputs_rejects_or_logs(tmp_path: Path) -> None:
    photos(tmp_path / "photos", 12)
    out = tmp_path / "t.jsonl"
    with stub(tmp_path / "s", "echo") as server:
        done = run("generate_edits", "--images", tmp_path / "photos", "--out", out, "--base-url", server.url)
        assert any(entry["key"] == KEY for entry in server.requests)
    accepted, rejected = files(out)
    assert {number(source) for source in accepted} == {2, 6, 10}
    assert Counter(r["reason"] for r in rejected.values()) == {"server": 3, "no_object": 3, "repeats_prompt": 3}
    said = done.stdout + done.stderr + "".join(p.read_text(errors="replace") for p in tmp_path.glob("t*"))
    assert KEY not in said and "sk-test" not in said
    assert "Choose exactly one of these edit types" not in said and "reverse_instruction is given to somebody" not in said
    assert "[key]" in said and "[prompt]" in said  # it was there


def test_a_server_that_puts_all_answers_elsewhere_stops_the_run(tmp_path: Path) -> None:
    photos(tmp_path / "photos", 30)
    out = tmp_path / "t.jsonl"
    with stub(tmp_path / "s", "good", shape="silent") as server:
        done = run("generate_edits", "--images", tmp_path / "photos", "--out", out, "--base-url", server.url)
    assert done.returncode == 2 and "--reasoning-parser and --tool-call-parser" in done.stderr and "Traceback" not in done.stderr
    accepted, rejected = files(out)
    assert not accepted and len(rejected) <= 4


@pytest.mark.parametrize(
    ("mode", "said"),
    [
        ("refuse", "refuses every request"),
        ("key", "set the environment variable OPENAI_API_KEY"),
        ("model", "check --model and --base-url"),
        ("down", "has answered nothing for"),
    ],
)
def test_a_server_that_serves_nobody_rejects_nothing(tmp_path: Path, mode: str, said: str) -> None:
    photos(tmp_path / "photos", 5)
    out = tmp_path / "t.jsonl"
    with stub(tmp_path / "s", mode) as server:
        done = run("generate_edits", "--images", tmp_path / "photos", "--out", out, "--base-url", server.url, "--retry-for", 1)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert KEY not in done.stderr and "Choose exactly one" not in done.stderr
    assert files(out) == ({}, {})


def test_no_server_at_all(tmp_path: Path) -> None:
    photos(tmp_path / "photos", 2)
    done = run(
        "generate_edits",
        "--images",
        tmp_path / "photos",
        "--out",
        tmp_path / "t.jsonl",
        "--base-url",
        "http://127.0.0.1:9/v1",
        "--retry-for",
        1,
    )
    assert done.returncode == 2 and "127.0.0.1:9" in done.stderr and "run the same command again" in done.stderr
    assert done.stderr.count("trying again for 1 s") == 1  # at once: nobody waits 15 minutes to learn of a wrong address


def test_a_server_that_hangs(tmp_path: Path) -> None:
    photos(tmp_path / "photos", 2)
    with stub(tmp_path / "s", "good", seconds=3600) as server:
        limits = ("--timeout", 0.5, "--retry-for", 1)
        done = run("generate_edits", "--images", tmp_path / "photos", "--out", tmp_path / "t.jsonl", "--base-url", server.url, *limits)
    assert done.returncode == 2 and "no answer within 0.5 s" in done.stderr and "nothing is lost" in done.stderr
    assert files(tmp_path / "t.jsonl") == ({}, {})


def test_a_key_that_is_a_placeholder_is_no_secret(tmp_path: Path) -> None:
    photos(tmp_path / "photos", 2)
    with stub(tmp_path / "s", "good") as server:
        done = run(
            "generate_edits", "--images", tmp_path / "photos", "--out", tmp_path / "t.jsonl", "--base-url", server.url, OPENAI_API_KEY="x"
        )
        assert done.returncode == 0 and {entry["key"] for entry in server.requests} == {"x"}, done.stderr
    assert len(files(tmp_path / "t.jsonl")[0]) == 2


def test_unreadable_images_are_rejected_with_the_reason_and_can_be_tried_again(tmp_path: Path) -> None:
    folder = photos(tmp_path / "photos", 4)
    whole = (folder / "p0001.jpg").read_bytes()
    (folder / "p0001.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "p0002.json").write_text("{no")
    for name in ("a.HEIC", "b.heic", "c.gif"):
        (folder / name).write_bytes(b"x")
    out = tmp_path / "t.jsonl"
    with stub(tmp_path / "s", "good") as server:
        arguments = ("--images", folder, "--out", out, "--base-url", server.url)
        done = run("generate_edits", *arguments)
        assert done.returncode == 0 and "1 .gif, 2 .heic" in done.stdout and ".txt" not in done.stdout
        accepted, rejected = files(out)
        assert len(accepted) == 2 and {r["reason"] for r in rejected.values()} == {"input"}
        assert "damaged" in rejected["photos/p0001.jpg"]["message"] and "p0002.json" in rejected["photos/p0002.jpg"]["message"]
        (folder / "p0001.jpg").write_bytes(whole)
        assert "0 images done" in run("generate_edits", *arguments).stdout
        assert "2 images done" in run("generate_edits", *arguments, "--retry", "input").stdout
    accepted, rejected = files(out)
    assert set(rejected) == {"photos/p0002.jpg"} and "photos/p0001.jpg" in accepted


def test_tables_and_what_they_say_of_style(tmp_path: Path) -> None:
    photos(tmp_path / "photos", 40)
    rows = [
        {"Image": f"photos/p{k:04d}.jpg", "caption": f"a car number {k}", "style": "anime" if k % 2 else "photo"} for k in range(40)
    ] + [{"Image": "photos/p0000.jpg", "caption": "again"}, {"Image": "", "caption": "none"}]
    (tmp_path / "t.csv").write_text("Image,caption,style\n" + "\n".join(f"{r['Image']},{r['caption']},{r.get('style', '')}" for r in rows))
    out = tmp_path / "out.jsonl"
    with stub(tmp_path / "s", "good") as server:
        done = run("generate_edits", "--images", tmp_path / "t.csv", "--out", out, "--base-url", server.url, "--style-conversion", 1)
        assert done.returncode == 0, done.stderr
        asked = [entry for entry in server.requests if entry["turns"] == 2]
    assert len(asked) == 40  # the one that stands twice is done once
    assert "passed over: 1 that" in done.stdout
    for entry in asked:
        forced = "The style to reach is photorealistic" in entry["text"]
        assert forced == bool(entry["number"] % 2)
        assert entry["offered"] == ["style_change"] if forced else len(entry["offered"]) == 3
        assert ("known to be made as: anime" in entry["text"]) == forced
    accepted, rejected = files(out)
    # The stub's captions never name anime: the rule on the source's style refuses them twice.
    assert {r["reason"] for r in rejected.values()} == {"source_style", "input"} and len(rejected) == 21
    assert len(accepted) == 20


def test_parquet_and_jsonl_tables(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    photos(tmp_path / "photos", 3)
    rows = [{"image": f"photos/p{k:04d}.jpg", "caption": f"number {k}"} for k in range(3)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "t.parquet")
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with stub(tmp_path / "s", "good") as server:
        for table in ("t.parquet", "t.jsonl"):
            done = run("generate_edits", "--images", tmp_path / table, "--out", tmp_path / f"{table}.out.jsonl", "--base-url", server.url)
            assert done.returncode == 0, done.stderr
            assert len(files(tmp_path / f"{table}.out.jsonl")[0]) == 3
    (tmp_path / "bad.jsonl").write_text('{"picture": "x"}')
    done = run("generate_edits", "--images", tmp_path / "bad.jsonl", "--out", tmp_path / "x.jsonl")
    assert done.returncode == 2 and "no column 'image'" in done.stderr and "picture" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--out", "x.jsonl"], "images is missing"),
        (["--images", "nowhere", "--out", "x.jsonl"], "nowhere: no such folder"),
        (["--images", ".", "--out", "x.jsonl", "--k", "0"], "k = 0"),
        (["--images", ".", "--out", "x.jsonl", "--k", "many"], "k = 'many'"),
        (["--images", ".", "--out", "x.jsonl", "--shard", "5/4"], "shard = '5/4'"),
        (["--images", ".", "--out", "x.jsonl", "--backend", "magic"], "backend = 'magic'"),
        (["--images", ".", "--out", "x.jsonl", "--base-url", "localhost:8000"], "expected something like"),
        (["--images", ".", "--out", "x.jsonl", "--base-url", "http://me:secret@host/v1"], "give the key in the environment"),
        (["--config", "nowhere.toml"], "--config nowhere.toml: no such file"),
    ],
)
def test_bad_settings(tmp_path: Path, arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = run("generate_edits", *arguments)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr and "secret" not in done.stderr


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("in_flight", "1000000000000", "in_flight = 1000000000000: Input should be less than or equal to 10000"),
        ("batch_size", "9" * 5000, "batch_size = "),
        ("limit", "1" * 5000, "limit = "),
        ("shard", "1/" + "9" * 5000, "shard = '1/9"),
        ("timeout", "1e300", "timeout = 1e+300"),
        ("timeout", "Infinity", "timeout = inf"),
        ("extra_body", "[" * 100_000, "extra_body = '[["),
        ("extra_body", "[" * 100_000 + "]" * 100_000, "extra_body = '[["),
        ("extra_body", '{"a": ' + "1" * 5000 + "}", "extra_body = "),
    ],
)
def test_values_beyond_all_bounds_are_named_and_not_repeated_whole(option: str, value: str, said: str) -> None:
    with pytest.raises(ValueError, match="^options:") as caught:
        read_settings(GenerateSettings, "generate", "", ["--images", ".", "--out", "o", f"--{option.replace('_', '-')}", value])
    assert said in str(caught.value) and len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "text",
    [
        "[generate]\nx = " + "[" * 100_000,
        "[generate]\nx = " + "[" * 100_000 + "]" * 100_000,
        "[generate]\nx = " + "1" * 5000,
        "[generate]\n" + "a." * 1000 + "b = 1",
        "[generate",
        "generate = 3",
        "generate = [" + '"x",' * 10_000 + "]",
        '"' + "x" * 10_000 + '" = 1',
    ],
)
def test_a_configuration_that_is_none_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.toml").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"^(--config )?.*c\.toml") as caught:
        read_settings(GenerateSettings, "generate", "", ["--config", str(tmp_path / "c.toml")])
    assert len(str(caught.value)) < 1000


def test_config_file_and_options_over_it(tmp_path: Path) -> None:
    photos(tmp_path / "photos", 3)
    config = tmp_path / "c.toml"
    with stub(tmp_path / "s", "good") as server:
        lines = [
            f"images = {json.dumps(str(tmp_path / 'photos'))}",
            f'base_url = "{server.url}"',
            'model = "of the file"',
            "limit = 1",
            'out = "none"',
        ]
        config.write_text("[generate]\n" + "\n".join(lines) + "\n[render]\nsteps = 3\n")
        done = run(
            "generate_edits", "--config", config, "--out", tmp_path / "o.jsonl", "--limit", 2, "--extra-body", '{"top_k": 20, "seed": null}'
        )
        assert done.returncode == 0 and len(files(tmp_path / "o.jsonl")[0]) == 2, done.stderr
        options = server.requests[0]["options"]
        assert options["model"] == "of the file" and options["top_k"] == 20 and "seed" not in options
    config.write_text("[generate]\nimagse = 'x'\n")
    done = run("generate_edits", "--config", config)
    assert done.returncode == 2 and "unknown key imagse = 'x'; did you mean images?" in done.stderr
