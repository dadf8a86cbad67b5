"""What an OpenAI-compatible server sends back, whole or in pieces: the answer wherever it stands, the error wherever it stands."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from typing import Any

from .backend import Answer

# Where a server's reasoning parser puts what it takes for thinking.
_THINKING = ("reasoning_content", "reasoning", "thinking")
_OBJECT = re.compile(r"\{\s*[\"'“]")
_CUT = ("length", "max_tokens")
# What the words for errors amount to as an HTTP status, without case and separators; others are the server's own trouble.
_STATUS = {
    **dict.fromkeys(("badrequest", "badrequesterror", "invalidrequest", "invalidrequesterror", "invalidargument"), 400),
    **dict.fromkeys(("contextlengthexceeded", "contentfilter", "contentpolicyviolation"), 400),
    **dict.fromkeys(("invalidapikey", "authenticationerror", "unauthorized", "unauthenticated"), 401),
    **dict.fromkeys(("insufficientquota", "insufficientcredits", "billingerror", "paymentrequired"), 402),
    **dict.fromkeys(("forbidden", "permissiondenied", "permissiondeniederror", "permissionerror"), 403),
    **dict.fromkeys(("modelnotfound", "notfound", "notfounderror"), 404),
    **dict.fromkeys(("ratelimit", "ratelimiterror", "ratelimitexceeded", "resourceexhausted", "toomanyrequests"), 429),
}
_TROUBLE = 500


class ServerError(Exception):
    """The server's error, sent as if it were an answer; `status` is the HTTP status that it amounts to."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class NoCompletion(ValueError):
    """What came is no chat completion."""


class TooLong(ValueError):
    """The answer is longer than any that is meant."""


class Completion:
    """One answer, put together from a whole body or from the events of a stream.

    Args:
        most: characters that are kept.

    Attributes:
        begun: whether a choice has come.
        reason: the finish_reason, once it has come.
    """

    def __init__(self, most: int):
        self._room = most
        self._texts: defaultdict[str, list[str]] = defaultdict(list)
        self._calls: defaultdict[int, list[str]] = defaultdict(list)
        self.begun = False
        self.reason: str | None = None

    def add(self, value: Any) -> None:
        """A body, or an event of a stream.

        Raises:
            ServerError: it says that the server failed.
            NoCompletion: it is neither that nor a part of an answer.
            TooLong: there is no room for it.
        """
        try:
            self._add(value)
        except RecursionError:
            raise NoCompletion from None

    def _add(self, value: Any) -> None:
        if error := _error_in(value):
            raise error
        choices = value.get("choices") if isinstance(value, dict) else value
        if not isinstance(choices, list | None) or not all(isinstance(choice, dict) for choice in choices or ()):
            raise NoCompletion
        for choice in choices or ():
            if choice.get("index") in (0, None):  # extra_body may ask for several
                self._add_choice(choice)

    def _add_choice(self, choice: dict[str, Any]) -> None:
        self.begun = True
        if error := choice.get("error"):
            raise _server_error(error)
        reason = choice.get("finish_reason")
        if reason == "error":
            raise ServerError(_TROUBLE, "the server broke the answer off (finish_reason = error)")
        self.reason = reason if isinstance(reason, str) else self.reason
        message = choice.get("delta") or choice.get("message") or {}
        if not isinstance(message, dict):
            raise NoCompletion
        for name in ("content", "refusal", *_THINKING):
            self._add_text(name, message.get(name))
        calls = message.get("tool_calls")
        for number, call in enumerate(calls if isinstance(calls, list) else [{"function": message.get("function_call")}]):
            function = call.get("function") if isinstance(call, dict) else None
            if isinstance(function, dict):
                index = call.get("index")
                self._keep(self._calls[index if isinstance(index, int) else number], _plain(function.get("arguments")))

    def _add_text(self, name: str, value: Any) -> None:
        if not isinstance(value, list):
            self._keep(self._texts[name], _plain(value))
            return
        for part in value:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind in ("thinking", "reasoning"):
                self._keep(self._texts["reasoning"], _plain(part.get(kind, part.get("text"))))
            else:
                self._keep(self._texts[name], _plain(part.get("text") if kind else part))

    def _keep(self, where: list[str], text: str) -> None:
        self._room -= len(text)
        if self._room < 0:
            raise TooLong
        where.append(text)

    def answer(self) -> Answer:
        """What was said. Only where there is no content: what a parser took for a tool call, a refusal, or for thinking."""
        said = {name: "".join(parts) for name, parts in self._texts.items()}
        calls = "\n".join("".join(parts) for _, parts in sorted(self._calls.items()))
        cut = self.reason is not None and self.reason.lower() in _CUT
        text = next((text for text in (said.get("content", ""), calls, said.get("refusal", "")) if text.strip()), "")
        thinking = next((said[name] for name in _THINKING if said.get(name, "").strip()), "")
        if not text and thinking:
            # One that was cut off, or holds no object, is what it says it is.
            text = f"<think>{thinking}" if cut else thinking if _OBJECT.search(thinking) else f"<think>{thinking}</think>"
        return Answer(text=text, cut=cut)


def _error_in(value: Any) -> ServerError | None:
    if not isinstance(value, dict):
        return None
    if error := value.get("error"):
        return _server_error(error)
    named = "error" in (value.get("object"), value.get("type")) or ("message" in value and {"code", "status"} & value.keys())
    return _server_error(value) if named and not value.get("choices") else None


def _server_error(error: Any) -> ServerError:
    if not isinstance(error, dict):
        return ServerError(_TROUBLE, str(error))
    return ServerError(_status(error), str(error.get("message") or error))


def _status(error: dict[str, Any]) -> int:
    for name in ("code", "status", "status_code", "type"):
        word = re.sub(r"[^a-z0-9]", "", str(error.get(name))[:60].casefold())
        if re.fullmatch(r"[45]\d\d", word):
            return int(word)
        if word in _STATUS:
            return _STATUS[word]
    return _TROUBLE


def _plain(value: Any) -> str:
    """A text of what may be one, a list of parts, or an object that a server has parsed already."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return "".join(map(_plain, value))
    if isinstance(value, dict):
        return _plain(value["text"]) if isinstance(value.get("text"), str) else json.dumps(value, ensure_ascii=False)
    return ""
