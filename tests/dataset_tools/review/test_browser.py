"""The review page in a real browser that drives it.

Needs Chromium: on the PATH, or at CHROMIUM, or installed with `playwright install chromium`. Without one these tests are
skipped; with BYG_REQUIRE_BROWSER=1, as CI sets it, they fail.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, Route, expect

from byg_plugin.data.clips import write_clip
from byg_plugin.data.rules import ROLES
from tests.support.browser import browser as browser
from tests.support.browser import browser_path, without_browser
from tests.support.review_server import PATIENCE, Server, on_disk, record, statuses, write_tuples

MARKUP = '<img src=x onerror="window.broken = true"><b>bold</b> & </textarea><script>window.broken = true</script>'


def test_without_a_browser_its_tests_skip_and_where_it_must_be_there_they_fail(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for name in ("CHROMIUM", "BYG_REQUIRE_BROWSER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    playwright = SimpleNamespace(chromium=SimpleNamespace(executable_path=str(tmp_path / "chrome")))
    assert browser_path(playwright) is None
    with pytest.raises(pytest.skip.Exception, match="no Chromium"):
        without_browser("no Chromium")
    monkeypatch.setenv("BYG_REQUIRE_BROWSER", "1")
    with pytest.raises(pytest.fail.Exception, match="no Chromium"):
        without_browser("no Chromium")
    (tmp_path / "chrome").touch()
    assert browser_path(playwright) == str(tmp_path / "chrome")


class Window:
    """A page of the review, what it complained of and what it asked for."""

    def __init__(self, browser: Browser, url: str) -> None:
        self.complaints: list[str] = []
        self.asked: list[str] = []
        self.page: Page = browser.new_page(viewport={"width": 1280, "height": 800})
        self.page.set_default_timeout(PATIENCE * 1000)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", lambda message: message.type == "error" and self.complaints.append(message.text))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(url)
        self.at_line()

    def at_line(self, line: int | None = None) -> None:
        """Wait until a tuple, or that of this line, is shown."""
        expect(self.page.locator("#facts")).to_contain_text(re.compile(rf"line {line or ''}"))

    def field(self, name: str):
        return self.page.locator(f"#fields textarea[name={name}]")

    def saved(self) -> None:
        expect(self.page.locator("#saved")).to_have_text("Saved")

    def press(self, *keys: str) -> None:
        for key in keys:
            self.page.keyboard.press(key)

    def count(self, status: str, number: int) -> None:
        expect(self.page.locator(f"#statuses button[data-status={status}] b")).to_have_text(str(number))


@pytest.fixture
def look(browser: Browser) -> Iterator[Callable[[Server], Window]]:
    windows: list[Window] = []

    def start(server: Server) -> Window:
        windows.append(Window(browser, server.url))
        return windows[-1]

    yield start
    for window in windows:
        if not window.page.is_closed():
            window.page.close()


def test_keep_edit_discard_by_keys_then_reload(tuples: Path, serve: Callable[..., Server], look: Callable[[Server], Window]):
    window = look(serve(tuples))
    assert window.page.locator("#media img").evaluate("image => image.decode().then(() => image.naturalWidth)") == 64
    window.press("k")
    window.at_line(2)
    window.press("d")
    window.at_line(3)
    window.press("f", "Control+a")
    window.page.keyboard.type("kd fsou: keys are letters here")
    window.press("Control+Enter")
    window.at_line(4)
    window.saved()
    assert statuses(tuples) == ["kept", "discarded", "fixed", "open"]
    assert on_disk(tuples)[2].texts["instruction"] == "kd fsou: keys are letters here"
    window.page.reload()
    window.at_line(4)
    for status, number in {"all": 4, "open": 1, "kept": 1, "fixed": 1, "discarded": 1}.items():
        window.count(status, number)
    window.press("ArrowLeft")
    window.at_line(3)
    expect(window.field("instruction")).to_have_value("kd fsou: keys are letters here")
    expect(window.page.locator(".field.instruction .was")).to_have_text("was: instruction of 2")
    window.press("r")
    expect(window.page.locator("#facts .badge")).to_have_text("kept")
    window.press("o")
    expect(window.page.locator("#facts .badge")).to_have_text("open")
    window.saved()
    assert on_disk(tuples)[2].texts["instruction"] == "instruction of 2"
    assert statuses(tuples)[2] == "open"
    assert window.complaints == []
    assert {url.split("/")[2] for url in window.asked} == {window.page.url.split("/")[2]}


def test_buttons_do_what_keys_do_and_undo_goes_back(tuples: Path, serve: Callable[..., Server], look: Callable[[Server], Window]):
    window = look(serve(tuples))
    window.page.click("#discard")
    window.at_line(2)
    window.page.click("#keep")
    window.at_line(3)
    window.page.click("#undo")
    window.at_line(2)
    window.page.click("#undo")
    window.at_line(1)
    window.count("open", 4)
    window.page.click("#fix")
    expect(window.field("instruction")).to_be_focused()
    window.field("src_caption").fill("")
    window.page.click("#keep")
    expect(window.page.locator("#notice")).to_contain_text("Empty: Source caption")
    window.saved()
    assert statuses(tuples)[0] == "open"


def test_a_killed_server_loses_nothing_and_the_page_goes_on(tuples: Path, serve: Callable[..., Server], look: Callable[[Server], Window]):
    server = serve(tuples)
    window = look(server)
    window.press("k")
    window.at_line(2)
    window.field("tgt_caption").fill("typed and not decided")
    window.saved()
    server.kill()
    assert statuses(tuples) == ["kept", "open", "open", "open"]
    assert on_disk(tuples)[1].texts["tgt_caption"] == "typed and not decided"
    window.field("tgt_caption").fill("typed while it was dead")
    window.press("Escape", "d")  # the next tuple cannot be read, this one's decision waits in the page
    expect(window.page.locator("#saved")).to_contain_text("Not saved (1)")
    server.start()
    window.saved()
    window.at_line(3)
    assert on_disk(tuples)[1].texts["tgt_caption"] == "typed while it was dead"
    assert statuses(tuples) == ["kept", "discarded", "open", "open"]
    server.kill()
    server.start()
    resumed = look(server)
    resumed.at_line(3)  # the first that is open
    resumed.count("discarded", 1)


def test_kills_while_decisions_are_made_leave_those_that_the_page_called_saved(
    tmp_path: Path, serve: Callable[..., Server], look: Callable[[Server], Window]
):
    tuples = write_tuples(tmp_path, [record(number) for number in range(12)])
    server = serve(tuples)
    window = look(server)
    for number in range(12):
        window.at_line(number + 1)
        window.press("k" if number % 3 else "d")
        if number % 4 == 3:
            server.kill()  # with this decision before, in or after its write
            server.start()
    window.saved()
    assert statuses(tuples) == ["kept" if number % 3 else "discarded" for number in range(12)]
    assert len({item.key for item in on_disk(tuples)}) == 12


def test_closing_right_after_a_key_loses_nothing(tuples: Path, serve: Callable[..., Server], look: Callable[[Server], Window]):
    server = serve(tuples)
    for number in range(8):
        window = look(server)
        window.press("f", "Control+a")
        window.page.keyboard.type(f"text {number}")
        window.page.close()
        until(lambda number=number: on_disk(tuples)[0].texts["instruction"] == f"text {number}")
    window = look(server)
    window.press("k")
    window.page.close()
    until(lambda: statuses(tuples)[0] == "fixed")


def until(true: Callable[[], bool], seconds: float = PATIENCE) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "did not come to pass"
        time.sleep(0.05)


def test_markup_in_texts_names_and_types_is_text(tmp_path: Path, serve: Callable[..., Server], look: Callable[[Server], Window]):
    evil = {
        "src_caption": MARKUP,
        "tgt_caption": MARKUP,
        "instruction": MARKUP,
        "reverse_instruction": MARKUP,
        "edit_type": MARKUP,
        "id": MARKUP,
    }
    tuples = write_tuples(tmp_path, [record(0, **evil), record(1, MARKUP + ".png", **{**evil, "id": "b"}), record(2)])
    tuples = tuples.rename(tmp_path / "<b>bold<b>.jsonl")
    window = look(serve(tuples))
    for _ in range(2):
        for name in ROLES:
            expect(window.field(name)).to_have_value(MARKUP)
        window.press("s")
        expect(window.page.locator(".neighbour dd").first).to_be_visible()
        if window.page.url.endswith("side=1"):
            window.press("f", "Control+a")
            window.page.keyboard.type("x")
            expect(window.page.locator(".field.instruction .was")).to_have_text(f"was: {MARKUP}")
            window.page.reload()
            window.at_line(1)
            window.press("r")
            window.press("ArrowRight")
            window.at_line(2)
            break
    expect(window.page.locator("#previous dd").first).to_have_text(MARKUP)
    expect(window.page.locator("#facts")).to_contain_text("<b>bold</b>")
    expect(window.page.locator("#media .problem")).to_have_text("source: no such file")
    expect(window.page.locator("#media figcaption")).to_have_text(MARKUP + ".png")
    assert window.page.locator("b:not(#statuses b), main script, img[src=x]").count() == 0
    assert window.page.evaluate("window.broken") is None
    assert window.complaints == []


def test_filters_by_status_and_type_with_counts(tuples: Path, serve: Callable[..., Server], look: Callable[[Server], Window]):
    window = look(serve(tuples))  # add, remove, add, remove
    assert window.page.locator("#type option").all_text_contents() == ["all (4)", "add (2)", "remove (2)"]
    window.page.select_option("#type", "remove")
    window.at_line(2)
    window.count("all", 2)
    window.press("k")
    window.at_line(4)
    window.page.click("#statuses button[data-status=open]")
    expect(window.page.locator("#position")).to_have_text("1 of 1")
    window.page.select_option("#type", "all")
    expect(window.page.locator("#position")).to_have_text("3 of 3")
    window.press("d")  # it leaves the filter, and the page wraps to the first that is in it
    window.at_line(1)
    window.page.click("#statuses button[data-status=kept]")
    window.at_line(2)
    window.page.reload()
    window.at_line(2)
    expect(window.page.locator("#statuses button[data-status=kept]")).to_have_attribute("aria-pressed", "true")
    window.page.click("#statuses button[data-status=fixed]")
    expect(window.page.locator("#nothing")).to_be_visible()
    window.press("k", "d", "r", "o", "f")  # of nothing
    window.page.click("#statuses button[data-status=all]")
    window.at_line()
    window.saved()
    assert statuses(tuples) == ["open", "kept", "open", "discarded"]
    assert window.complaints == []


def test_neighbours_stand_beside_the_tuple_and_are_a_click_away(
    tuples: Path, serve: Callable[..., Server], look: Callable[[Server], Window]
):
    window = look(serve(tuples))
    window.press("s")
    expect(window.page.locator("#previous")).to_contain_text("Nothing before")
    window.press("ArrowRight")
    expect(window.page.locator("#previous dd")).to_have_text(
        [f"{name} of 0" for name in ("src_caption", "instruction", "tgt_caption", "reverse_instruction")]
    )
    expect(window.page.locator("#next dd").nth(1)).to_have_text("instruction of 2")
    boxes = [window.page.locator(f"#{name}").bounding_box() for name in ("previous", "current", "next")]
    assert boxes[0]["x"] + boxes[0]["width"] <= boxes[1]["x"] and boxes[1]["x"] + boxes[1]["width"] <= boxes[2]["x"]
    window.press("k")
    window.at_line(3)
    expect(window.page.locator("#previous .badge")).to_have_text("kept")
    window.page.click("#previous")
    window.at_line(2)
    window.page.reload()
    window.at_line(2)
    expect(window.page.locator("#next")).to_contain_text("instruction of 2")


def test_a_clip_plays_and_space_pauses_it(tmp_path: Path, serve: Callable[..., Server], look: Callable[[Server], Window]):
    frames = [Image.new("RGB", (64, 64), (number * 8, 40, 90)) for number in range(24)]
    write_clip(tmp_path / "clip.mp4", frames, 12)
    window = look(serve(write_tuples(tmp_path, [record(0, "clip.mp4"), record(1, "clip.mp4", target="clip.mp4")])))
    clip = window.page.locator("#media video")
    until(lambda: clip.evaluate("clip => clip.currentTime") > 0.2, PATIENCE)
    window.press(" ")
    until(lambda: clip.evaluate("clip => clip.paused"))
    window.press("ArrowRight")
    expect(clip).to_have_count(2)
    expect(window.page.locator("#media figcaption").last).to_have_text("target: clip.mp4")
    assert window.complaints == []


def test_a_second_window_does_not_overwrite_the_first_unseen(tuples: Path, serve: Callable[..., Server], look: Callable[[Server], Window]):
    server = serve(tuples)
    first, second = look(server), look(server)
    first.field("instruction").fill("of the first")
    first.saved()
    second.field("instruction").fill("of the second")
    expect(second.page.locator("#conflict")).to_contain_text("Instruction: of the second")
    expect(second.field("instruction")).to_have_value("of the first")
    assert on_disk(tuples)[0].texts["instruction"] == "of the first"
    second.page.click("#use-mine")
    expect(second.field("instruction")).to_have_value("of the second")
    second.saved()
    assert on_disk(tuples)[0].texts["instruction"] == "of the second"


def test_every_conflict_is_answered_by_itself_and_no_notice_hides_it(
    tuples: Path, serve: Callable[..., Server], look: Callable[[Server], Window]
):
    server = serve(tuples)
    first, second = look(server), look(server)
    second.press("ArrowRight")
    second.at_line(2)  # both are read here before the other window changes them
    second.press("ArrowLeft")
    second.at_line(1)
    for line in (1, 2):
        first.at_line(line)
        first.field("instruction").fill(f"theirs {line}")
        first.saved()
        first.press("Escape", "ArrowRight")
    for line in (1, 2):
        second.at_line(line)
        second.field("instruction").fill(f"mine {line}")
        expect(second.field("instruction")).to_have_value(f"theirs {line}")
        second.press("Escape", "ArrowRight")
    second.at_line(3)
    second.field("src_caption").fill("")
    second.press("Escape", "k")
    expect(second.page.locator("#notice")).to_contain_text("Empty: Source caption")
    expect(second.page.locator("#conflict")).to_contain_text("Instruction: mine 1\n(1 more after this one)")
    second.page.click("#use-mine")
    expect(second.page.locator("#conflict")).to_contain_text("Instruction: mine 2")
    second.page.click("#use-theirs")
    expect(second.page.locator("#conflict")).to_be_hidden()
    second.saved()
    assert [item.texts["instruction"] for item in on_disk(tuples)[:2]] == ["mine 1", "theirs 2"]


def test_what_is_typed_while_a_conflict_is_told_is_kept_with_it(
    tuples: Path, serve: Callable[..., Server], look: Callable[[Server], Window]
):
    server = serve(tuples)
    first, second = look(server), look(server)
    first.field("instruction").fill("theirs")
    first.saved()
    waiting = []
    second.page.route("**/api/tuples/0", lambda route: route.continue_() if waiting else waiting.append(route))
    second.field("instruction").fill("mine")
    while not waiting:
        second.page.wait_for_timeout(20)
    second.field("instruction").fill("mine, and more")
    waiting[0].continue_()
    expect(second.page.locator("#conflict")).to_contain_text("Instruction: mine, and more")
    expect(second.field("instruction")).to_have_value("theirs")
    # What is typed next is text, not keys that decide.
    expect(second.field("instruction")).to_be_focused()


def test_a_refusal_leads_nobody_away_who_is_typing(tuples: Path, serve: Callable[..., Server], look: Callable[[Server], Window]):
    window = look(serve(tuples))
    waiting: list[Route] = []
    window.page.route("**/api/tuples/0", lambda route: waiting.append(route))
    window.press("d")
    window.at_line(2)
    window.field("instruction").fill("typed here")
    while not waiting:
        window.page.wait_for_timeout(20)
    waiting[0].fulfill(status=422, body="not this one")
    expect(window.page.locator("#notice")).to_contain_text("not this one")
    window.at_line(2)
    expect(window.field("instruction")).to_be_focused()


def test_a_page_of_another_file_cannot_decide(tuples: Path, serve: Callable[..., Server], look: Callable[[Server], Window]):
    server = serve(tuples)
    window = look(server)
    server.kill()
    write_tuples(tuples.parent, [record(number) for number in (2, 3)])
    server.start()
    window.press("k")
    expect(window.page.locator("#notice")).to_contain_text("copy your text, then reload")
    assert statuses(tuples) == ["open", "open"]


@pytest.mark.parametrize("status", [404, 410, 413, 422])
def test_one_write_that_is_refused_holds_up_no_other(
    tuples: Path, serve: Callable[..., Server], look: Callable[[Server], Window], status: int
):
    window = look(serve(tuples))
    window.page.route("**/api/tuples/0", lambda route: route.fulfill(status=status, body="not this one"))
    window.field("instruction").fill("of the first")
    expect(window.page.locator("#notice")).to_contain_text("not this one")
    window.press("Escape", "ArrowRight")
    window.at_line(2)
    window.press("d")
    window.at_line(3)
    until(lambda: statuses(tuples)[1] == "discarded")
    expect(window.page.locator("#saved")).to_have_text("Not saved (1): tuple 1")
    window.press("ArrowLeft", "ArrowLeft")
    window.at_line(1)
    expect(window.field("instruction")).to_have_value("of the first")
    window.page.unroute("**/api/tuples/0")
    window.field("instruction").fill("changed")
    window.saved()
    assert on_disk(tuples)[0].texts["instruction"] == "changed"


def test_a_text_that_no_write_holds_is_refused_in_words(tuples: Path, serve: Callable[..., Server], look: Callable[[Server], Window]):
    window = look(serve(tuples))
    window.field("instruction").fill("x" * 600_000)
    expect(window.page.locator("#notice")).to_contain_text("Tuple 1 was not taken: longer than 512 KiB")
