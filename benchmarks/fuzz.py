"""Damaged and odd files, made at random: every reader must take one or refuse it in a line, within seconds, and lose nothing.

python benchmarks/fuzz.py [--readers images clips ...] [--seconds 600] [--seed 0]     needs `pip install hypothesis`

Reads with the byg_plugin that is installed: started from another folder, that of a wheel. Each reader works in a child process, since
a decoder may take the process down; `faulthandler` ends an input that takes over 10 seconds. Prints for each reader how many inputs
were taken and refused and what is wrong: a traceback (ours or a library's), a hang, a crash, a changed file. Exit code 1 if anything is.
Outside CI.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import faulthandler
import hashlib
import io
import json
import math
import multiprocessing
import os
import shutil
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

_LIMIT = 10  # seconds an input may take
_ROUND = 200  # inputs a round; a crash costs the rest of its round
_MOST_FINDINGS = 20

# --- what is done to a file ---

_WEIRD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 10**12, 2**63, 10**400, 0.5, -0.0, 1e-60, 1e39, 1e308, math.nan, math.inf),
    *("", " ", "a", "..", "/", "\0", "\t", "\ud800", "ü" * 300, "x" * 70_000, "-1", "nan"),
    *([], [[]], {}, {"a": []}, [1, "a", None], {"": {}}),
)
_INTERESTING = (
    b"\0",
    b"\xff",
    b"\x7f\xff\xff\xff",
    b"\xff\xff\xff\xff",
    b"\0\0\0\0",
    b"\x80",
    b"\xff" * 8,
    b"\0" * 64,
    b"\n",
    b'"',
    b"{",
    b"[",
)

Edit = tuple[str, float, float, bytes]
Edits = list[Edit]


def byte_edits() -> st.SearchStrategy[Edits]:
    """One to six changes of bytes anywhere in a file."""
    kinds = st.sampled_from(["set", "insert", "cut", "repeat", "end"])
    share = st.floats(0, 1, allow_nan=False)
    return st.lists(
        st.tuples(kinds, share, share, st.sampled_from(_INTERESTING) | st.binary(min_size=1, max_size=12)), min_size=1, max_size=6
    )


def edited(data: bytes, edits: Edits) -> bytes:
    """The file after `edits`; the second share is a length, mostly short."""
    for kind, where, length, value in edits:
        at, count = int(where * len(data)), 1 + int(length**8 * len(data))
        if kind == "set":
            data = data[:at] + value + data[at + len(value) :]
        elif kind == "insert":
            data = data[:at] + value + data[at:]
        elif kind == "cut":
            data = data[:at] + data[at + count :]
        elif kind == "repeat":
            data = data[:at] + data[at : at + count] * 2 + data[at + count :]
        else:
            data = data[:at]
    return data[: 8 << 20]


def value_edits() -> st.SearchStrategy[list[tuple[int, Any, str]]]:
    """One to three values of a document that become another one, go, or get another name."""
    what = st.sampled_from(["value", "value", "value", "drop", "rename"])
    return st.lists(st.tuples(st.integers(0, 10_000), st.sampled_from(_WEIRD), what), min_size=1, max_size=3)


def changed(document: Any, edits: list[tuple[int, Any, str]]) -> Any:
    """A copy of a document of dictionaries and lists with some values changed."""
    document = json.loads(json.dumps(document))
    for index, weird, what in edits:
        value = copy.deepcopy(weird)  # else a document could come to hold itself
        slots = list(_slots(document))
        if not slots:
            return value
        holder, key = slots[index % len(slots)]
        if what == "value":
            holder[key] = value
        elif what == "drop":
            del holder[key]
        elif isinstance(holder, dict):
            holder[str(value)[:40]] = holder.pop(key)
    return document


def _slots(node: Any) -> Iterator[tuple[Any, Any]]:
    items = list(node.items()) if isinstance(node, dict) else list(enumerate(node)) if isinstance(node, list) else []
    for key, value in items:
        yield node, key
        yield from _slots(value)


def header_changed(data: bytes, edits: list[tuple[int, Any, str]]) -> bytes:
    """A .safetensors file with another header and the same numbers after it."""
    size = struct.unpack("<Q", data[:8])[0]
    header = json.dumps(changed(json.loads(data[8 : 8 + size]), edits)).encode()
    return struct.pack("<Q", len(header)) + header + data[8 + size :]


# --- readers ---


@dataclass
class Reader:
    """What is fuzzed.

    Attributes:
        make: fills an empty folder with whole files; returns those that are damaged, one an input.
        read: what is done with the folder and the damaged file; errors as a command would make them.
        resets: whether reading may write, so that the folder is made anew for each input.
        rewrites: names of damaged files that reading may mend: a memory that is only there to save time, a log whose last line is torn.
    """

    make: Callable[[Path], list[Path]]
    read: Callable[[Path, Path], object]
    resets: bool = False
    rewrites: tuple[str, ...] = ()


def _command(main: Callable[[], object], *arguments: object) -> None:
    """A command in this process."""
    sys.argv = ["command", *map(str, arguments)]
    main()


def _make_toml(folder: Path) -> list[Path]:
    from byg_plugin import shipped

    return [Path(shutil.copy(path, folder)) for path in sorted(shipped.folder("configs").glob("*.toml"))]


def _read_toml(folder: Path, path: Path) -> None:
    from byg_plugin import train_network

    _command(train_network.main, "--config", path, "--print-config")


def _picture(index: int) -> Any:
    import numpy as np
    from PIL import Image

    coarse = np.random.default_rng(index).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((64, 48), Image.Resampling.BICUBIC)


def _make_tuples(folder: Path) -> list[Path]:
    texts = {
        "src_caption": "a red house",
        "tgt_caption": "a blue house",
        "instruction": "make it blue",
        "reverse_instruction": "make it red",
    }
    (folder / "beside").mkdir()
    lines = []
    for index in range(4):
        _picture(index).save(folder / f"{index}.png")
        _picture(index).save(folder / "beside" / f"{index}.png")
        record = {"source": f"{index}.png", **texts, "instruction": f"make it blue {index}", "edit_type": "color", "meta": {"model": "m"}}
        lines.append(json.dumps(record))
        (folder / "beside" / f"{index}.json").write_text(json.dumps({**texts, "instruction": f"make it blue {index}"}))
    (folder / "tuples.jsonl").write_text("\n".join(lines))
    return [folder / "tuples.jsonl", folder / "beside" / "1.json"]


def _read_tuples(folder: Path, path: Path) -> None:
    from byg_plugin import shipped
    from byg_plugin.data.tuples import read_tuples_file

    source = path if path.suffix == ".jsonl" else path.parent
    # The command ends with a code of its own when it has found something.
    with contextlib.suppress(SystemExit):
        shipped.module("dataset_tools.validate").main([str(source)])
    read_tuples_file(source)


def _make_lora(folder: Path) -> list[Path]:
    import torch
    from safetensors.torch import save_file

    from byg_plugin.lora.card import LoraCard

    rng = torch.Generator().manual_seed(0)
    layers = [f"transformer_blocks.{i}.attn.to_{kind}" for i in range(2) for kind in "qkv"]
    peft = {}
    for layer in layers:
        peft[f"transformer.{layer}.lora_A.weight"] = torch.randn(4, 3072, generator=rng)[:, :3072].half()
        peft[f"transformer.{layer}.lora_B.weight"] = torch.randn(3072, 4, generator=rng).half()
    kohya = {}
    for name in ("double_blocks_0_img_attn_qkv", "single_blocks_1_linear2"):
        width = 15360 if name.endswith("linear2") else 3072
        kohya[f"lora_unet_{name}.lora_down.weight"] = torch.randn(2, width, generator=rng).half()
        kohya[f"lora_unet_{name}.lora_up.weight"] = torch.randn(9216 if name.endswith("qkv") else 3072, 2, generator=rng).half()
        kohya[f"lora_unet_{name}.alpha"] = torch.tensor(1.0)
    config = {"r": 4, "lora_alpha": 8, "rank_pattern": {}, "alpha_pattern": {}, "target_modules": ["to_q", "to_k", "to_v"]}
    header = json.dumps({f"transformer.{key}": value for key, value in config.items()})
    save_file(peft, folder / "peft.safetensors", metadata={"format": "pt", "lora_adapter_metadata": header})
    card = LoraCard(family="flux", position="same", guidance=3.5)
    save_file(peft, folder / "ours.safetensors", metadata=card.to_metadata())
    save_file(kohya, folder / "kohya.safetensors")
    return [folder / "peft.safetensors", folder / "ours.safetensors", folder / "kohya.safetensors"]


def _read_lora(folder: Path, path: Path) -> None:
    from byg_plugin import convert_lora

    for arguments in (["--check"], ["--to", "musubi", "--out", folder / "out.safetensors", "--allow-loss", "--overwrite"]):
        with contextlib.suppress(SystemExit):  # --check has a code of its own for a loss
            _command(convert_lora.main, path, *arguments)
    _command(convert_lora.main, path, "--to", "diffusers", "--out", folder / "out.safetensors", "--overwrite")


def _tiny() -> Any:
    """The tests' tiny models of the real classes."""
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    from tests.support import tiny

    return tiny


