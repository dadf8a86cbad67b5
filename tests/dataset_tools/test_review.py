"""The review page: its journal, what its server refuses, and a real browser that drives it.

The browser tests need Chromium: on the PATH, or at CHROMIUM, or installed with `playwright install chromium`. Without one they are
skipped; with BYG_REQUIRE_BROWSER=1, as CI sets it, they fail.
"""

from __future__ import annotations

import contextlib
import errno
import http.client
import json
import os
import re
import select
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
import uvicorn
from PIL import Image
from playwright.sync_api import Browser, Page, Playwright, expect, sync_playwright

from byg_plugin.data.clips import write_clip
from byg_plugin.data.tuples import TEXTS, read_tuples_file
from dataset_tools import _review_store
from dataset_tools._review_app import make_app
from dataset_tools._review_export import export_reviewed
from dataset_tools._review_items import Item, read_items
from dataset_tools._review_store import Review, StaleError, journal_path, read_decisions
from dataset_tools._review_wire import server_config
from tests.support import ROOT

MARKUP = '<img src=x onerror="window.broken = true"><b>bold</b> & </textarea><script>window.broken = true</script>'
PATIENCE = 60  # seconds; a loaded machine starts a server slowly


def record(number: int, source: str = "", **fields: Any) -> dict[str, Any]:
    texts = {name: f"{name} of {number}" for name in TEXTS}
    return {"source": source or f"{number}.png", **texts, "edit_type": ("add", "remove")[number % 2], **fields}


def write_tuples(folder: Path, records: list[dict[str, Any]]) -> Path:
    path = folder / "tuples.jsonl"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in records), encoding="utf-8")
    for entry in records:
        if re.fullmatch(r"\d+\.png", entry["source"]):
            Image.new("RGB", (64, 48), (40 * int(entry["source"][:-4]) % 256, 90, 160)).save(folder / entry["source"])
    return path


@pytest.fixture
def tuples(tmp_path: Path) -> Path:
    return write_tuples(tmp_path, [record(number) for number in range(4)])


def decide(review: Review, index: int, status: str, *, page: str = "p", count: int = 1, revision: int | None = None, **texts: str) -> Item:
    item = review.items[index]
    revision = item.revision if revision is None else revision
    return review.change(index, status=status, texts={**item.texts, **texts}, revision=revision, writer=(page, count))


def on_disk(tuples: Path) -> list[Item]:
    return read_decisions(journal_path(tuples), read_items(tuples))[0]


def statuses(tuples: Path) -> list[str]:
    return [item.status for item in on_disk(tuples)]


# ---- the journal


def test_each_change_is_a_line_on_disk_before_it_is_answered(tuples: Path, monkeypatch: pytest.MonkeyPatch):
    before = tuples.read_bytes()
    synced: list[bytes] = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (fsync(handle), synced.append(journal_path(tuples).read_bytes())))
    with Review(tuples) as review:
        for count, (index, status) in enumerate([(0, "kept"), (1, "discarded"), (0, "open"), (3, "kept")], start=1):
            decide(review, index, status, count=count)
            assert synced[-1].count(b"\n") == count
        fixed = decide(review, 2, "kept", count=5, instruction="  make it blue ")
        assert fixed.status == "fixed" and fixed.texts["instruction"] == "make it blue"
    assert statuses(tuples) == ["open", "discarded", "fixed", "kept"]
    assert on_disk(tuples)[2].texts["instruction"] == "make it blue"
    assert tuples.read_bytes() == before


