"""Any OpenAI-compatible server: vLLM, SGLang, `transformers serve`, hosted ones."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, suppress
from dataclasses import replace
from typing import Any, NoReturn
from urllib.parse import urlsplit

from byg_plugin.config.extras import require
from byg_plugin.documents import json_value
from byg_plugin.progress import Progress

from .backend import Answer, Chat, Refused, redact
from .completions import Completion, ServerError, TooLong
from .parsing import is_silent
from .settings import BackendSettings

DEFAULT_URL = "http://127.0.0.1:8000/v1"
_AGAIN = (408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529)
_NEVER = {
    401: "the key is missing or wrong: set the environment variable {key_env}",
    403: "the key in {key_env} may not use this model",
    404: "no such model or address: check --model and --base-url (it ends in /v1)",
    402: "the account has no credit left",
}
_LONGEST_WAIT = 60.0  # seconds between two attempts
_SHOWN = 300  # characters of a server's error
_MOST = 16 << 20  # bytes of a body or a line, and characters of an answer; memory must not depend on what a server sends
_ERROR = 64 << 10  # bytes of a body that is an error
_PARTING = 1.0  # seconds that a stream may take to end after its [DONE]
_TRIES = 3  # of one request whose answer has nothing in it, as long as no answer had
_PAUSE = 0.5  # seconds before it is asked again, in which others may be answered
_SILENT = 24  # such answers, and it is the server; an image has two requests, so at most four are rejected before


class _Again(Exception):
    """An attempt failed in a way that may pass; `after` is how many seconds the server asks to wait."""

    def __init__(self, message: str, after: float = 0.0):
        super().__init__(message)
        self.after = after


class OpenAIBackend:
    """Chat completions over HTTP with back-off. Each request waits alone: a slow one holds no other."""

    def __init__(self, settings: BackendSettings, *, proven: bool = False):
        for package in ("httpx", "tenacity"):
            require(package, 'backend = "openai"', "data")
        import httpx

        self.settings, self.model = settings, settings.model
        self._key = os.environ.get(settings.key_env, "")
        if not self._key.isascii() or any(char.isspace() for char in self._key):
            raise ValueError(f"${settings.key_env} holds blanks or letters that no key has; set it again")
        self._url = _checked_url(settings.base_url or os.environ.get("OPENAI_BASE_URL") or DEFAULT_URL)
        # Its INFO lines would name every request.
        for name in ("httpx", "httpcore"):
            logging.getLogger(name).setLevel(logging.WARNING)
        self._client = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            timeout=httpx.Timeout(settings.timeout, connect=min(30.0, settings.timeout)),
            limits=httpx.Limits(max_connections=settings.in_flight + 4, max_keepalive_connections=settings.in_flight + 4),
        )
        self._last_success = 0.0
        self._answered = asyncio.Event()
        if proven:
            self._answered.set()
        self._active = self._doubtful = 0
        self._hopeless = self._reported = self._spoke = False
        self._silent: list[Answer] = []

    async def complete(self, chat: Chat) -> Answer:
        """See `Backend`."""
        import tenacity

        started = time.monotonic()
        backoff = tenacity.wait_random_exponential(multiplier=0.5, max=_LONGEST_WAIT)

        def wait(state: tenacity.RetryCallState) -> float:
            asked = getattr(state.outcome.exception() if state.outcome else None, "after", 0.0)
            return max(backoff(state), min(asked, _LONGEST_WAIT))

        self._active += 1
        try:
            attempts = tenacity.AsyncRetrying(
                retry=tenacity.retry_if_exception_type(_Again),
                wait=wait,
                stop=tenacity.stop_after_delay(self.settings.retry_for),
                before_sleep=self._first_trouble,
                reraise=True,
            )
            answer: Answer = await attempts(self._attempt, chat)
            tries = 1
            while self._is_doubtful(answer) and tries < _TRIES:
                await asyncio.sleep(_PAUSE * tries)
                answer = await attempts(self._attempt, replace(chat, seed=chat.seed + tries))
                tries += 1
        except _Again as error:
            if self._last_success > started:  # the server answers others: it is this request
                raise Refused(f"the server failed on it for {time.monotonic() - started:.0f} s, last: {error}") from error
            raise ValueError(
                f"the server at {self._url} has answered nothing for {time.monotonic() - started:.0f} s, last: {error}; "
                f"nothing is lost: run the same command again when it does"
            ) from error
        except Refused as error:
            await self._if_others_are_answered(error)
            raise
        finally:
            self._active -= 1
        self._last_success = time.monotonic()
        self._answered.set()
        return answer

    def _is_doubtful(self, answer: Answer) -> bool:
        """Whether an answer has nothing in it and none had: a server that puts all of them elsewhere must not turn a whole data
        set into rejects.

        Raises:
            ValueError: there were many of them.
        """
        self._spoke = self._spoke or not is_silent(answer.text)
        if self._spoke:
            return False
        self._silent.append(answer)
        if len(self._silent) < _SILENT:
            return True
        remedy = (
            f"each ran into max_tokens = {self.settings.max_tokens}, by thinking that is not shown: raise --max-tokens"
            if all(silent.cut for silent in self._silent)
            else "it may take the answer for thinking or for a tool call and drop it: start it without its reasoning parser and tool "
            "parser (vLLM, SGLang: leave out --reasoning-parser and --tool-call-parser)"
        )
        raise ValueError(f"{self._url} answers, and {_SILENT} answers had no text in them, none had one; {remedy}")

    def _first_trouble(self, state: Any) -> None:
        """Say once that nothing has been answered: with a wrong address nothing else would be seen for `retry_for` seconds."""
        if self._answered.is_set() or self._reported:
            return
        self._reported = True
        Progress.write(
            f"{self._url}: {state.outcome.exception()}; trying again for {self.settings.retry_for:g} s (--retry-for)", sys.stderr
        )

    def scrub(self, text: str, chat: Chat) -> str:
        """See `Backend`."""
        return redact(text, [self._key], chat)

    async def close(self) -> None:
        """Close all connections."""
        await self._client.aclose()

    async def _attempt(self, chat: Chat) -> Answer:
        import httpx

        try:
            return await asyncio.wait_for(self._read(chat), self.settings.timeout)
        except (asyncio.TimeoutError, httpx.TimeoutException) as error:
            raise _Again(f"no answer within {self.settings.timeout:g} s") from error
        except httpx.RequestError as error:  # cut, or encoded as it does not say
            raise _Again(f"{type(error).__name__}: {self.scrub(str(error), chat)[:_SHOWN]}") from error

    async def _read(self, chat: Chat) -> Answer:
        """One answer, whole or streamed: servers send the one where the other was asked."""
        completion, ended = Completion(_MOST), False
        request = self._client.stream("POST", f"{self._url}/chat/completions", content=self._body(chat), headers=_JSON)
        async with request as response, aclosing(_lines(response)) as lines:
            retry_after = response.headers.get("retry-after")
            if response.status_code != 200:
                self._fail(response.status_code, retry_after, _message(await _beginning(lines)), chat)
            try:
                body = bytearray()
                async for line in lines:
                    if line.startswith(b"data:"):
                        if ended := (data := line[5:].strip()) == b"[DONE]":
                            break
                        self._add(completion, data, chat)
                    elif not completion.begun:
                        body += line + b"\n"
                        if len(body) > _MOST:
                            raise TooLong
                if ended:
                    with suppress(asyncio.TimeoutError):
                        await asyncio.wait_for(_drain(lines), _PARTING)
                elif not completion.begun:
                    self._add(completion, bytes(body), chat)
                    ended = True
            except ServerError as error:
                self._fail(error.status, retry_after, f"{error} (sent with HTTP 200)", chat)
            except TooLong as error:
                raise Refused(f"the answer has more than {_MOST >> 20} MiB") from error
        if not completion.begun:
            raise _Again("the server's answer is no chat completion: no choice in it")
        if completion.reason is None and not ended:
            raise _Again("the stream ended before the answer did")
        answer = completion.answer()
        if completion.reason == "content_filter" and is_silent(answer.text):
            raise Refused("the server's content filter keeps the answer back")
        return answer

    def _add(self, completion: Completion, data: bytes, chat: Chat) -> None:
        if not data.strip():
            return
        try:
            completion.add(json_value(data))
        except TooLong:
            raise
        except ValueError as error:
            shown = self.scrub(data.decode(errors="replace"), chat)[:_SHOWN]
            raise _Again(f"the server's answer is no chat completion: {shown}") from error

    def _body(self, chat: Chat) -> bytes:
        content: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": picture.url()}} for picture in chat.pictures]
        first: Any = [*content, {"type": "text", "text": chat.turns[0]}] if content else chat.turns[0]
        turns = [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(chat.turns)]
        turns[0] = {"role": "user", "content": first}
        settings = self.settings
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "system", "content": chat.system}, *turns],
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "max_tokens": settings.max_tokens,
            "seed": chat.seed,
        }
        if settings.stream:
            body["stream"] = True
        body |= settings.extra_body
        return json.dumps({name: value for name, value in body.items() if value is not None}).encode()

    def _fail(self, status: int, retry_after: str | None, message: str, chat: Chat) -> NoReturn:
        """Raise what a status means: for everybody, for this request, or for now."""
        said = f"HTTP {status}: {' '.join(self.scrub(message, chat).split())[:_SHOWN]}"
        if status in _NEVER:
            raise ValueError(f"{self._url}: {said}; {_NEVER[status].format(key_env=self.settings.key_env)}")
        if status in _AGAIN or status >= 500:
            raise _Again(said, _seconds(retry_after))
        if 300 <= status < 400:
            raise ValueError(f"{self._url}: {said}: it sends us elsewhere; give that address as --base-url")
        raise Refused(said)

    async def _if_others_are_answered(self, error: Refused) -> None:
        """Wait until it is known that the server takes requests like ours at all.

        A server that refuses everything (an option it does not know, a model without eyes) must not turn a whole data set
        into rejects.

        Raises:
            ValueError: nothing was ever answered and nothing is under way.
        """
        self._doubtful += 1
        try:
            while not self._answered.is_set() and not self._hopeless:
                self._hopeless = self._doubtful >= self._active
                with suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self._answered.wait(), 0.1)
        finally:
            self._doubtful -= 1
        if not self._answered.is_set():
            raise ValueError(
                f"{self._url} refuses every request, no image was rejected for it: {error}; is {self.model!r} a model for this, and "
                f"are --max-tokens and --extra-body what this server knows?"
            ) from error


_JSON = {"Content-Type": "application/json"}


async def _lines(response: Any) -> AsyncGenerator[bytes, None]:
    """The body at its line feeds alone; httpx also splits at U+2028 and the like, which an answer may hold.

    Raises:
        TooLong: a line does not end.
    """
    held = bytearray()
    async for chunk in response.aiter_bytes():
        *ended, rest = chunk.split(b"\n")
        for line in ended:
            yield bytes(held) + line
            held.clear()
        held += rest
        if len(held) > _MOST:
            raise TooLong
    if held:
        yield bytes(held)


async def _beginning(lines: AsyncIterator[bytes]) -> bytes:
    """As much of a body as an error's message needs."""
    body = bytearray()
    with suppress(TooLong):
        async for line in lines:
            body += line + b"\n"
            if len(body) > _ERROR:
                break
    return bytes(body)


async def _drain(lines: AsyncIterator[bytes]) -> None:
    """Read what is left, so that the connection can be used again."""
    async for _ in lines:
        pass


def _message(body: bytes) -> str:
    """The message inside an error's JSON, or the whole text."""
    text = body.decode(errors="replace")
    try:
        value = json_value(text)
    except ValueError:
        return text
    error = value.get("error", value) if isinstance(value, dict) else value
    return str(error.get("message", error)) if isinstance(error, dict) else str(error)


def _seconds(retry_after: str | None) -> float:
    try:
        return max(0.0, float(retry_after or 0))
    except ValueError:
        return 0.0  # a date: our own back-off will do


def _checked_url(url: str) -> str:
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if not good:
        raise ValueError(f"--base-url {url}: expected something like {DEFAULT_URL}")
    if parts.username or parts.password or parts.query:
        # Addresses are shown in errors.
        raise ValueError("--base-url holds a user, password or query: give the key in the environment instead (--key-env)")
    return url.rstrip("/")