def _tiny_work(folder: Path) -> Any:
    """Tuples, caches, and the configuration of a run in `folder`."""
    tiny = _tiny()
    shutil.copytree(tiny.workspace(), folder, dirs_exist_ok=True)
    run = {
        "model": {"path": str(tiny.model_folder())},
        "objective": {"rollout_steps": 2, "identity_warmup_steps": 1, "ema_decay": 0.9},
        "train": {"steps": 4, "save_every": 1},
    }
    return tiny.tiny_config(folder, **run)


def _make_caches(folder: Path) -> list[Path]:
    config = _tiny_work(folder)
    cache = Path(config.dataset.cache_dir)
    return [*sorted((cache / "latents").iterdir())[:2], *sorted((cache / "texts").iterdir())[:2], cache / "files.json"]


def _read_caches(folder: Path, path: Path) -> None:
    from byg_plugin.data.dataset import CachedTuples
    from byg_plugin.models import make_family

    config = _tiny().tiny_config(folder, model={"path": str(_tiny().model_folder())})
    data = CachedTuples(config, make_family(config), "train")
    for index in range(len(data)):
        _ = data[index]


def _make_checkpoints(folder: Path) -> list[Path]:
    kept = Path(tempfile.gettempdir()) / f"byg-fuzz-run-{os.getpid()}"
    if not kept.is_dir():
        _tiny().make_trainer(_tiny_work(kept).model_copy()).run()
        for extra in ("step-000004", "step-000003"):
            shutil.rmtree(kept / "out" / "checkpoints" / extra)
    shutil.copytree(kept, folder, dirs_exist_ok=True)
    newest = folder / "out" / "checkpoints" / "step-000002"
    return [newest / "state.json", newest / "training.safetensors", folder / "out" / "log.jsonl"]


