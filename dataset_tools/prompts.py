"""What the models are asked: the edit types of Appendix D.1, its rules, and the questions of D.2. Raise the version with the words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from byg_plugin.data.rules import EDIT_TYPES, RULES, Finding

VERSION = "2"
FIELDS = ("edit_type", "src_caption", "instruction", "tgt_caption", "reverse_instruction")
PHOTOREALISTIC = "photorealistic"

# Each says where (central: a prominent object or the whole background) and how much (visible at a glance).
TAXONOMY = {
    "color_change": "give a prominent object another color, clearly unlike the one it has; never a small detail",
    "texture_change": "make a prominent object, or a large surface, of another material or texture that is visible at a glance (wood to "
    "marble, fur to wool)",
    "shape_adjustment": "change the shape, size or proportions of a prominent object so that its outline is clearly different",
    "add": "put a new object of considerable size into a plausible, prominent place of the scene",
    "remove": "take a prominent object or person out of the scene completely; what is behind it comes into view",
    "replace": "exchange a prominent object for another kind of object in the same place, clearly unlike it",
    "background_change": "exchange the entire background for another place, season, weather or time of day; the main subject stays",
    "style_change": "render the whole image in another artistic style from the list of styles; content and composition stay",
    "action_change": "give the main person or animal another action or pose that involves the whole body or is clearly visible",
    "text_manipulation": "exchange the words of large, legible writing in the image for other words, or add prominent writing on a surface",
}
assert tuple(TAXONOMY) == EDIT_TYPES

STYLES = (
    "watercolor",
    "oil painting",
    "anime",
    "ukiyo-e",
    "charcoal",
    "pencil sketch",
    "ink wash",
    "pastel",
    "impressionism",
    "cubism",
    "pop art",
    "art nouveau",
    "stained glass",
    "mosaic",
    "linocut",
    "comic book",
    "pixel art",
    "low-poly 3D",
    "claymation",
    "paper cut-out",
)

SYSTEM = "You write training data for an image editor. You answer with one JSON object and nothing else."

_TASK = """Look at the image and invent one edit of it.

Choose exactly one of these edit types, the one that suits this image best:
{types}
{styles}{caption}
Answer with one JSON object with exactly these five string fields:
- "edit_type": the chosen type, spelled as above
- "src_caption": the image as you see it, in one or two sentences, including what the edit is going to touch{source_style}
- "instruction": the edit as a short command, naming the object or place it is about
- "tgt_caption": the edited image as if you saw it, worded like src_caption except for what the edit touches
- "reverse_instruction": the command that leads from the edited image to this one

Rules:
- the edit touches something central and is visible at a glance
- reverse_instruction is given to somebody who sees the edited image alone. It names the state it leads to ("change the color of the car to
  red"). Words such as restore, revert, undo, original, previous or back are forbidden
- tgt_caption describes the final image alone: no "now", "no longer", "changed to", "turned into" or "replaced by". Say what is there; do
  not say what is absent ("without", "no")
- src_caption says nothing of the edit. If the image is not a photograph (painting, drawing, render), it names the style
- words that stand in the image are quoted in single marks: a sign that says 'OPEN'
- instruction and reverse_instruction, and the two captions, must differ"""


def edit_request(offered: Sequence[str], *, caption: str | None = None, source_style: str | None = None, to_photo: bool = False) -> str:
    """The question of D.1 for one image.

    Args:
        offered: the only edit types that may be chosen.
        caption: what somebody said of the image.
        source_style: what metadata says of how it is made.
        to_photo: the edit is a conversion of style, to a photorealistic image.
    """
    types = "\n".join(f'- "{name}": {TAXONOMY[name]}' for name in offered)
    styles = ""
    if to_photo:
        styles = f"\nThe style to reach is {PHOTOREALISTIC}: the edited image looks like a photograph, and tgt_caption says so.\n"
    elif "style_change" in offered:
        styles = f"\nStyles: {', '.join(STYLES)}.\n"
    said = f"\nA caption of the image, which may be incomplete or wrong: {' '.join(caption.split())}\n" if caption else ""
    named = f". It is known to be made as: {source_style}; say so" if source_style else ""
    return _TASK.format(types=types, styles=styles, caption=said, source_style=named)


_FORM = "the answer must be one JSON object as described, whole and with every field filled"
_OF_THE_ANSWER = {
    "edit_type": "edit_type must be exactly one of the types that were offered",
    "style_hint": "the caption must say nothing of style, medium or technique",
    "repeats_prompt": "the fields must be in your own words, not in those of the request",
}


def repair_request(findings: Iterable[Finding]) -> str:
    """The turn after an answer that cannot be taken; quotes each broken rule."""
    known = {**RULES, **_OF_THE_ANSWER}
    broken = "\n".join(f"- {known.get(f.reason, _FORM)} (here: {f.message})" for f in findings)
    return (
        f"That answer cannot be used:\n{broken}\n\nAnswer again with the whole corrected JSON object, every field of it, and nothing else. "
        "Keep what was right."
    )


SANITIZE_SYSTEM = "You rewrite video captions. You answer with one JSON object and nothing else."
SANITIZE_FIELDS = ("caption",)
_SANITIZE = """Rewrite this caption of a video so that it says nothing of how the video is made or looks as a medium: no art style,
rendering technique, medium, camera brand, film look or words such as animated, cartoon, realistic, cinematic, footage, 3D.
Keep every person, object, place, action, color and camera movement. Do not add anything.

Caption: {caption}

Answer with one JSON object: {{"caption": "..."}}"""


def sanitize_request(caption: str) -> str:
    """D.2, step 2: a caption to be freed of hints at style."""
    return _SANITIZE.format(caption=" ".join(caption.split()))


DESCRIBE_SYSTEM = "You describe videos. You answer with one JSON object and nothing else."
DESCRIBE_FIELDS = ("caption", "style")
DESCRIBE = """These are frames of one video, in order. Answer with one JSON object with two string fields:
- "caption": what happens, in two or three sentences: people, objects, place, actions, camera movement. Nothing of style or medium
- "style": how the video is made, in at most three words: "photo-realistic", "cartoon", or what it is (e.g. "3D-CGI")"""
