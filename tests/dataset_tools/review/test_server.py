"""What the review page's server refuses, and how it listens."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
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

import pytest
import uvicorn
from PIL import Image

from byg_plugin.local_page import guard, serving
from byg_plugin.local_page.wire import server_config
from dataset_tools.review_page.app import make_app
from dataset_tools.review_page.store import Review
from tests.support.review_server import PATIENCE, Server, record, statuses, write_tuples


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


def test_every_image_that_is_read_is_shown_and_can_be_kept(tmp_path: Path, serve: Callable[..., Server]):
    picture = Image.new("RGB", (8, 4), "red")
    formats = {"a.jfif": "JPEG", "b": "PNG", "c.ppm": "PPM", "d.tif": "TIFF"}
    if "AVIF" in Image.registered_extensions().values():
        formats["e.avif"] = "AVIF"
    for name, format_ in formats.items():
        picture.save(tmp_path / name, format_)
    server = serve(write_tuples(tmp_path, [record(number, name) for number, name in enumerate(formats)]))
    for index, (name, format_) in enumerate(formats.items()):
        status, headers, body = server.ask(f"/media/{index}/source")
        sent = "AVIF" if format_ == "AVIF" else "PNG"
        assert (status, headers["content-type"]) == (200, f"image/{sent.lower()}"), name
        with Image.open(io.BytesIO(body)) as shown:
            assert (shown.format, shown.size) == (sent, (8, 4)), name
        assert server.post(index, "kept") == 200, name


@pytest.mark.parametrize(
    "path",
    ["/media/../tuples.jsonl", "/media/0/..%2f..%2ftuples.jsonl", "/tuples.jsonl", "/media/0/1.png", "/media/99/source", "/media/-1/source"]
    + ["/page.html", "/static/page.js", "/..%2freview.py", "/media/source?file=/etc/passwd", "/api/tuples/99"],
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


@pytest.mark.parametrize("name", ["http://box:7860/", "box:7861", "", " box", "box/", "[::1]", "0::1", "b\u00fcro", "a..b"])
def test_a_name_that_no_browser_sends_is_refused_at_the_start(name: str):
    with pytest.raises(ValueError, match=r"^--allow-host .*give a bare name"):
        serving.listen("127.0.0.1", 0, ["box", name])


def test_names_and_addresses_that_browsers_send_are_taken():
    names = ["box", "Box.Local", "my-box_2.example.", "192.168.0.7", "::1", "fe80::a"]
    serving.listen("127.0.0.1", 0, names).close()
    for name in names:
        host = f"[{name}]" if ":" in name else name
        assert guard._host_name(f"{host}:7860") == name.lower()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--allow-host", "box:7860"], "--allow-host 'box:7860': .*give a bare name"),
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