def _read_checkpoints(folder: Path, path: Path) -> None:
    run = {
        "model": {"path": str(_tiny().model_folder())},
        "objective": {"rollout_steps": 2, "identity_warmup_steps": 1, "ema_decay": 0.9},
        "train": {"steps": 4, "save_every": 1},
    }
    trainer = _tiny().make_trainer(_tiny().tiny_config(folder, **run), "latest")
    release = getattr(trainer, "close", None)
    if release:
        release()


def _make_images(folder: Path) -> list[Path]:
    import numpy as np
    from PIL import Image, ImageCms
    from PIL.PngImagePlugin import PngInfo

    picture = _picture(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    info = PngInfo()
    info.add_itxt("workflow", json.dumps({"nodes": list(range(300))}), zip=True)
    picture.save(folder / "a.png", pnginfo=info)
    picture.quantize(16).save(folder / "palette.png", transparency=0)
    Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 200).save(folder / "grey16.png")
    picture.save(folder / "a.jpg", exif=exif, icc_profile=profile)
    picture.convert("CMYK").save(folder / "cmyk.jpg")
    picture.save(folder / "a.webp", exif=exif)
    picture.save(folder / "a.tif", compression="tiff_lzw")
    picture.save(folder / "a.bmp")
    picture.save(folder / "a.ppm")
    if "AVIF" in Image.SAVE or Image.init() and "AVIF" in Image.SAVE:
        picture.save(folder / "a.avif")
    return sorted(folder.iterdir())


def _read_images(folder: Path, path: Path) -> None:
    from byg_plugin.data import media

    size = media.image_size(path)
    loaded = media.load_image(path)
    assert loaded.size == size and loaded.mode == "RGB", f"{size} is promised, {loaded.size} {loaded.mode} comes"


def _make_clips(folder: Path) -> list[Path]:
    import av

    made = []
    for name, codec, options in (
        ("a.mp4", "libx264", {}),
        ("a.mov", "libx264", {"bf": "2"}),
        ("a.mkv", "ffv1", {}),
        ("a.avi", "mpeg4", {}),
        ("a.webm", "libvpx-vp9", {"cpu-used": "8"}),
    ):
        with av.open(str(folder / name), "w") as container:
            container.metadata["title"] = "a clip"
            stream = container.add_stream(codec, rate=16)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "bgr0" if codec == "ffv1" else "yuv420p"
            stream.options = options
            for index in range(9):
                container.mux(stream.encode(av.VideoFrame.from_image(_picture(index))))
            container.mux(stream.encode())
        made.append(folder / name)
    return made


