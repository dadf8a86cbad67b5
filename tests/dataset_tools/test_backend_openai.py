"""The client of OpenAI-compatible servers against raw responses: where an answer may stand, how it may end, and errors sent as answers."""

from __future__ import annotations

import asyncio
import gzip
import json
import re
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, TypeAlias

import pytest

from dataset_tools import backend_openai
from dataset_tools.backend import Answer, Chat, Refused
from dataset_tools.backend_openai import OpenAIBackend
from dataset_tools.completions import Completion, NoCompletion, TooLong
from dataset_tools.settings import BackendSettings

TEXT = '{"caption": "a red car on a wet street",\u2028 "style": "photo"}'
DRAFT = '<think>{"caption": "draft"}</think>'
OTHER = "It is a picture of a {red} car."
Raw: TypeAlias = bytes | Callable[[dict[str, Any]], bytes]


@pytest.fixture(autouse=True)
def without_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend_openai, "_PAUSE", 0.0)


def sent(body: bytes, kind: str = "application/json", status: int = 200, headers: str = "") -> bytes:
    return f"HTTP/1.1 {status} X\r\nContent-Type: {kind}\r\n{headers}Content-Length: {len(body)}\r\n\r\n".encode() + body


def whole(message: Any, reason: str | None = "stop", **more: Any) -> bytes:
    return sent(json.dumps({"choices": [{"index": 0, "message": message, "finish_reason": reason}], **more}, ensure_ascii=False).encode())


def events(*values: Any, done: bool = True) -> bytes:
    lines = [value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for value in [*values, *["[DONE]"] * done]]
    return sent("".join(f": ping\n\ndata: {line}\n\n" for line in lines).encode(), "text/event-stream")


