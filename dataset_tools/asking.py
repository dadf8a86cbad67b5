"""One input, one question, at most one repair turn, one record: what all tools that ask a model have in common."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from byg_plugin.data.rules import Finding

from . import prompts
from .backend import Answer, Backend, Chat, Refused
from .parsing import Unparsable, Values, parse_answer, without_thinking
from .pool import Outcome
from .settings import BackendSettings

_QUOTED = 4000  # characters of a first answer that the repair turn shows to the model again
Texts = dict[str, str]


@dataclass(kw_only=True)
class Attempt:
    """One input on its way to its record.

    Attributes:
        field: of the record that names the input.
        name: of the input.
        answers: what the model has said so far, without keys and prompts.
        side: more of what the record's `meta` says.
        prompt_version: of what is asked.
    """

    settings: BackendSettings
    field: str
    name: str
    seed: int
    answers: list[str] = field(default_factory=list)
    side: dict[str, Any] = field(default_factory=dict)
    prompt_version: str = prompts.VERSION
    started: float = field(default_factory=time.monotonic)

    async def ask(
        self,
        backend: Backend,
        chat: Chat,
        fields: Sequence[str],
        check: Callable[[Texts], Sequence[Finding]],
        accept: Callable[[Texts, Sequence[Finding], bool], Outcome],
        values: Values | None = None,
    ) -> Outcome:
        """Ask, and ask once more for what breaks a hard rule or cannot be read.

        Args:
            fields: of the object that the answer must be.
            check: findings on the fields' texts, which it may normalise.
            accept: the outcome of texts, their findings, and whether they were repaired.
            values: see `parse_answer`.

        Raises:
            ValueError: no input could be served (the server is gone, the key is wrong).
        """
        repaired = False
        while True:
            try:
                answer = await backend.complete(chat)
            except Refused as error:
                return self.rejected("server", "server", backend.scrub(str(error), chat))
            self.answers.append(backend.scrub(answer.text, chat))
            texts, findings = self._read(answer, fields, values)
            if texts is not None:
                findings = _repeats(texts, backend, chat) or list(check(texts))
            broken = [finding for finding in findings if finding.hard]
            if texts is not None and not broken:
                return accept(texts, findings, repaired)
            if repaired:
                said = "; ".join(backend.scrub(finding.message, chat) for finding in broken)
                return self.rejected("parse" if texts is None else "rules", broken[0].reason, said)
            repaired = True
            chat = chat.then(_spoken(answer.text), prompts.repair_request(broken))

    def accepted(self, record: Mapping[str, Any], label: str, findings: Sequence[Finding] = (), repaired: bool = False) -> Outcome:
        """A record that is kept, with side data."""
        meta = self.meta()
        if repaired:
            meta["repaired"] = True
        if findings:
            meta["warnings"] = [f"{finding.reason}: {finding.message}" for finding in findings]
        return Outcome(record={**record, "meta": {**record.get("meta", {}), **meta}}, accepted=True, repaired=repaired, label=label)

    def rejected(self, kind: str, reason: str, message: str) -> Outcome:
        """The record of an input that nothing came of."""
        record: dict[str, Any] = {self.field: self.name, "kind": kind, "reason": reason, "message": message}
        if self.answers:
            record["answers"] = self.answers
        return Outcome(record={**record, "meta": self.meta()}, accepted=False, label=reason)

    def meta(self) -> dict[str, Any]:
        """Where the record comes from."""
        meta: dict[str, Any] = {"backend": self.settings.backend}
        if self.settings.backend != "rules":
            meta |= {"model": self.settings.model, "prompt_version": self.prompt_version}
        return {**meta, "seed": self.seed, "seconds": round(time.monotonic() - self.started, 3), **self.side}

    def _read(self, answer: Answer, fields: Sequence[str], values: Values | None) -> tuple[Texts | None, list[Finding]]:
        try:
            return parse_answer(answer.text, fields, values), []
        except Unparsable as error:
            cut = f" (it ran into max_tokens = {self.settings.max_tokens})" if answer.cut else ""
            return None, [Finding(reason=error.reason, message=f"{error}{cut}")]


def _repeats(texts: Texts, backend: Backend, chat: Chat) -> list[Finding]:
    """What no output may hold: the key, or lines of what was asked."""
    repeating = [name for name, text in texts.items() if backend.scrub(text, chat) != text]
    return [Finding(reason="repeats_prompt", message=f"{', '.join(repeating)} repeats what was asked, or the key")] if repeating else []


def _spoken(text: str) -> str:
    """The part of an answer that a repair turn shows to the model: its thinking would only cost tokens."""
    try:
        said = without_thinking(text).strip()
    except Unparsable:
        said = ""
    return said[:_QUOTED] or "(no answer)"