def _read_clips(folder: Path, path: Path) -> None:
    from byg_plugin.data import clips

    info = clips.clip_info(path)
    assert info.frames >= 1 and math.isfinite(info.seconds) and info.seconds >= 0, info
    for frame in clips.read_clip(path, min(info.frames, 5)):
        assert frame.size == info.size, f"{info.size} is promised, {frame.size} comes"
    list(clips.read_clip(path, min(info.frames_at(8), 4), 8))


READERS = {
    "toml": Reader(_make_toml, _read_toml),
    "tuples": Reader(_make_tuples, _read_tuples),
    "caches": Reader(_make_caches, _read_caches, rewrites=("files.json",)),
    "lora": Reader(_make_lora, _read_lora),
    "checkpoints": Reader(_make_checkpoints, _read_checkpoints, resets=True, rewrites=("log.jsonl",)),
    "images": Reader(_make_images, _read_images),
    "clips": Reader(_make_clips, _read_clips),
}


# --- one input, one round, one reader ---


@dataclass
class Tally:
    """What a reader's inputs came to."""

    inputs: int = 0
    taken: int = 0
    refused: int = 0
    longest: float = 0.0
    findings: Counter[str] = field(default_factory=Counter)
    """What is wrong -> how many inputs show it."""


def inputs_of(whole: dict[Path, bytes]) -> st.SearchStrategy[tuple[Path, bytes]]:
    """A damaged file: which, and its bytes."""

    def of(path: Path) -> st.SearchStrategy[tuple[Path, bytes]]:
        data = whole[path]
        ways = [byte_edits().map(lambda edits: edited(data, edits))]
        if path.suffix == ".safetensors":
            ways.append(value_edits().map(lambda edits: header_changed(data, edits)))
        if path.suffix == ".json":
            ways.append(value_edits().map(lambda edits: json.dumps(changed(json.loads(data), edits)).encode()))
        if path.suffix == ".jsonl":
            lines = [json.loads(line) for line in data.splitlines()]
            ways.append(value_edits().map(lambda edits: _as_lines(changed(lines, edits))))
        if path.suffix == ".toml":
            ways.append(value_edits().map(lambda edits: _toml_with(data.decode(), edits)))
        return st.tuples(st.just(path), st.one_of(ways))

    return st.sampled_from(sorted(whole)).flatmap(of)


def _as_lines(value: Any) -> bytes:
    return b"\n".join(json.dumps(entry).encode() for entry in (value if isinstance(value, list) else [value]))


def _toml_with(text: str, edits: list[tuple[int, Any, str]]) -> bytes:
    """Values of a TOML file replaced in its text, so that tables stay as they are written."""
    lines = text.splitlines()
    for index, value, what in edits:
        at = [number for number, line in enumerate(lines) if "=" in line and not line.startswith("#")]
        if not at:
            break
        number = at[index % len(at)]
        key = lines[number].partition("=")[0]
        lines[number] = "" if what == "drop" else f"{key if what == 'value' else str(value)[:40]} = {json.dumps(value)}"
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def run_round(name: str, number: int, seconds: float, keep: Path) -> Tally:
    """Inputs of one seeded round; the smallest of each finding stays in `keep`."""
    reader, tally = READERS[name], Tally()
    ends = time.monotonic() + seconds
    with tempfile.TemporaryDirectory(prefix="byg-fuzz-") as scratch:
        folder = Path(scratch) / "whole"
        folder.mkdir()
        paths = reader.make(folder)
        whole = {path: path.read_bytes() for path in paths}
        others = {path: _digest(path) for path in folder.rglob("*") if path.is_file()}

        @seed(number)
        @settings(
            max_examples=_ROUND,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
            phases=(Phase.generate,),
        )
        @given(inputs_of(whole))
        def attempt(example: tuple[Path, bytes]) -> None:
            if time.monotonic() > ends:
                return
            path, data = example
            path.write_bytes(data)
            tally.inputs += 1
            started = time.perf_counter()
            try:
                faulthandler.dump_traceback_later(_LIMIT, exit=True, file=sys.__stderr__)  # type: ignore[arg-type]
                outcome = _outcome(reader, folder, path)
            finally:
                faulthandler.cancel_dump_traceback_later()
                tally.longest = max(tally.longest, time.perf_counter() - started)
            if outcome in ("taken", "refused"):
                setattr(tally, outcome, getattr(tally, outcome) + 1)
            else:
                wrong(outcome, path, data)
            if not path.is_file() or (path.read_bytes() != data and path.name not in reader.rewrites):
                wrong(f"{path.name}: reading has changed the file", path, data)
            path.write_bytes(whole[path])
            lost = [other.name for other, digest in others.items() if not other.is_file() or _digest(other) != digest]
            if reader.resets:
                shutil.rmtree(folder)
                folder.mkdir()
                reader.make(folder)
            elif lost and name != "caches":
                wrong(f"lost or changed by reading {path.name}: {lost}", path, data)

        def wrong(what: str, path: Path, data: bytes) -> None:
            kept = keep / f"{name}-{hashlib.sha256(what.encode()).hexdigest()[:8]}{path.suffix}"
            if not kept.is_file() or kept.stat().st_size > len(data):
                kept.write_bytes(data)
            tally.findings[f"{what} ({kept.name})"] += 1

        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            for path in whole:  # what is imported at the first input is no input's time
                if (outcome := _outcome(reader, folder, path)) not in ("taken", "refused"):
                    raise AssertionError(f"{path.name}, a whole file: {outcome}")
                if reader.resets:
                    shutil.rmtree(folder)
                    folder.mkdir()
                    reader.make(folder)
            attempt()
    return tally