def deltas(message: dict[str, Any], reason: str | None = "stop", **choice: Any) -> list[Any]:
    """A message in pieces, as servers stream it."""
    made: list[dict[str, Any]] = [{"role": "assistant", "content": None if message.get("content") is None else ""}]
    for name, value in message.items():
        if name == "tool_calls":
            for index, call in enumerate(value):
                function = call["function"]
                made.append({"tool_calls": [{"index": index, "id": "c", "function": {"name": function["name"], "arguments": ""}}]})
                text = function["arguments"] if isinstance(function["arguments"], str) else json.dumps(function["arguments"])
                made += [{"tool_calls": [{"index": index, "function": {"arguments": text[k : k + 5]}}]} for k in range(0, len(text), 5)]
        elif isinstance(value, list):
            made += [{name: [part]} for part in value]
        elif isinstance(value, str):
            made += [{name: value[k : k + 5]} for k in range(0, len(value), 5)]
    chunks: list[Any] = [{"choices": [{"index": 0, "delta": delta, "finish_reason": None, **choice}]} for delta in made]
    return [*chunks, {"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]}, {"choices": [], "usage": {"total_tokens": 3}}]


def ask(responses: Sequence[Raw], times: int = 1, *, stream: bool = False, **changes: Any) -> tuple[list[Any], list[dict[str, Any]]]:
    """What requests come to, one after another (or all at once with in_flight), and the bodies that the server got.

    The last response is repeated.
    """
    bodies: list[dict[str, Any]] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                found = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
                assert found
                bodies.append(json.loads(await reader.readexactly(int(found[1]))))
                response = responses[min(len(bodies), len(responses)) - 1]
                writer.write(response if isinstance(response, bytes) else response(bodies[-1]))
                await writer.drain()
        except (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
            pass
        finally:
            writer.close()

    async def main() -> list[Any]:
        server = await asyncio.start_server(handle, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        limits = {"timeout": 20.0, "retry_for": 1.0, "in_flight": 1, **changes}
        backend = OpenAIBackend(BackendSettings(base_url=url, model="m", stream=stream, **limits))
        chats = [Chat(system="s", turns=(f"what is it? {number}",), seed=number) for number in range(times)]
        got: list[Any] = []
        try:
            if limits["in_flight"] > 1:
                return list(await asyncio.gather(*map(backend.complete, chats), return_exceptions=True))
            for chat in chats:
                try:
                    got.append(await backend.complete(chat))
                except (Refused, ValueError) as error:
                    got.append(error)
            return got
        finally:
            await backend.close()
            server.close()

    return asyncio.run(main()), bodies


def call(arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "answer", "arguments": arguments}}


MESSAGES: dict[str, tuple[dict[str, Any], str]] = {
    "content": ({"content": TEXT}, TEXT),
    "content beside thinking": ({"content": TEXT, "reasoning_content": DRAFT, "reasoning": DRAFT}, TEXT),
    "reasoning_content": ({"content": None, "reasoning_content": TEXT}, TEXT),
    "reasoning": ({"content": None, "reasoning": TEXT}, TEXT),
    "both of them": ({"content": "", "reasoning": TEXT, "reasoning_content": TEXT}, TEXT),
    "blank content": ({"content": " \n", "reasoning_content": DRAFT + TEXT}, DRAFT + TEXT),
    "thinking alone": ({"content": None, "reasoning": OTHER, "tool_calls": []}, f"<think>{OTHER}</think>"),
    "tool call": ({"content": None, "tool_calls": [call(TEXT)]}, TEXT),
    "tool call with thinking": ({"content": "", "reasoning_content": DRAFT, "tool_calls": [call(TEXT)]}, TEXT),
    "two tool calls": ({"content": None, "tool_calls": [call(TEXT), call("{}")]}, TEXT + "\n{}"),
    "tool call of an object": ({"content": None, "tool_calls": [call({"caption": "a"})]}, '{"caption": "a"}'),
    "refusal": ({"content": None, "refusal": "I will not."}, "I will not."),
    "parts": ({"content": [{"type": "text", "text": TEXT[:9]}, {"type": "text", "text": TEXT[9:]}]}, TEXT),
    "parts that are texts": ({"content": [TEXT[:9], TEXT[9:], None, 3]}, TEXT),
    "parts with thinking": (
        {"content": [{"type": "thinking", "thinking": [{"type": "text", "text": DRAFT}]}, {"type": "text", "text": TEXT}]},
        TEXT,
    ),
    "parts of thinking alone": ({"content": [{"type": "thinking", "thinking": [{"type": "text", "text": TEXT}]}]}, TEXT),
}


@pytest.mark.parametrize("name", MESSAGES)
@pytest.mark.parametrize("way", ["whole", "streamed", "whole though a stream was asked", "streamed though none was asked", "one event"])
def test_the_answer_is_read_wherever_it_stands(name: str, way: str) -> None:
    message, text = MESSAGES[name]
    response = whole(message) if way.startswith("whole") else events(*deltas(message))
    if way == "one event":
        response = events({"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]})
    (answer,), bodies = ask([response], stream=way in ("streamed", "whole though a stream was asked", "one event"))
    assert answer == Answer(text=text)
    assert len(bodies) == (backend_openai._TRIES if name == "thinking alone" else 1)


def test_an_object_that_the_server_has_read_already_is_taken() -> None:
    (answer,), _ = ask([whole({"content": {"type": "add", "caption": "caf\u00e9"}})])
    assert json.loads(answer.text) == {"type": "add", "caption": "caf\u00e9"}


@pytest.mark.parametrize("stream", [False, True])
def test_thinking_that_was_cut_off_is_no_answer(stream: bool) -> None:
    message = {"content": None, "reasoning_content": TEXT}
    (answer,), _ = ask([events(*deltas(message, "length")) if stream else whole(message, "length")], stream=stream)
    assert answer == Answer(text=f"<think>{TEXT}", cut=True)


def test_of_several_choices_the_first_is_read() -> None:
    other = [{"choices": [{"index": 1, "delta": {"content": "x"}, "finish_reason": "stop"}]}]
    streamed = [event for pair in zip(deltas({"content": TEXT}), other * 99, strict=False) for event in pair]
    assert ask([events(*streamed)], stream=True)[0] == [Answer(text=TEXT)]


ENDINGS: dict[str, tuple[bytes, bool]] = {
    "[DONE] without a finish_reason": (events(*deltas({"content": TEXT}, None)), True),
    "a finish_reason without [DONE]": (events(*deltas({"content": TEXT}), done=False), True),
    "whole without a finish_reason": (whole({"content": TEXT}, None), True),
    "neither": (events(*deltas({"content": TEXT}, None), done=False), False),
    "[DONE] alone": (events(), False),
    "nothing": (sent(b""), False),
    "no choice": (sent(b'{"choices": []}'), False),
    "no message": (sent(b'{"choices": [{"message": 3}]}'), False),
    "choices that are none": (sent(b'{"choices": {"message": {"content": "{}"}}}'), False),
    "nested without end": (sent(b'{"choices": ' + b"[" * 100_000), False),
    "deep content": (sent(b'{"choices": [{"message": {"content": ' + b"[" * 3000 + b"]" * 3000 + b"}}]}"), False),
    "a number of 5,000 digits": (events('{"choices": ' + "1" * 5000 + "}"), False),
    "bad gzip": (sent(b"no gzip", headers="Content-Encoding: gzip\r\n"), False),
    "gzip": (sent(gzip.compress(whole({"content": TEXT}).partition(b"\r\n\r\n")[2]), headers="Content-Encoding: gzip\r\n"), True),
}


@pytest.mark.parametrize("name", ENDINGS)
@pytest.mark.parametrize("stream", [False, True])
def test_what_ends_an_answer(name: str, stream: bool) -> None:
    response, good = ENDINGS[name]
    (answer,), bodies = ask([response, whole({"content": "again"})], stream=stream, retry_for=20.0)
    assert answer == Answer(text=TEXT if good else "again")
    assert len(bodies) == (1 if good else 2)


def test_a_stream_that_stays_open_behind_its_end_is_over() -> None:
    def open_end(_: dict[str, Any]) -> bytes:
        return events(*deltas({"content": TEXT}, None)).replace(b"Content-Length: ", b"Content-Length: 9")

    (answer,), _ = ask([open_end], stream=True, timeout=10.0)
    assert answer == Answer(text=TEXT)


ERRORS: dict[str, tuple[Any, str]] = {
    "a code": ({"error": {"message": "slow down", "code": 429}}, "again"),
    "a code as text": ({"error": {"message": "slow down", "code": "503"}}, "again"),
    "an unknown code": ({"error": {"message": "1301", "code": 1301}}, "again"),
    "a text": ({"error": "overloaded"}, "again"),
    "a type": ({"error": {"message": "later", "type": "rate_limit_error"}}, "again"),
    "bare": ({"object": "error", "message": "engine died", "code": 500}, "again"),
    "in the choice": ({"choices": [{"index": 0, "message": {"content": TEXT}, "error": {"code": 502, "message": "gone"}}]}, "again"),
    "finish_reason": ({"choices": [{"index": 0, "message": {"content": TEXT}, "finish_reason": "error"}]}, "again"),
    "beside choices": ({"error": {"code": 502, "message": "gone"}, "choices": [{"index": 0, "message": {"content": TEXT}}]}, "again"),
    "nested without end": ('{"error": {"message": ' + "[" * 3000 + "]" * 3000 + "}}", "again"),
    "a wrong key": ({"error": {"message": "who?", "code": "invalid_api_key", "type": "invalid_request_error"}}, "OPENAI_API_KEY"),
    "a wrong model": ({"error": {"message": "what?", "type": "NotFoundError", "code": 404}}, "check --model"),
    "no credit": ({"error": {"message": "pay", "type": "insufficient_quota"}}, "no credit"),
    "a bad request": ({"error": {"message": "too many tokens", "code": 400}}, "refuses every request"),
    "its words": ({"error": {"message": "too many tokens", "type": "BadRequestError", "code": None}}, "refuses every request"),
}


@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.parametrize("stream", [False, True])
def test_an_error_sent_as_an_answer_counts_as_the_status_it_names(name: str, stream: bool) -> None:
    value, outcome = ERRORS[name]
    plain = value if isinstance(value, str) else json.dumps(value)
    begun = deltas({"content": TEXT}, None)[:3]
    response = events(*begun, plain.replace('"message": {"content', '"delta": {"content'), done=False) if stream else sent(plain.encode())
    (answer,), bodies = ask([response, whole({"content": "again"})], stream=stream, retry_for=20.0)
    if outcome == "again":
        assert answer == Answer(text="again") and len(bodies) == 2
    else:
        assert isinstance(answer, ValueError) and outcome in str(answer) and len(bodies) == 1
        assert "sent with HTTP 200" in str(answer)


def test_an_error_null_is_none() -> None:
    assert ask([whole({"content": TEXT}, error=None)])[0] == [Answer(text=TEXT)]


def test_a_wait_that_the_error_asks_for_is_kept() -> None:
    started = time.monotonic()
    (answer,), _ = ask([sent(b'{"error": {"code": 429}}', headers="Retry-After: 2\r\n"), whole({"content": TEXT})], retry_for=20.0)
    assert answer == Answer(text=TEXT) and time.monotonic() - started > 1.9


@pytest.mark.parametrize(
    ("message", "reason", "remedy"),
    [
        ({"content": None}, "stop", "--reasoning-parser and --tool-call-parser"),
        ({"content": "", "tool_calls": []}, "tool_calls", "--reasoning-parser and --tool-call-parser"),
        ({"content": None, "reasoning": OTHER}, "stop", "--reasoning-parser and --tool-call-parser"),
        ({"content": None}, "length", "raise --max-tokens"),
    ],
)
@pytest.mark.parametrize("in_flight", [1, 32])
def test_a_server_whose_answers_are_all_empty_stops_the_run(message: dict[str, Any], reason: str, remedy: str, in_flight: int) -> None:
    answers, bodies = ask([whole(message, reason)], 32, in_flight=in_flight)
    stopped = [answer for answer in answers if isinstance(answer, ValueError)]
    assert stopped and all(remedy in str(error) for error in stopped)
    rejected = answers.index(stopped[0])
    assert rejected <= backend_openai._SILENT // backend_openai._TRIES
    assert in_flight == 1 or all(isinstance(answer, ValueError) for answer in answers)
    assert in_flight > 1 or len({body["seed"] for body in bodies[: backend_openai._TRIES]}) == backend_openai._TRIES


def test_a_few_empty_answers_stop_nothing() -> None:
    def some(body: dict[str, Any]) -> bytes:
        return whole({"content": None if body["messages"][1]["content"].endswith("? 0") else TEXT})

    answers, bodies = ask([some], 30)
    assert [answer.text for answer in answers] == ["", *[TEXT] * 29] and len(bodies) == 29 + backend_openai._TRIES

    def late(body: dict[str, Any]) -> bytes:
        return whole({"content": TEXT if body["messages"][1]["content"].endswith("? 0") else None})

    answers, bodies = ask([late], 60)  # the server can speak: each is that image's
    assert [answer.text for answer in answers] == [TEXT, *[""] * 59] and len(bodies) == 60


def test_a_content_filter_refuses_one_request() -> None:
    answers, _ = ask([whole({"content": TEXT}), whole({"content": None}, "content_filter")], 2)
    assert answers[0].text == TEXT and isinstance(answers[1], Refused) and "content filter" in str(answers[1])


@pytest.mark.parametrize(
    "response",
    [
        sent(b"x" * 300_000),
        sent(b"x\n" * 150_000),
        whole({"content": "x" * 300_000}),
        events(*[{"choices": [{"index": 0, "delta": {"content": "x" * 1000}}]}] * 300),
        events(*[{"choices": [{"index": 0, "delta": {"tool_calls": [{"index": 0, "function": {"arguments": "x" * 1000}}]}}]}] * 300),
    ],
    ids=["a line", "lines", "a body", "events", "arguments"],
)
def test_an_answer_without_end_is_not_kept(response: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend_openai, "_MOST", 200_000)
    answers, bodies = ask([whole({"content": TEXT}), response], 2)
    assert isinstance(answers[1], Refused) and "more than" in str(answers[1]) and len(bodies) == 2


def test_an_error_without_end_counts_by_its_status(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend_openai, "_MOST", 200_000)
    for body in (b"x" * 300_000, b"x\n" * 150_000):
        (answer,), bodies = ask([sent(body, status=503), whole({"content": TEXT})], retry_for=20.0)
        assert answer == Answer(text=TEXT) and len(bodies) == 2
        (answer,), _ = ask([sent(body, status=404)])
        assert isinstance(answer, ValueError) and len(str(answer)) < 1000


def test_a_stream_that_never_ends_is_given_up_at_the_timeout() -> None:
    ping = {"choices": [{"index": 0, "delta": {}}]}
    endless = events(*[ping] * 10, done=False).replace(b"Content-Length: ", b"Content-Length: 99")
    (answer,), _ = ask([endless], stream=True, timeout=1.0, retry_for=0.5)
    assert isinstance(answer, ValueError) and "no answer within 1 s" in str(answer)


def test_nesting_that_the_reader_takes_and_python_does_not_is_no_completion() -> None:
    deep: Any = "x"
    for _ in range(5000):
        deep = [deep]
    for value in ({"choices": [{"message": {"content": deep}}]}, {"error": deep}, {"error": {"message": deep}}):
        with pytest.raises(NoCompletion):
            Completion(1000).add(value)


def test_a_line_without_end_is_given_up_while_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend_openai, "_MOST", 10_000)
    sent_chunks = 0

    class Endless:
        async def aiter_bytes(self) -> AsyncIterator[bytes]:
            nonlocal sent_chunks
            while sent_chunks < 1000:
                sent_chunks += 1
                yield b"x" * 1000

    async def read() -> None:
        async for _ in backend_openai._lines(Endless()):
            pass

    with pytest.raises(TooLong):
        asyncio.run(read())
    assert sent_chunks == 11
