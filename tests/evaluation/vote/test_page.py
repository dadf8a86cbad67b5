"""The vote in a server of its own and in a real browser; see tests/dataset_tools/review/test_browser.py for what it needs."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from byg_plugin.evaluation.vote.ballots import order, read_votes
from tests.support.browser import browser as browser
from tests.support.evaluation import write_edits
from tests.support.review_server import PATIENCE
from tests.support.vote_server import VoteServer

Runs = tuple[Path, Path]
Serve = Callable[[Runs], VoteServer]


def post(server: VoteServer, rater: str, position: int, side: str, **headers: str) -> int:
    own = {"Content_Type": "application/json", "Origin": server.url.rstrip("/")}
    body = {"token": session(server, rater)["token"], "side": side}
    return server.ask(f"/api/pairs/{position}?rater={rater}", "POST", body, **{**own, **headers})[0]


def session(server: VoteServer, rater: str) -> dict[str, Any]:
    return json.loads(server.ask(f"/api/pairs?rater={rater}")[2])


def test_a_vote_is_for_the_run_on_that_side_and_on_disk_at_once(runs: Runs, serve: Serve):
    server = serve(runs)
    for position, side in enumerate(("left", "right", "left", "right")):
        assert post(server, "ada", position, side) == 200
        index, left = order(server.pairs, "ada")[position]
        files = {name: getattr(server.pairs[index], name).edit.read_bytes() for name in ("a", "b")}
        shown = server.ask(f"/media/{position}/{side}?rater=ada")[2]
        vote = read_votes(server.votes)[-1]
        assert shown == files[vote.choice] != files["b" if vote.choice == "a" else "a"]
        assert (vote.choice == left) == (side == "left") and vote.key == server.pairs[index].key
        assert server.ask(f"/media/{position}/reference?rater=ada")[2] == server.pairs[index].a.source.read_bytes()
    server.kill()
    server.start()
    shown = session(server, "ada")["pairs"]
    assert [pair["voted"] for pair in shown] == ["left", "right", "left", "right"]
    assert all(set(pair) == {"instruction", "kind", "voted"} for pair in shown), "nothing tells which run is where"
    assert [pair["voted"] for pair in session(server, "bob")["pairs"]] == [None] * 4


def test_who_votes_twice_changes_the_vote_and_both_lines_stay(runs: Runs, serve: Serve):
    server = serve(runs)
    assert [post(server, "ada", 0, side) for side in ("left", "right")] == [200, 200]
    first, second = read_votes(server.votes)
    assert first.key == second.key and first.choice != second.choice
    assert session(server, "ada")["pairs"][0]["voted"] == "right"


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/media/4/left?rater=ada", 404),
        ("/media/-1/left?rater=ada", 404),
        ("/media/9999999999999/left?rater=ada", 404),
        ("/media/0/a?rater=ada", 404),
        ("/media/0/left", 400),
        ("/api/pairs", 400),
        ("/api/pairs?rater=%00", 400),
        (f"/api/pairs?rater={'x' * 65}", 400),
        ("/api/pairs?rater=%20", 400),
        ("/votes.jsonl", 404),
    ],
)
def test_what_is_not_there_is_not_sent(runs: Runs, serve: Serve, path: str, status: int):
    assert serve(runs).ask(path)[0] == status


def test_other_sites_and_wrong_bodies_write_nothing(runs: Runs, serve: Serve):
    server = serve(runs)
    assert post(server, "ada", 0, "left", Origin="http://evil.example") == 403
    assert post(server, "ada", 0, "left", Host="evil.example") == 403
    assert post(server, "ada", 0, "middle") == 400
    own = {"Content_Type": "application/json", "Origin": server.url.rstrip("/")}
    for body in ({"token": "other", "side": "left"}, {"side": "left"}):
        assert server.ask("/api/pairs/0?rater=ada", "POST", body, **own)[0] == 410
    assert server.ask("/api/pairs/0?rater=ada", "POST", b"{", **own)[0] == 400
    assert read_votes(server.votes) == []


def test_a_page_of_before_a_restart_with_other_edits_cannot_vote(tmp_path: Path, runs: Runs, serve: Serve):
    """The first pair is the same one, its sides are not: they follow from all the pairs."""
    server = serve(runs)
    seen = {name: order(server.pairs, name)[0] for name in map(str, range(99))}
    before = {name: (server.pairs[index].key, left, session(server, name)["token"]) for name, (index, left) in seen.items()}
    server.kill()
    for run, level in zip(runs, (10, 90), strict=True):
        (run / "edits.jsonl").unlink()
        write_edits(tmp_path, 5, level=level)
    server.start()
    after = {name: (server.pairs[index].key, left) for name in seen for index, left in order(server.pairs, name)[:1]}
    swapped = next(name for name in seen if after[name][0] == before[name][0] and after[name][1] != before[name][1])
    own = {"Content_Type": "application/json", "Origin": server.url.rstrip("/")}
    body = {"token": before[swapped][2], "side": "left"}
    status, _, said = server.ask(f"/api/pairs/0?rater={swapped}", "POST", body, **own)
    assert status == 410 and b"reload" in said and read_votes(server.votes) == []
    assert post(server, swapped, 0, "left") == 200


def enter(browser: Browser, server: VoteServer, rater: str) -> tuple[Page, list[str]]:
    page, complaints = browser.new_page(viewport={"width": 1280, "height": 800}), []
    page.set_default_timeout(PATIENCE * 1000)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda message: message.type == "error" and complaints.append(message.text))
    page.goto(server.url)
    page.fill("#rater", rater)
    page.keyboard.press("Enter")
    return page, complaints


def press(page: Page, key: str) -> None:
    """A key is for a pair that is there."""
    expect(page.locator("#vote-left")).to_be_enabled()
    page.keyboard.press(key)


def test_a_rater_votes_pauses_reloads_and_ends(runs: Runs, serve: Serve, browser: Browser):
    server = serve(runs)
    page, complaints = enter(browser, server, "Ada Ö")
    expect(page.locator("#progress")).to_have_text("1 of 4, 0 voted on")
    expect(page.locator("#question")).to_contain_text("Which image is the better editing result?")
    index, _ = order(server.pairs, "Ada Ö")[0]
    expect(page.locator("#instruction")).to_have_text(server.pairs[index].a.instruction)
    widths = page.locator("#pictures img").evaluate_all("all => Promise.all(all.map(one => one.decode().then(() => one.naturalWidth)))")
    assert widths == [40, 40, 40]
    page.click("#vote-left")
    expect(page.locator("#progress")).to_have_text("2 of 4, 1 voted on")
    press(page, "ArrowRight")
    expect(page.locator("#progress")).to_have_text("3 of 4, 2 voted on")
    page.click("#pause")
    expect(page.locator("#vote")).to_be_hidden()
    page.reload()
    page.fill("#rater", "Ada Ö")
    page.click("#start button")
    expect(page.locator("#progress")).to_have_text("3 of 4, 2 voted on")
    page.click("#back")
    expect(page.locator("#vote-right")).to_have_attribute("aria-pressed", "true")
    press(page, "ArrowLeft")  # changes the second vote
    expect(page.locator("#progress")).to_have_text("3 of 4, 2 voted on")
    press(page, "ArrowLeft")
    expect(page.locator("#progress")).to_have_text("4 of 4, 3 voted on")
    press(page, "ArrowLeft")
    expect(page.locator("#end")).to_contain_text("All done")
    lefts = [left for _, left in order(server.pairs, "Ada Ö")]
    chosen = [vote.choice for vote in read_votes(server.votes)]
    assert chosen == [lefts[0], "b" if lefts[1] == "a" else "a", lefts[1], lefts[2], lefts[3]]
    assert complaints == []
    page.close()


def test_opened_twice_and_a_killed_server(runs: Runs, serve: Serve, browser: Browser):
    server = serve(runs)
    (one, _), (other, _) = enter(browser, server, "ada"), enter(browser, server, "bob")
    one.click("#vote-left")
    other.click("#vote-right")
    expect(one.locator("#progress")).to_have_text("2 of 4, 1 voted on")
    expect(other.locator("#progress")).to_have_text("2 of 4, 1 voted on")
    expect(one.locator("#vote-left")).to_be_enabled()
    server.kill()
    one.click("#vote-left")
    expect(one.locator("#notice")).to_contain_text("Not saved")
    server.start()
    one.click("#vote-left")
    expect(one.locator("#progress")).to_have_text("3 of 4, 2 voted on")
    assert sorted(vote.rater for vote in read_votes(server.votes)) == ["ada", "ada", "bob"]
    one.close()
    other.close()


@pytest.mark.parametrize("rater", ["A/B", "..", "a?rater=b&c#d%2F"])
def test_every_name_that_can_be_read_votes(runs: Runs, serve: Serve, browser: Browser, rater: str):
    server = serve(runs)
    page, complaints = enter(browser, server, rater)
    press(page, "ArrowLeft")
    expect(page.locator("#progress")).to_have_text("2 of 4, 1 voted on")
    assert [vote.rater for vote in read_votes(server.votes)] == [rater] and complaints == []
    page.close()


@pytest.mark.parametrize("button", ["#vote-left", "#skip"])
def test_a_button_that_was_clicked_is_not_pressed_again_by_a_key(runs: Runs, serve: Serve, browser: Browser, button: str):
    page, _ = enter(browser, serve(runs), "ada")
    page.click(button)
    expect(page.locator("#progress")).to_contain_text("2 of 4")
    assert page.evaluate("document.activeElement.tagName") == "BODY"
    for key in (" ", "Enter"):
        press(page, key)
    page.wait_for_timeout(300)
    expect(page.locator("#progress")).to_contain_text("2 of 4")
    page.close()


def test_nobody_votes_on_pictures_that_are_not_there(runs: Runs, serve: Serve, browser: Browser):
    server = serve(runs)
    page, waiting = browser.new_page(), []
    page.set_default_timeout(PATIENCE * 1000)
    page.route("**/media/**/right*", lambda route: waiting.append(route))
    page.goto(server.url)
    page.fill("#rater", "ada")
    page.keyboard.press("Enter")
    while not waiting:
        page.wait_for_timeout(20)
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#vote-left")).to_be_disabled()
    waiting[0].continue_()
    press(page, "ArrowLeft")
    expect(page.locator("#progress")).to_have_text("2 of 4, 1 voted on")
    while len(waiting) < 2:
        page.wait_for_timeout(20)
    waiting[1].fulfill(status=404)
    expect(page.locator("#notice")).to_contain_text("B cannot be shown")
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#vote-right")).to_be_disabled()
    page.click("#skip")
    expect(page.locator("#progress")).to_have_text("3 of 4, 1 voted on")
    expect(page.locator("#notice")).to_be_hidden()
    assert len(read_votes(server.votes)) == 1
    page.close()


def until(page: Page, condition: str) -> None:
    """The page's rules let nothing be evaluated in it later."""
    end = time.monotonic() + PATIENCE
    while not page.evaluate(condition):
        assert time.monotonic() < end, (condition, page.locator("#notice").text_content())
        page.wait_for_timeout(20)