def _outcome(reader: Reader, folder: Path, path: Path) -> str:
    """`taken`, `refused`, or the traceback that a user would see."""
    from byg_plugin import _cli

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            _cli.run(lambda: reader.read(folder, path))
    except SystemExit as stop:
        if stop.code == 2:
            return "refused" if "error: " in said.getvalue() else f"refused without a word: {said.getvalue()[-300:]}"
        return "taken" if stop.code in (0, None) else f"ended with {stop.code}: {said.getvalue()[-300:]}"
    except BaseException as error:  # noqa: BLE001 - whatever it is, it is the finding
        frames = traceback.extract_tb(error.__traceback__)
        where = " < ".join(f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in reversed(frames[-4:]))
        return f"{path.suffix}: {type(error).__name__}: {str(error)[:200]} at {where}"
    return "taken"


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _child(name: str, number: int, seconds: float, keep: Path, answer: Any) -> None:
    answer.send(run_round(name, number, seconds, keep))


def fuzz(name: str, seconds: float, first_seed: int, keep: Path) -> Tally:
    """Rounds of one reader until the time is over."""
    total, ends, number = Tally(), time.monotonic() + seconds, first_seed * 1_000_000
    context = multiprocessing.get_context("spawn")
    while (left := ends - time.monotonic()) > 1 and len(total.findings) < _MOST_FINDINGS:
        receive, send = context.Pipe(duplex=False)
        child = context.Process(target=_child, args=(name, number, left, keep, send))
        child.start()
        send.close()
        try:
            part = receive.recv()
        except EOFError:
            child.join()
            total.findings[f"round {number}: the process ended with {child.exitcode} (1: over {_LIMIT} s; negative: a signal)"] += 1
        else:
            total.inputs, total.taken, total.refused = total.inputs + part.inputs, total.taken + part.taken, total.refused + part.refused
            total.longest = max(total.longest, part.longest)
            total.findings += part.findings
        child.join()
        number += 1
    return total


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--readers", nargs="+", choices=sorted(READERS), default=list(READERS))
    parser.add_argument("--seconds", type=float, default=600.0, help="time a reader (default 600)")
    parser.add_argument("--seed", type=int, default=0, help="of the inputs (default 0)")
    parser.add_argument("--keep", type=Path, help="folder for the smallest input of each finding (default: a temporary one)")
    options = parser.parse_args()
    wrong, keep = 0, options.keep or Path(tempfile.mkdtemp(prefix="byg-fuzz-found-"))
    keep.mkdir(parents=True, exist_ok=True)
    for name in options.readers:
        tally = fuzz(name, options.seconds, options.seed, keep)
        wrong += len(tally.findings)
        print(
            f"{name}: {tally.inputs} inputs, {tally.taken} taken, {tally.refused} refused, longest {tally.longest:.1f} s, "
            f"{len(tally.findings)} findings",
            flush=True,
        )
        for finding, count in tally.findings.most_common():
            print(f"  {count} x {finding}", flush=True)
    if wrong:
        print(f"the smallest input of each: {keep}")
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
