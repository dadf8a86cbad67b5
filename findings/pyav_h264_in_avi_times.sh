#!/usr/bin/env bash
# An .avi has no presentation times: of H.264 with B-frames in it, FFmpeg takes a packet's place in decode order for its time. PyAV 18.1.0
# gives the frames in the order in which they are shown, but `frame.time` goes back and forth; in an .mp4 of the same packets it rises. A
# reader that picks frames by their times (one for every 1/16 s, say) repeats some and drops others without a word. The k-th frame with
# the k-th smallest time is right.
#
# Seen (16 frames a second, each frame's number drawn as its grey; times in sixteenths):
#   mp4 greys [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11] times [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]
#   avi greys [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11] times [0, 2, 3, 1, 5, 6, 4, 8, 9, 7, 11, 10]
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet av==18.1.0 numpy==2.4.6
cd "$place"
"$place/venv/bin/python" - <<'PYTHON'
import av
import numpy as np


def write(name):
    with av.open(name, "w") as container:
        stream = container.add_stream("libx264", rate=16)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.options = {"bf": "2", "crf": "1", "b-pyramid": "none", "b-adapt": "0"}
        for index in range(12):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((48, 64, 3), 20 * index, np.uint8), format="rgb24")))
        container.mux(stream.encode())


def read(name):
    with av.open(name) as container:
        frames = list(container.decode(video=0))
    first = min(frame.time for frame in frames)
    greys = [round(float(frame.to_ndarray(format="rgb24").mean()) / 20) for frame in frames]
    return greys, [round((frame.time - first) * 16) for frame in frames]


for kind in ("mp4", "avi"):
    write(f"a.{kind}")
    greys, times = read(f"a.{kind}")
    print(kind, "greys", greys, "times", times)
    assert greys == list(range(12)), "this has changed"
    assert (times == sorted(times)) == (kind == "mp4"), "this has changed"
PYTHON