def test_a_line_that_a_kill_has_cut_is_left_out_wherever_it_was_cut(tuples: Path):
    with Review(tuples) as review:
        decide(review, 0, "kept")
        first = journal_path(tuples).read_bytes()
        decide(review, 1, "kept", count=2, instruction="prune the tree, ü")
    whole = journal_path(tuples).read_bytes()
    for cut in range(len(first), len(whole)):
        journal_path(tuples).write_bytes(whole[:cut])
        assert statuses(tuples) == ["kept", "open", "open", "open"]
    journal_path(tuples).write_bytes(first + b'{"key": "' + b"x" * 2000)
    with Review(tuples) as review:  # it must not run into the next line
        decide(review, 2, "discarded")
    assert statuses(tuples) == ["kept", "open", "discarded", "open"]
    assert whole.startswith(first) and journal_path(tuples).read_bytes().startswith(first)


def test_a_damaged_line_before_the_last_is_named(tuples: Path):
    with Review(tuples) as review:
        decide(review, 0, "kept")
    good = journal_path(tuples).read_bytes()
    levels = [b'{"key": "a", "status": "open", "texts": {"x": ' + b"[" * deep + b"]" * deep + b"}}" for deep in (900, 100_000)]
    for line in (b'{"key": "a", "sta', *levels, b"[" * 100_000, b"1" * 5000):
        journal_path(tuples).write_bytes(line + b"\n" + good)
        with pytest.raises(ValueError, match=r"tuples\.review\.jsonl: line 1 is damaged"):
            Review(tuples)


def test_a_full_disk_leaves_state_and_journal_as_they_were(tuples: Path, monkeypatch: pytest.MonkeyPatch):
    with Review(tuples) as review:
        decide(review, 0, "kept")
        write, journal = os.write, journal_path(tuples).read_bytes()

        def full(handle: int, data: bytes) -> int:
            if len(data) < 60:
                raise OSError(errno.ENOSPC, "No space left on device")
            return write(handle, data[:50])

        with monkeypatch.context() as patched:
            patched.setattr(_review_store.os, "write", full)
            with pytest.raises(OSError, match="No space"):
                decide(review, 1, "kept", count=2)
        assert review.items[1].status == "open"
        assert journal_path(tuples).read_bytes() == journal
        decide(review, 1, "discarded", count=3)
    assert statuses(tuples)[:2] == ["kept", "discarded"]


def test_writes_of_one_page_count_in_its_order_and_those_of_another_not_unseen(tuples: Path):
    with Review(tuples) as review:
        decide(review, 0, "open", count=7, revision=0, instruction="the later text")
        decide(review, 0, "open", count=6, revision=0, instruction="the earlier text")
        assert review.items[0].texts["instruction"] == "the later text"
        with pytest.raises(StaleError):
            decide(review, 0, "discarded", page="another", revision=0)
        assert decide(review, 0, "discarded", page="another", revision=1).status == "discarded"
    assert on_disk(tuples)[0].status == "discarded"


def test_equal_tuples_are_decided_one_by_one_and_decisions_follow_moved_lines(tmp_path: Path):
    tuples = write_tuples(tmp_path, [record(0), record(1), record(1)])
    with Review(tuples) as review:
        decide(review, 1, "discarded")
        decide(review, 2, "kept", count=2)
    write_tuples(tmp_path, [record(2), record(1), record(0), record(1)])
    assert statuses(tuples) == ["open", "discarded", "open", "kept"]


def test_decisions_on_changed_tuples_wait_and_are_counted(tuples: Path):
    with Review(tuples) as review:
        decide(review, 0, "kept")
    write_tuples(tuples.parent, [record(0, instruction="another one"), record(1)])
    with Review(tuples) as review:
        assert review.strangers == 1 and review.items[0].status == "open"
        decide(review, 1, "kept")
    write_tuples(tuples.parent, [record(0), record(1)])
    assert statuses(tuples) == ["kept", "kept"]


