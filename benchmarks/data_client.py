"""What the tuple generator's client, or the judge's, can do, the server's time left out: a local stub answers at once.

    python -m benchmarks.data_client [--judge] [--images 400] [--in-flight 32]

Two runs of different length are compared, so that start and closing plot do not count. CPU seconds are the client's
own; images a second come from the wall clock of two cores that client and stub share. Writes results/data_client.json, with
--judge results/judge_client.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks import provenance
from benchmarks.provenance import ROOT

RESULTS = ROOT / "benchmarks" / "results"
SIDE = 512


def write_images(folder: Path, count: int, suffix: str) -> None:
    """Images of 512 x 512 pixels with the detail of a photo, and captions that number them."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(count):
        smooth = Image.fromarray(rng.integers(0, 255, (24, 24, 3), dtype=np.uint8)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        noisy = np.asarray(smooth, dtype=np.int16) + rng.integers(-12, 13, (SIDE, SIDE, 3))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"p{number:05d}{suffix}", quality=90)
        (folder / f"p{number:05d}.txt").write_text(f"photo number {number} of a red car")


def tool(work: Path, judge: bool) -> list[str]:
    """The command of a client over the images of a folder; the judge takes each as the edit of the next."""
    images = work / "images"
    if not judge:
        return ["generate_edits", "--images", str(images)]
    names = sorted(path for path in images.iterdir() if path.suffix != ".txt")
    texts = {"src_caption": "a red car", "tgt_caption": "a blue car", "reverse_instruction": "paint it red"}
    with (work / "tuples.jsonl").open("w") as file:
        for number, (edit, source) in enumerate(zip(names, names[1:] + names[:1], strict=True)):
            record = {"id": edit.stem, "source": str(source), "instruction": f"paint car number {number} blue", **texts}
            file.write(json.dumps(record) + "\n")
    return ["judge", "--tuples", str(work / "tuples.jsonl"), "--results", str(images)]


def one_run(work: Path, tool: list[str], limit: int, in_flight: int, url: str) -> dict[str, float]:
    """Wall and CPU seconds of the client over `limit` requests."""
    out = work / f"{limit}.jsonl"
    name, *words = tool
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "dataset_tools" / f"{name}.py"), *words, "--out", str(out), "--limit", str(limit)]
        + ["--base-url", url, "--in-flight", str(in_flight)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0 and sum(1 for _ in out.open()) == limit
    return {"wall": time.monotonic() - started, "cpu": usage.ru_utime + usage.ru_stime, "peak_mib": usage.ru_maxrss / 1024}


def measure_memory(counts: tuple[int, int]) -> dict[str, float]:
    """Peak MiB of the client over tables of so many rows, by rules: images that are not there end as rejects."""
    peaks = {}
    with tempfile.TemporaryDirectory() as name:
        for count in counts:
            table, out = Path(name) / f"{count}.csv", Path(name) / f"{count}.jsonl"
            table.write_text("image,caption\n" + "".join(f"p{number}.jpg,a red car number {number}\n" for number in range(count)))
            command = [str(ROOT / "dataset_tools" / "generate_edits.py"), "--images", str(table), "--out", str(out)]
            process = subprocess.Popen(
                [sys.executable, *command, "--backend", "rules"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            _, _, usage = os.wait4(process.pid, 0)
            assert sum(1 for _ in out.with_name(f"{count}.rejects.jsonl").open()) == count
            peaks[str(count)] = round(usage.ru_maxrss / 1024, 1)
    return peaks


def measure(suffix: str, images: int, in_flight: int, judge: bool) -> dict[str, Any]:
    """The marginal cost of a request: of an image, or of one question about an edit, of which each has two."""
    short = max(20, images // 8)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        write_images(work / "images", images, suffix)
        (work / "plan.json").write_text(json.dumps({"mode": "good"}))
        command = [sys.executable, "-m", "tests.support.stub_server", str(work / "plan.json")]
        stub = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        try:
            assert stub.stdout
            url = f"http://127.0.0.1:{int(stub.stdout.readline())}/v1"
            words = tool(work, judge)
            first, second = (one_run(work, words, count, in_flight, url) for count in (short, images))
        finally:
            stub.kill()
            stub.communicate()
    more = images - short
    return {
        "images": suffix,
        "side": SIDE,
        "in_flight": in_flight,
        "count": more,
        "cpu_ms_an_image": round(1000 * (second["cpu"] - first["cpu"]) / more, 2),
        "images_a_second_a_core": round(more / (second["cpu"] - first["cpu"]), 1),
        "images_a_second_wall": round(more / (second["wall"] - first["wall"]), 1),
        "peak_mib": {str(short): round(first["peak_mib"], 1), str(images): round(second["peak_mib"], 1)},
    }


def main() -> None:
    """The command; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--judge", action="store_true")
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--in-flight", type=int, default=32)
    args = parser.parse_args()
    head, changed = provenance.commit("dataset_tools", "byg_plugin/data", "benchmarks/data_client.py")
    result = {
        "what": f"{'judge' if args.judge else 'generate_edits'}.py against a local stub server that answers at once",
        "commit": head[:10] + ("-changed" if changed else ""),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "load_before": [round(value, 1) for value in os.getloadavg()],
        **({} if args.judge else {"peak_mib_by_rows": measure_memory((2_000, 100_000))}),
        "runs": [measure(suffix, args.images, args.in_flight, args.judge) for suffix in (".jpg", ".png")],
    }
    file = RESULTS / ("judge_client.json" if args.judge else "data_client.json")
    file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
