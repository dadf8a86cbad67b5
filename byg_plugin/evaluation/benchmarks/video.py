"""Clips of three styles (paper, section 5.1.1, appendix D.2): 832 x 480 pixels, 81 frames, 119 tasks.

Cartoons become photo-realistic, photo-realistic clips cartoons, 3D-CGI ones each of the two. The last style is in no training set.
"""

from __future__ import annotations

from pathlib import Path

from byg_plugin.data.clips import SUFFIXES, clip_info
from byg_plugin.data.video_styles import INSTRUCTIONS, STYLES, wrap
from byg_plugin.evaluation.benchmarks.base import Benchmark, Task
from byg_plugin.evaluation.benchmarks.sources import captioned
from byg_plugin.evaluation.items import refuse

SIZE, FRAMES = (832, 480), 81
KINDS = ("cartoon", "photo-realistic", "3D-CGI")
ORIGINS = ("real", "generated")
LAYOUT = (
    "The paper's clips are not published; it took real ones from UltraVideo (https://huggingface.co/datasets/APRIL-AIGC/UltraVideo) and "
    "made others with Wan (dataset_tools/render_videos.py). Expected: DIR/real/STYLE/*.mp4 and DIR/generated/STYLE/*.mp4 for "
    f"{', '.join(KINDS)}, {SIZE[0]} x {SIZE[1]} pixels, {FRAMES} frames, each with a caption in a .txt beside it if there is one"
)


def read(data: Path) -> Benchmark:
    """The tasks of a folder.

    Raises:
        ValueError: there is none, or clips have another size or length; names the line that mends them.
    """
    files = [(origin, kind, *one) for origin in ORIGINS for kind in KINDS for one in captioned(data / origin / kind, SUFFIXES)]
    if not files:
        raise ValueError(f"--benchmark video: no clip in {data}. {LAYOUT}")
    refuse([problem for _, _, path, _ in files for problem in _problems(path)], "--benchmark video")
    tasks = [_task(origin, kind, path, caption, target) for origin, kind, path, caption in files for target in STYLES if target != kind]
    rows = {f"{kind} to either": {task.id for task in tasks if task.group.startswith(kind)} for kind in KINDS if kind not in STYLES} | {
        f"{origin} clips": {task.id for task in tasks if task.id.startswith(origin)} for origin in ORIGINS
    }
    return Benchmark(name="video", tasks=tasks, published=119, rows={name: ids for name, ids in rows.items() if ids})


def _problems(path: Path) -> list[str]:
    try:
        clip = clip_info(path)
    except ValueError as error:
        return [str(error)]
    if clip.size == SIZE and clip.frames == FRAMES:
        return []
    width, height = SIZE
    scale = f"scale={width}:{height}:force_original_aspect_ratio=increase,crop={width}:{height}"
    return [
        f"{path}: {clip.size[0]} x {clip.size[1]} pixels and {clip.frames} frames, not {width} x {height} and {FRAMES}; "
        f"ffmpeg -i IN -vf {scale} -frames:v {FRAMES} OUT"
    ]


def _task(origin: str, kind: str, path: Path, caption: str | None, target: str) -> Task:
    return Task(
        id=f"{origin}_{kind}_{path.stem}_to_{target}",
        source=path,
        instruction=INSTRUCTIONS[0].format(style=target),
        group=f"{kind} to {target}",
        src_caption=wrap(caption or "A video", kind),
        tgt_caption=wrap(caption or "A video", target),
        reverse_instruction=INSTRUCTIONS[0].format(style=kind),
    )
