"""What a judge is asked of an edit, in words of our own or of a file. Raise the version with the words: figures of others differ."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from byg_plugin.documents import json_value, toml_table, utf8
from byg_plugin.evaluation.judged import IMGEDIT, QUALITY, SEMANTIC, Question

VERSION = "judge-1"
SYSTEM = "You are a strict judge of image editing. You answer with one JSON object and nothing else."
INSTRUCTION = ("<instruction>", "<edit_prompt>")
"""What the instruction takes the place of; the second as ImgEdit's file of prompts has it."""

_WORDS = {
    SEMANTIC.name: """You see two pictures: first a source, then what an editor made of it by this instruction:
<instruction>

Rate with two numbers from 0 to 10:
1. success: 0 = nothing of the instruction was done, 10 = all of it was done, exactly as it says
2. preservation: 0 = the scene is another one, 10 = nothing has changed that the instruction does not ask to change. A change of the whole
   style may change every pixel; then content, layout and identity count""",
    QUALITY.name: """You see a picture that an editor has made. Do not judge whether it shows what it should.

Rate with two numbers from 0 to 10:
1. naturalness: 0 = light, shadows, proportions or distances are plainly wrong, 10 = all of it looks as in a good picture of its kind
2. artifacts: 0 = full of distortions, seams, blur, noise, broken faces or hands or watermarks, 10 = free of them""",
    IMGEDIT.name: """You see two pictures: first a source, then what an editor made of it by this instruction:
<instruction>

Rate with three numbers from 1 to 5:
1. compliance: 1 = not done, or something else was edited, 3 = largely done, with plain errors, 5 = exactly what was asked, and only that
2. seamlessness: 1 = broken or plainly pasted, 3 = alike in style, with visible clashes of light, color or edges, 5 = nobody sees an edit
3. fidelity: 1 = physically wrong, or the rest is ruined, 3 = small errors that can be borne, 5 = light, contact and perspective are
   right and the rest is untouched
Neither the second nor the third number is higher than the first.""",
}
_NO_TYPES = ("system", *_WORDS)
"""Names of a file's texts that are no edit type's, even where an edit type is named so."""
_FRAMES = "\nOf each video you see {frames} frames, in order{order}. Judge the videos as wholes, their motion too.\n"
_FORM = '\nAnswer with one JSON object: {{"reasoning": "one or two sentences", "score": [{parts}]}}, numbers in the order above.'


@dataclass(frozen=True, kw_only=True)
class Words:
    """The questions' words.

    Attributes:
        version: changes with the words.
        system: what the model is.
        by_name: of each question; for IMGEDIT also of edit types.
    """

    version: str
    system: str
    by_name: Mapping[str, str]

    def lacks(self, question: Question, edit_type: str | None) -> bool:
        """Whether there are no words for an item of this edit type."""
        return self._words(question, edit_type) is None

    def ask(self, question: Question, instruction: str, edit_type: str | None = None, frames: int = 1) -> str:
        """One question about an edit; of clips `frames` pictures stand for each."""
        words = self._words(question, edit_type)
        assert words is not None, "checked before the first request"
        for name in INSTRUCTION:
            words = words.replace(name, " ".join(instruction.split()))
        if frames > 1:
            order = ", first the source's, then the edit's of the same moments" if question.with_source else ""
            words += _FRAMES.format(frames=frames, order=order)
        return words.rstrip() + "\n" + _FORM.format(parts=", ".join(question.parts))

    def _words(self, question: Question, edit_type: str | None) -> str | None:
        of_type = None if edit_type in _NO_TYPES else self.by_name.get(edit_type or "")
        return of_type or self.by_name.get(question.name)


def words_of(path: Path | None) -> Words:
    """Our own words, or those of a TOML or JSON file: texts named vie_semantic, vie_quality, imgedit (or by edit type) and system.

    Raises:
        ValueError: the file is not there, or holds something else.
    """
    if path is None:
        return Words(version=VERSION, system=SYSTEM, by_name=_WORDS)
    if not path.is_file():
        raise ValueError(f"--prompts {path}: no such file")
    try:
        table = toml_table(path.read_bytes()) if path.suffix.lower() == ".toml" else json_value(utf8(path.read_bytes()))
    except ValueError as error:
        raise ValueError(f"--prompts {path}: cannot be read: {error}") from error
    if not (isinstance(table, dict) and table and all(isinstance(text, str) and text.strip() for text in table.values())):
        raise ValueError(f"--prompts {path}: expected texts by name ({', '.join(_WORDS)}, or edit types)")
    digest = hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()[:12]
    return Words(version=f"file-{digest}", system=table.get("system", SYSTEM), by_name=table)