def test_one_process_reviews_a_file(tuples: Path):
    with Review(tuples), pytest.raises(ValueError, match="another process reviews"):
        Review(tuples)
    with Review(tuples):
        pass


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"status": "fixed"}, "one of open, kept, discarded"),
        ({"texts": {"instruction": "alone"}}, "expected src_caption"),
        ({"texts": dict.fromkeys(TEXTS, " ")}, "is empty"),
        ({"texts": dict.fromkeys(TEXTS, "x" * 20_001)}, "20001 characters"),
        ({"texts": dict.fromkeys(TEXTS, "\ud800")}, "broken character"),
    ],
)
def test_what_is_no_decision_is_refused(tuples: Path, change: dict[str, Any], said: str):
    with Review(tuples) as review:
        usual = {"status": "kept", "texts": review.items[0].texts, "revision": 0, "writer": ("p", 1)}
        with pytest.raises(ValueError, match=said):
            review.change(0, **{**usual, **change})
        assert review.items[0].status == "open"
    assert journal_path(tuples).read_bytes() == b""


def test_lines_that_are_no_tuples_are_named_before_anything_is_served(tmp_path: Path):
    path = tmp_path / "tuples.jsonl"
    lines = [
        "[]",
        '{"source": 3}',
        '{"source": "a.png", "instruction": ["x"]}',
        '{"source": "a", "source": "b"}',
        '{"source": "\\ud800"}',
        "{",
    ]
    path.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(ValueError, match="6 line") as raised:
        read_items(path)
    assert all(f"line {number}:" in str(raised.value) for number in range(1, 7))


# ---- the export


def test_the_export_is_the_kept_and_fixed_tuples_as_the_trainer_takes_them(tmp_path: Path):
    images = tmp_path / "images"
    images.mkdir()
    tuples = write_tuples(images, [record(0, meta={"seed": 1}), record(1, id="one"), record(2), record(3)]).rename(tmp_path / "t.jsonl")
    with Review(tuples) as review:
        decide(review, 0, "kept")
        decide(review, 1, "kept", count=2, tgt_caption="a red cup")
        decide(review, 2, "discarded", count=3)
        target = tmp_path / "reviewed.jsonl"
        done = command(tuples, "--root", images, "--export", target)  # while the page is open
    assert done.returncode == 0, done.stderr
    assert "2 tuples (1 kept, 1 fixed, 1 discarded, 1 open)" in done.stdout and "dataset.image_root" in done.stdout
    written = [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]
    assert written == [record(0, meta={"seed": 1}), record(1, id="one", tgt_caption="a red cup")]
    assert [item.tgt_caption for item in read_tuples_file(target, images)] == ["tgt_caption of 0", "a red cup"]
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file() and path.suffix != ".lock") == [
        "reviewed.jsonl",
        "t.jsonl",
        "t.review.jsonl",
    ]


def test_an_export_that_the_trainer_would_refuse_is_not_written(tuples: Path):
    with Review(tuples) as review:
        for index in (1, 2):
            decide(review, index, "kept", count=index)
    (tuples.parent / "2.png").unlink()
    target = tuples.parent / "out.jsonl"
    target.write_text("an earlier export")
    with pytest.raises(ValueError, match=r"line 3: source: no such file .*2\.png"):
        export_reviewed(tuples, target, tuples.parent)
    assert target.read_text() == "an earlier export"
    for own in (tuples, journal_path(tuples)):
        with pytest.raises(ValueError, match="file of the review itself"):
            export_reviewed(tuples, own, tuples.parent)


# ---- the server


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "dataset_tools" / "review.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE * 2,
    )


