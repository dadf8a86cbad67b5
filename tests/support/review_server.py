"""The review page's server as a process, and what a test asks of it."""

from __future__ import annotations

import http.client
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from PIL import Image

from byg_plugin.data.rules import ROLES
from dataset_tools.review_page.items import Item, read_items
from dataset_tools.review_page.store import journal_path, read_decisions
from tests.support import ROOT

PATIENCE = 60  # seconds; a loaded machine starts a server slowly


def record(number: int, source: str = "", **fields: Any) -> dict[str, Any]:
    texts = {name: f"{name} of {number}" for name in ROLES}
    return {"source": source or f"{number}.png", **texts, "edit_type": ("add", "remove")[number % 2], **fields}


def write_tuples(folder: Path, records: list[dict[str, Any]]) -> Path:
    path = folder / "tuples.jsonl"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in records), encoding="utf-8")
    for entry in records:
        if re.fullmatch(r"\d+\.png", entry["source"]):
            Image.new("RGB", (64, 48), (40 * int(entry["source"][:-4]) % 256, 90, 160)).save(folder / entry["source"])
    return path


def on_disk(tuples: Path) -> list[Item]:
    return read_decisions(journal_path(tuples), read_items(tuples))[0]


def statuses(tuples: Path) -> list[str]:
    return [item.status for item in on_disk(tuples)]


class Server:
    """The command as a process of its own, always on the same port once it has one."""

    def __init__(self, tuples: Path, root: Path | None = None) -> None:
        self.tuples = tuples
        self._root = root or tuples.parent
        self.port = 0
        self.start()

    def command(self) -> list[str]:
        """The words after python, without the port."""
        return [str(ROOT / "dataset_tools" / "review.py"), str(self.tuples), "--root", str(self._root)]

    def start(self) -> None:
        words = [sys.executable, *self.command(), "--port", str(self.port)]
        self.process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)
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