TIMES = "[...document.querySelectorAll('#pictures video')].map(one => one.currentTime)"


def test_clips_play_in_step_start_again_and_stop(tmp_path: Path, serve: Serve, browser: Browser):
    server = serve((write_edits(tmp_path, 1, suffix=".mp4", level=10), write_edits(tmp_path, 1, suffix=".mp4", level=90)))
    page, complaints = enter(browser, server, "ada")
    until(page, f"{TIMES}.length === 3 && Math.min(...{TIMES}) > 0.2")
    assert page.locator("#pictures video").count() == 3
    for _ in range(5):
        times = page.evaluate(TIMES)
        assert max(times) - min(times) < 0.3, times
        page.wait_for_timeout(100)
    until(page, f"Math.max(...{TIMES}) < 0.2")  # a second long, and again
    page.keyboard.press(" ")
    until(page, "[...document.querySelectorAll('#pictures video')].every(one => one.paused)")
    stopped = page.evaluate(TIMES)
    page.wait_for_timeout(300)
    assert page.evaluate(TIMES) == stopped
    page.click("#vote-left")
    expect(page.locator("#end")).to_contain_text("All done")
    assert complaints == []
    page.close()


def test_a_clip_that_the_browser_cannot_play_says_so(tmp_path: Path, serve: Serve, browser: Browser):
    server = serve((write_edits(tmp_path, 1, suffix=".mkv", level=10), write_edits(tmp_path, 1, suffix=".mkv", level=90)))
    page, _ = enter(browser, server, "ada")
    expect(page.locator("#notice")).to_contain_text("This browser does not play these clips")
    page.close()
