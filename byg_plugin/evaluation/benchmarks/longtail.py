"""Long-tail styles (paper, section 5.1.2): six styles, from photographs to each and from each to a photograph; the metric is `viescore`.

The paper has 487 tasks on 335 images and publishes none of them. Its photographs are ImgEdit's; its stylised sources are Qwen-Image's.
Ours: every photograph to all six styles, and every stylised source back. `recipe` has the prompts of 180 stylised sources:

    python -m byg_plugin.evaluation.benchmarks.longtail > prompts.jsonl
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from byg_plugin import _cli
from byg_plugin.data.tuples import IMAGE_SUFFIXES
from byg_plugin.evaluation.benchmarks.base import Benchmark, Task
from byg_plugin.evaluation.benchmarks.sources import captioned

STYLES = {
    "gta_v": "GTA V style",
    "minecraft": "Minecraft style",
    "american_comic": "American comic style",
    "low_poly": "low-poly 3D style",
    "voxel": "voxel style",
    "lego": "Lego style",
}
"""What a style's folder is called, and its words."""
TO_STYLE, TO_PHOTO = "Turn this photo into {style}", "Turn this image in {style} into a photorealistic photo"
PHOTO = "a photorealistic photo"
LAYOUT = (
    "The paper's own images are not published. Expected: DIR/photos/*.jpg (e.g. ImgEdit-Bench's, "
    f"https://huggingface.co/datasets/sysuyy/ImgEdit) and DIR/STYLE/*.png for {', '.join(STYLES)}, each with a caption "
    "in a .txt beside it if there is one; docs/evaluation.md has the script that makes stylised sources with Qwen-Image"
)
SCENES = (
    *("a woman walking a dog in a park", "an old man reading a newspaper on a bench", "a child flying a kite on a beach"),
    *("a busy street crossing with cars and pedestrians", "a red sports car parked in front of a villa", "a fishing boat in a harbor"),
    *("a wooden cabin at a mountain lake", "a castle on a hill at sunset", "a snowy village with lit windows", "a lighthouse on a cliff"),
    *(
        "a farmer on a tractor in a wheat field",
        "two horses grazing on a meadow",
        "a cat sleeping on a sofa",
        "an owl on a branch at night",
    ),
    *("a lion resting under a tree", "a bowl of fruit on a kitchen table", "a birthday cake with candles", "a coffee shop with customers"),
    *("a musician playing guitar on a stage", "a football player shooting at the goal", "a cyclist on a mountain road"),
    *("a train crossing a stone bridge", "an airplane above the clouds", "a desert with a camel caravan", "a waterfall in a jungle"),
    *("a library with tall shelves", "a living room with a fireplace", "a market with vegetable stalls", "a subway station with a train"),
    "an astronaut on a rocky planet",
)


def recipe() -> Iterator[dict[str, str]]:
    """Of each stylised source: its style, file (without suffix), prompt, and caption without the style."""
    for style, words in STYLES.items():
        for number, scene in enumerate(SCENES):
            yield {"style": style, "file": f"{style}/{number:02d}", "prompt": f"{scene}, the whole image in {words}", "caption": scene}


def read(data: Path) -> Benchmark:
    """The tasks of a folder.

    Raises:
        ValueError: there are no photographs, or a style has no sources.
    """
    photos = captioned(data / "photos", IMAGE_SUFFIXES)
    stylised = {style: captioned(data / style, IMAGE_SUFFIXES) for style in STYLES}
    if missing := [name for name, files in {"photos": photos, **stylised}.items() if not files]:
        raise ValueError(f"--benchmark longtail: no image in {', '.join(str(data / name) for name in missing)}. {LAYOUT}")
    to_style = [_task(path, caption, style, True) for style in STYLES for path, caption in photos]
    to_photo = [_task(path, caption, style, False) for style, files in stylised.items() for path, caption in files]
    rows = {"photo to style": {task.id for task in to_style}, "style to photo": {task.id for task in to_photo}}
    return Benchmark(name="longtail", tasks=[*to_style, *to_photo], published=487, rows=rows)


def _task(path: Path, caption: str | None, style: str, to_style: bool) -> Task:
    words = STYLES[style]
    photo, stylised = _captioned(caption, PHOTO), _captioned(caption, f"an image in {words}")
    texts = (TO_STYLE.format(style=words), TO_PHOTO.format(style=words))
    instruction, reverse = texts if to_style else texts[::-1]
    before, after = (photo, stylised) if to_style else (stylised, photo)
    return Task(
        id=f"{style}_from_{path.stem}" if to_style else f"photo_from_{style}_{path.stem}",
        source=path,
        instruction=instruction,
        group=f"photo to {style}" if to_style else f"{style} to photo",
        src_caption=before,
        tgt_caption=after,
        reverse_instruction=reverse,
    )


def _captioned(caption: str | None, kind: str) -> str:
    return f"{caption}, {kind}" if caption else kind


def main() -> None:
    """The recipe, a line a picture."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for line in recipe():
        print(json.dumps(line))


if __name__ == "__main__":
    _cli.run(main)
