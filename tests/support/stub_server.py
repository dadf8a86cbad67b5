"""A small OpenAI-compatible server, run as a process: python -m tests.support.stub_server PLAN.json

Prints its port. PLAN: {"mode": ..., "seconds": pause before an answer, "log": file of one JSON line a request}. Modes:
good       a good answer each
corpus     the corpus of failure kinds, by the number in the caption; repair turns are answered well for even numbers
hostile    corpus, and of each number the first request meets 429, 500, a cut connection, HTML, silence, ...
echo       errors, answers and, of each fourth number, fields that repeat the key and the prompt
down, refuse, key, model   503, 400, 401, 404 each time

PLAN may have "shape": where an answer's text stands and how it ends, see SHAPES; "busy": each first request of a number gets
HTTP 200 with an error inside.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support.answer_corpus import FIELDS, KINDS
from tests.support.judge_corpus import KINDS as JUDGED
from tests.support.judge_corpus import scores_of

NAMES = list(KINDS)
SLOW = 7  # this number's first request of a hostile plan is never answered


# Messages that servers send for one text.
SHAPES: dict[str, Callable[[str], dict[str, Any]]] = {
    "content": lambda text: {"content": text, "reasoning_content": "hidden {}"},
    "reasoning_content": lambda text: {"content": None, "reasoning_content": text},
    "tool_calls": lambda text: {"content": None, "tool_calls": [{"index": 0, "function": {"name": "answer", "arguments": text}}]},
    "parts": lambda text: {"content": [{"type": "text", "text": text[:9]}, {"type": "text", "text": text[9:]}]},
    "silent": lambda text: {"content": None},
}


def kind_of(number: int) -> str:
    return NAMES[number % len(NAMES)]


def good(number: int, offered: list[str]) -> dict[str, str]:
    texts = (
        offered[number % len(offered)],
        f"a red car number {number} on a wet street",
        f"paint car number {number} blue",
        f"a photo of a blue car number {number} on a wet street",
        f"change the color of car number {number} to red",
    )
    return dict(zip(FIELDS, texts, strict=True))


class Server:
    def __init__(self, plan: dict[str, Any]):
        self.plan = plan
        self.seen: dict[int, int] = {}
        self.described = 0
        self.log = open(plan["log"], "a", encoding="utf-8") if plan.get("log") else None  # noqa: SIM115

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                length = int(re.search(r"content-length: (\d+)", head, re.IGNORECASE)[1])
                body = json.loads(await reader.readexactly(length))
                key = (re.search(r"authorization: Bearer (\S+)", head, re.IGNORECASE) or [None, None])[1]
                if not await self.answer(body, key, writer):
                    break
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def answer(self, body: dict[str, Any], key: str | None, writer: asyncio.StreamWriter) -> bool:
        turns = body["messages"]
        asked = turns[1]["content"]
        text = asked if isinstance(asked, str) else asked[-1]["text"]
        number = int((re.search(r"(?:number|instruction) (\d+)", text) or [0, 0])[1])
        offered = re.findall(r'^- "(\w+)": (?!the|one)', text, re.MULTILINE) or ["color_change"]
        repair = len(turns) > 2
        attempt = self.seen[number] = self.seen.get(number, 0) + 1
        if self.log:
            entry = {
                "number": number,
                "turns": len(turns),
                "key": key,
                "offered": offered,
                "last": turns[-1]["content"] if repair else None,
                "text": text,
                "images": 0 if isinstance(asked, str) else len(asked) - 1,
                "options": {name: value for name, value in body.items() if name != "messages"},
            }
            self.log.write(json.dumps(entry) + "\n")
            self.log.flush()
        mode = self.plan["mode"]
        kinds, kind = KINDS, kind_of(number)
        if '"score": [' in text:
            kinds, kind = JUDGED, list(JUDGED)[number % len(JUDGED)]
            fields = {"reasoning": f"edit number {number}", "score": self.plan.get("scores") or scores_of(number, text)}
        elif "frames of one video" in text:
            style = ("a cartoon", "Photorealistic", "3D-CGI")[self.described % 3]
            self.described += 1
            fields = {"caption": f"a ball rolls over table {self.described}", "style": style}
        elif "Rewrite this caption" in text:
            hint = "cartoon " if number % 7 == 0 or (number % 5 == 0 and not repair) else ""
            fields = {"caption": f"A {hint}dog number {number} runs on a beach."}
        else:
            fields = good(number, offered)
        if self.plan.get("seconds"):
            await asyncio.sleep(self.plan["seconds"])
        if mode in ("down", "refuse", "key", "model"):
            status = {"down": 503, "refuse": 400, "key": 401, "model": 404}[mode]
            return error(writer, status, f"no: {key} {text}")
        if mode == "echo":
            if number % 4 == 0 and not repair:
                return error(writer, 400, f"bad request by {key}: {text}")
            if number % 4 == 3:
                name = "src_caption" if "src_caption" in fields else "caption"
                fields[name] += f" {key}" if number % 8 == 3 else " " + text.split("\n")[0]
            said = f"<think>My key is {key}, I was told: {text}</think>"
            return reply(writer, said + ("no json" if number % 4 == 1 else json.dumps(fields)), body)
        if mode == "hostile" and attempt == 1:
            fault = number % 8
            if number == SLOW:
                await asyncio.sleep(3600)
            if fault == 0:
                return error(writer, 429, "slow down", "Retry-After: 0.2\r\n")
            if fault == 1:
                return error(writer, 500, "internal")
            if fault == 2:
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 900\r\n\r\n" + b'{"choices": [')
                return False
            if fault == 3:
                return False
            if fault == 4:
                return send(writer, 200, b"<html><body>gateway</body></html>")
            if fault == 5:
                await asyncio.sleep(0.3)
            if fault == 6 and body.get("stream"):
                stream(writer, "<think>half an ", cut=True)
                return False
        if self.plan.get("busy") and attempt == 1:
            busy = {"error": {"message": "busy", "code": 503}}
            return send(writer, 200, f"data: {json.dumps(busy)}\n\n".encode() if body.get("stream") else json.dumps(busy).encode())
        make, refusal = kinds[kind]
        content = "<think>hm</think>" + json.dumps(fields)
        if mode != "good" and (refusal is None or not repair or number % 2):
            content = make(fields)
        return reply(writer, content, body, self.plan.get("shape", "content"))


def reply(writer: asyncio.StreamWriter, content: str, body: dict[str, Any], shape: str = "content") -> bool:
    message = {"role": "assistant", **SHAPES[shape](content)}
    if body.get("stream") and shape == "content":
        stream(writer, content)
        return True
    if body.get("stream"):
        choice = {"index": 0, "delta": message, "finish_reason": None}
        return send(writer, 200, f"data: {json.dumps({'choices': [choice]})}\n\ndata: [DONE]\n\n".encode())
    return send(writer, 200, json.dumps({"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}).encode())


def stream(writer: asyncio.StreamWriter, content: str, cut: bool = False) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")

    def event(data: str) -> None:
        line = f"data: {data}\n\n".encode()
        writer.write(f"{len(line):x}\r\n".encode() + line + b"\r\n")

    for start in range(0, len(content), 7):
        event(json.dumps({"choices": [{"index": 0, "delta": {"content": content[start : start + 7]}, "finish_reason": None}]}))
    if cut:
        return
    event(json.dumps({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}))
    event("[DONE]")
    writer.write(b"0\r\n\r\n")


def error(writer: asyncio.StreamWriter, status: int, message: str, headers: str = "") -> bool:
    return send(writer, status, json.dumps({"error": {"message": message, "type": "x"}}).encode(), headers)


def send(writer: asyncio.StreamWriter, status: int, body: bytes, headers: str = "") -> bool:
    writer.write(f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\n{headers}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    return True


async def main(plan: dict[str, Any]) -> None:
    # Bodies hold whole images in one line.
    server = await asyncio.start_server(Server(plan).handle, "127.0.0.1", 0, limit=1 << 24)
    print(server.sockets[0].getsockname()[1], flush=True)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