class Server:
    """The command as a process of its own, always on the same port once it has one."""

    def __init__(self, tuples: Path, root: Path | None = None) -> None:
        self.tuples = tuples
        self._root = root or tuples.parent
        self.port = 0
        self.start()

    def start(self) -> None:
        arguments = [str(self.tuples), "--root", str(self._root), "--port", str(self.port)]
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "dataset_tools" / "review.py"), *arguments], stdout=subprocess.PIPE, text=True
        )
        for line in self.process.stdout:
            if found := re.match(r"http://127\.0\.0\.1:(\d+)/", line):
                self.port = int(found[1])
                return
        raise AssertionError("the server did not start")

    def kill(self) -> None:
        self.process.kill()  # SIGKILL
        self.process.wait()
        self.process.stdout.close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    def ask(self, path: str, method: str = "GET", body: object = None, **headers: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body. Header names are written with _ for -."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        connection.putrequest(method, path, skip_host="Host" in headers)
        data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        for name, value in {"Content_Length": str(len(data)), **headers}.items():
            connection.putheader(name.replace("_", "-"), value)
        connection.endheaders(data)
        answer = connection.getresponse()
        contents = answer.read()
        connection.close()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, contents

    def post(self, index: int, status: str, **headers: str) -> int:
        tuple_ = json.loads(self.ask(f"/api/tuples/{index}")[2])
        body = {"key": tuple_["key"], "status": status, "texts": tuple_["texts"], "revision": tuple_["revision"], "page": "p", "count": 1}
        own = {"Content_Type": "application/json", "Origin": self.url.rstrip("/")}
        return self.ask(f"/api/tuples/{index}", "POST", body, **{**own, **headers})[0]


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def start(tuples: Path, root: Path | None = None) -> Server:
        servers.append(Server(tuples, root))
        return servers[-1]

    yield start
    for server in servers:
        if server.process.poll() is None:
            server.kill()


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_files_outside_the_root_are_not_served(tmp_path: Path, serve: Callable[..., Server]):
    root, outside = tmp_path / "root", tmp_path / "outside"
    (root / "inner").mkdir(parents=True)
    outside.mkdir()
    (root / "notes.txt").write_text("secret")
    (root / "folder.png").mkdir()
    Image.new("RGB", (8, 8)).save(outside / "secret.png")
    Image.new("RGB", (8, 8)).save(root / "inner" / "good.png")
    (root / "link.png").symlink_to(outside / "secret.png")
    (root / "linked").symlink_to(outside)
    (root / "loop.png").symlink_to(root / "loop.png")
    (root / "text.png").symlink_to(root / "notes.txt")
    (root / "fine.png").symlink_to(root / "inner" / "good.png")
    good = ["inner/good.png", "inner/../inner/good.png", str(root / "inner" / "good.png"), "fine.png", "inner\\good.png"]
    bad = [
        *(str(outside / "secret.png"), "../outside/secret.png", "inner/../../outside/secret.png", "link.png", "linked/secret.png"),
        *(
            "..\\outside\\secret.png",
            "notes.txt",
            "text.png",
            "loop.png",
            "folder.png",
            "missing.png",
            "/etc/passwd",
            "a\0.png",
            "x" * 5000,
        ),
    ]
    tuples = write_tuples(tmp_path, [record(n, source) for n, source in enumerate([*good, *bad])])
    server = serve(tuples, root)
    for index in range(len(good)):
        assert server.ask(f"/media/{index}/source")[0] == 200, good[index]
    secret = (outside / "secret.png").read_bytes()
    for index, source in enumerate(bad, start=len(good)):
        status, _, body = server.ask(f"/media/{index}/source")
        assert status == 404 and secret not in body and b"secret" not in body, source
        assert server.post(index, "kept") == 422, source  # nobody can have looked at it
        assert server.post(index, "discarded") == 200
    assert server.ask("/media/0/target")[0] == 404


@pytest.mark.parametrize(
    "path",
    ["/media/../tuples.jsonl", "/media/0/..%2f..%2ftuples.jsonl", "/tuples.jsonl", "/media/0/1.png", "/media/99/source", "/media/-1/source"]
    + ["/page.html", "/_review_page/page.js", "/..%2freview.py", "/media/source?file=/etc/passwd", "/api/tuples/99"],
)
def test_a_path_from_the_browser_names_no_file(shared: Server, path: str):
    assert shared.ask(path)[0] == 404


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("shared")
    Image.new("RGB", (8, 4), "red").save(folder / "scan.tiff")
    server = Server(write_tuples(folder, [*(record(number) for number in range(3)), record(3, "scan.tiff")]))
    yield server
    server.kill()


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": ""},
        {"Origin": "http://127.0.0.1:1"},  # another server of this machine
        {"Origin": "http://localhost:{port}"},  # not the name it was called by
        {"Origin": "https://127.0.0.1:{port}"},
        {"Content_Type": "text/plain"},  # a form of another site can send that without asking
        {"Host": "evil.example:{port}", "Origin": "http://evil.example:{port}"},  # a name that leads here
    ],
)
def test_writes_of_other_pages_are_refused(shared: Server, headers: dict[str, str]):
    assert shared.post(0, "kept", **{name: value.format(port=shared.port) for name, value in headers.items()}) == 403
    assert statuses(shared.tuples)[0] == "open"


def test_a_write_without_an_origin_is_refused(shared: Server):
    body = json.dumps({"status": "kept"})
    assert shared.ask("/api/tuples/0", "POST", body.encode(), Content_Type="application/json")[0] == 403


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "localhost@evil.example", "", "127.0.0.1:x", "evil.example:80/127.0.0.1"]
)
@pytest.mark.parametrize("path", ["/", "/api/tuples/0", "/media/0/source"])
def test_reads_under_a_foreign_name_are_refused(shared: Server, host: str, path: str):
    status, _, body = shared.ask(path, Host=host)
    assert status in (400, 403) and b"of 0" not in body and b"PNG" not in body


def test_its_own_names_on_a_tunnels_port_are_taken(shared: Server):
    for host in ("localhost:9999", "127.0.0.1", "[::1]:80"):
        assert shared.ask("/api/index", Host=host)[0] == 200
    assert shared.post(1, "kept", Host="localhost:9999", Origin="http://localhost:9999") == 200
    assert statuses(shared.tuples)[1] == "kept"


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b"\xff", json.dumps({"status": "kept"}).encode(), b'"' + b"x" * 600_000 + b'"'])
def test_bodies_that_are_no_change_are_refused(shared: Server, body: bytes):
    status, _, _ = shared.ask("/api/tuples/0", "POST", body, Content_Type="application/json", Origin=shared.url.rstrip("/"))
    assert status == (413 if len(body) > 100_000 else 400)
    assert statuses(shared.tuples)[0] == "open"


@pytest.mark.parametrize("body", [b"[" * 100_000, b'{"texts": ' * 50_000, b'{"key": "k", "revision": ' + b"9" * 5000 + b"}"])
def test_bodies_that_no_reader_takes_are_bad_requests(shared: Server, body: bytes):
    status, _, said = shared.ask("/api/tuples/0", "POST", body, Content_Type="application/json", Origin=shared.url.rstrip("/"))
    assert status == 400 and said.startswith(b"not JSON: ") and len(said) > 20


@pytest.mark.parametrize("number", ["9" * 5000, "0" * 5000, "9" * 10, "1_0", "\u0663", "-0", "+0", "%00", "NaN", "0x0", "9" * 9])
def test_numbers_that_name_no_tuple(shared: Server, number: str):
    quoted = urllib.parse.quote(number, safe="%")
    bad = 400 if len(number) > 9 else 404
    for path in (f"/api/tuples/{quoted}", f"/media/{quoted}/source"):
        status, _, said = shared.ask(path)
        assert status == bad and (b"9 digits" in said) == (bad == 400)
    headers = {"Content_Type": "application/json", "Origin": shared.url.rstrip("/")}
    assert shared.ask(f"/api/tuples/{quoted}", "POST", {}, **headers)[0] == bad


@pytest.mark.parametrize("part", ["bytes=" + "9" * 5000 + "-", "bytes=-" + "9" * 5000, "bytes=0-" + "9" * 5000, "bytes=x-y", "=" * 99])
def test_parts_that_no_file_has(shared: Server, part: str):
    assert shared.ask("/media/0/source", Range=part)[0] in (200, 206, 400, 416)


# ---- requests that do not end


@pytest.fixture
def impatient(tuples: Path) -> Iterator[int]:
    """The port of a server of this process that waits half a second."""
    with Review(tuples) as review, socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(server_config(make_app(review, tuples.parent, patience=0.5), patience=0.5))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        yield listening.getsockname()[1]
        server.should_exit = True
        thread.join(PATIENCE)
        assert not thread.is_alive()


_HEAD = "POST /api/tuples/0 HTTP/1.1\r\nHost: 127.0.0.1:PORT\r\nOrigin: http://127.0.0.1:PORT\r\nContent-Type: application/json\r\n"
_GET = "GET /api/index HTTP/1.1\r\nHost: 127.0.0.1:PORT\r\n"


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        ("", b""),
        ("GET", b""),
        (_GET, b""),
        (_GET + "\r\n" + _GET, b"HTTP/1.1 200 "),
        (_HEAD + "Content-Length: 100\r\n\r\n", b"HTTP/1.1 408 "),
        (_HEAD + "Content-Length: 100\r\n\r\n{", b"HTTP/1.1 408 "),
        (_HEAD + "Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n", b"HTTP/1.1 408 "),
        (_GET + "Content-Length: 100\r\n\r\n{", b"HTTP/1.1 200 "),
        (_HEAD.replace("Origin", "Other") + "Content-Length: 100\r\n\r\n{", b"HTTP/1.1 403 "),
    ],
)
@pytest.mark.parametrize("dripping", [False, True])
def test_half_a_request_is_let_go_of(impatient: int, said: str, answer: bytes, dripping: bool):
    """20 at once; those that drip send a byte every tenth of a second."""
    begun = time.monotonic()
    open_ones = [socket.create_connection(("127.0.0.1", impatient), timeout=PATIENCE) for _ in range(20)]
    for one in open_ones:
        one.sendall(said.replace("PORT", str(impatient)).encode())
    left, got = list(open_ones), dict.fromkeys(open_ones, b"")
    while left:
        assert time.monotonic() - begun < 20, f"{len(left)} of 20 are still open"
        for one in select.select(left, [], [], 0.1)[0]:
            try:
                data = one.recv(1 << 16)
            except ConnectionError:
                data = b""
            got[one] += data
            if not data:
                left.remove(one)
        for one in left if dripping else ():
            with contextlib.suppress(ConnectionError):
                one.send(b"x")
    assert all(contents.startswith(answer) and (answer or not contents) for contents in got.values())
    for one in open_ones:
        one.close()
    connection = http.client.HTTPConnection("127.0.0.1", impatient, timeout=PATIENCE)
    connection.request("GET", "/api/index")
    assert connection.getresponse().status == 200
    connection.close()


def test_a_request_that_comes_slowly_but_in_time_is_answered_and_a_connection_is_used_again(impatient: int, tuples: Path):
    connection = http.client.HTTPConnection("127.0.0.1", impatient, timeout=PATIENCE)
    for _ in range(5):  # longer than the limit in all
        time.sleep(0.2)
        connection.request("GET", "/api/tuples/0")
        assert connection.getresponse().read().startswith(b"{")
    connection.close()
    with socket.create_connection(("127.0.0.1", impatient), timeout=PATIENCE) as slow:
        for part in (_GET[:20], _GET[20:], "Connection: close\r\n\r\n"):
            slow.sendall(part.replace("PORT", str(impatient)).encode())
            time.sleep(0.1)
        assert slow.recv(1 << 16).startswith(b"HTTP/1.1 200 ")


def test_a_body_that_breaks_off_is_no_defect_of_the_server(tuples: Path, serve: Callable[..., Server], capfd: pytest.CaptureFixture[str]):
    server = serve(tuples)
    with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE) as one:
        one.sendall((_HEAD + "Content-Length: 100\r\n\r\n{").replace("PORT", str(server.port)).encode())
    assert server.ask("/api/index")[0] == 200
    time.sleep(0.3)
    assert "Traceback" not in capfd.readouterr().err


def test_answers_forbid_guessing_and_other_sites(shared: Server):
    for path in ("/", "/media/0/source", "/nothing"):
        headers = shared.ask(path)[1]
        assert headers["x-content-type-options"] == "nosniff" and "default-src 'none'" in headers["content-security-policy"]
        assert headers["cross-origin-resource-policy"] == "same-origin" and "access-control-allow-origin" not in headers


def test_a_tiff_is_shown_as_png_and_files_are_sent_in_parts(shared: Server):
    _, headers, body = shared.ask("/media/3/source")
    assert headers["content-type"] == "image/png" and body.startswith(b"\x89PNG")
    status, _, part = shared.ask("/media/0/source", Range="bytes=1-3")
    assert (status, part) == (206, b"PNG")  # what seeking in a clip needs


def test_it_listens_on_loopback_unless_told(shared: Server):
    other = (
        subprocess.run(["hostname", "-I"], capture_output=True, text=True, check=False).stdout.split() if shutil.which("hostname") else []
    )
    for address in ["127.0.0.2", *other]:  # a loopback address that it does not listen on
        with pytest.raises(OSError):  # refused, or no route
            http.client.HTTPConnection(address, shared.port, timeout=5).connect()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--host", "0.0.0.0"], "--allow-host"),
        (["--host", "somewhere"], "not an address"),
        (["--port", "70000"], "from 0 to 65535"),
        (["--root", "nowhere"], "no such folder"),
        (["--export", "out.jsonl"], "nothing in it is kept"),
    ],
)
def test_what_cannot_be_done_is_said(tuples: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]):
    from dataset_tools.review import main

    with pytest.raises(ValueError, match=said):
        main([str(tuples), *arguments])


# ---- the page in a browser


def browser_path(playwright: Playwright) -> str | None:
    """The Chromium that is there: one that is named, one on the PATH, or the one that playwright has installed."""
    names = ("chromium", "chromium-browser", "google-chrome")
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    own = playwright.chromium.executable_path
    return found or (own if Path(own).is_file() else None)


def without_browser(reason: str) -> NoReturn:
    """Skip, or fail where a browser must be there."""
    if os.environ.get("BYG_REQUIRE_BROWSER"):
        pytest.fail(f"BYG_REQUIRE_BROWSER is set and there is {reason}")
    pytest.skip(f"the review page is not tested: {reason}")


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


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        found = browser_path(playwright)
        if found is None:
            without_browser("no Chromium on the PATH, at CHROMIUM or from `playwright install chromium`")
        launched = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"], timeout=PATIENCE * 1000)
        expect.set_options(timeout=PATIENCE * 1000)
        yield launched
        launched.close()


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
        for name in TEXTS:
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
    expect(second.page.locator("#notice")).to_contain_text("Instruction: of the second")
    expect(second.field("instruction")).to_have_value("of the first")
    assert on_disk(tuples)[0].texts["instruction"] == "of the first"
    second.page.click("#use-mine")
    expect(second.field("instruction")).to_have_value("of the second")
    second.saved()
    assert on_disk(tuples)[0].texts["instruction"] == "of the second"


def test_a_page_of_another_file_cannot_decide(tuples: Path, serve: Callable[..., Server], look: Callable[[Server], Window]):
    server = serve(tuples)
    window = look(server)
    server.kill()
    write_tuples(tuples.parent, [record(number) for number in (2, 3)])
    server.start()
    window.press("k")
    expect(window.page.locator("#notice")).to_contain_text("copy your text, then reload")
    assert statuses(tuples) == ["open", "open"]
