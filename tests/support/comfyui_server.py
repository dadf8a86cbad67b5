"""ComfyUI's own server, headless on the CPU, with our nodes and those of the tests; graphs go in over its HTTP API.

`COMFYUI_PYTHON` names the Python that has ComfyUI's requirements, else it is this one. Where that Python has no torchvision and
torchaudio, names that ComfyUI imports at its start come from stand-ins.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support import ROOT
from tests.support.comfyui import CHECKOUT, STAND_INS

PYTHON = os.environ.get("COMFYUI_PYTHON", sys.executable)
_SUPPORT = ROOT / "tests" / "support"
_FOLDERS = ("custom_nodes", "input", "output", "temp", "user", "models/diffusion_models", "models/loras", "front")
_STARTS_WITHIN, _RUNS_WITHIN = 180, 280  # seconds

Graph = dict[str, dict[str, Any]]


class Refused(Exception):
    """What a node said, with the node's name in the graph."""


class Server:
    """One process with its base folder."""

    def __init__(self, base: Path, port: int):
        self.base, self.address = base, f"http://127.0.0.1:{port}"

    def ask(self, path: str, body: Any = None) -> Any:
        """A JSON answer."""
        data = None if body is None else json.dumps(body).encode()
        with urlopen(Request(self.address + path, data, {"Content-Type": "application/json"}), timeout=60) as answer:
            return json.load(answer)

    def put(self, name: str, **tensors: Tensor) -> str:
        """A file for the tests' nodes; its name."""
        save_file({key: value.contiguous() for key, value in tensors.items()}, self.base / "input" / name)
        return name

    def result(self, name: str) -> dict[str, Tensor]:
        """What a node of the tests has saved."""
        return load_file(self.base / "output" / name)

    def run(self, graph: Graph) -> dict[str, Any]:
        """Run a graph to its end; its history.

        Raises:
            Refused: a node, or the check before all, says no.
        """
        try:
            number = self.ask("/prompt", {"prompt": graph})["prompt_id"]
        except HTTPError as error:
            raise Refused(error.read().decode()) from error
        until = time.monotonic() + _RUNS_WITHIN
        while time.monotonic() < until:
            if done := self.ask(f"/history/{number}").get(number):
                for kind, message in done["status"]["messages"]:
                    if kind == "execution_error":
                        raise Refused(f"{graph[message['node_id']]['class_type']}: {message['exception_message']}")
                return done
            time.sleep(0.1)
        raise TimeoutError(f"no result within {_RUNS_WITHIN} s")


def page_folder() -> Path | None:
    """The real page's files, where that Python has them."""
    probe = "import importlib.util as u; found = u.find_spec('comfyui_frontend_package'); print(found.origin if found else '')"
    found = subprocess.run([PYTHON, "-c", probe], capture_output=True, text=True, check=True).stdout.strip()
    return Path(found).parent / "static" if found else None


def touch_weights(base: Path, files: Mapping[str, Iterable[str]]) -> None:
    """Empty files, so that their names can be chosen; by the folder of `models`."""
    for folder, names in files.items():
        (base / "models" / folder).mkdir(parents=True, exist_ok=True)
        for name in names:
            (base / "models" / folder / name).touch()


def _environment() -> dict[str, str]:
    probe = "import importlib.util as u; print(u.find_spec('torchvision') is None or u.find_spec('torchaudio') is None)"
    missing = subprocess.run([PYTHON, "-c", probe], capture_output=True, text=True, check=True).stdout.strip() == "True"
    return {**os.environ, "PYTHONPATH": str(STAND_INS) if missing else ""}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def serve(base: Path, page: Path | None = None) -> Iterator[Server]:
    """A server on a base folder, until the block ends; with the real page from its folder, or an empty one."""
    for folder in _FOLDERS:
        (base / folder).mkdir(parents=True, exist_ok=True)
    (base / "front" / "index.html").write_text("<html></html>", encoding="utf-8")
    page = page or base / "front"
    (base / "custom_nodes" / "byg").symlink_to(ROOT / "comfyui", target_is_directory=True)
    (base / "custom_nodes" / "tests").symlink_to(_SUPPORT / "comfyui_nodes", target_is_directory=True)
    port = _free_port()
    command = [PYTHON, str(Path(str(CHECKOUT)).expanduser() / "main.py"), "--cpu", "--disable-auto-launch", "--disable-api-nodes"]
    command += ["--base-directory", str(base), "--front-end-root", str(page), "--port", str(port)]
    command += ["--database-url", "sqlite:///:memory:", "--force-fp32"]
    with (base / "server.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=_environment(), cwd=base)
        try:
            server = Server(base, port)
            _wait(process, server)
            yield server
        finally:
            process.terminate()
            process.wait(timeout=30)
            shutil.rmtree(base / "models")  # gigabytes


def _wait(process: subprocess.Popen[bytes], server: Server) -> None:
    until = time.monotonic() + _STARTS_WITHIN
    while time.monotonic() < until and process.poll() is None:
        try:
            server.ask("/system_stats")
            return
        except URLError:
            time.sleep(0.3)
    raise AssertionError(f"ComfyUI has not started: {(server.base / 'server.log').read_text()[-4000:]}")


# --- graphs ---


def edit_graph(
    model: str,
    source: str | None,
    text: str,
    *,
    steps: int,
    position: str = "same",
    lora: Mapping[str, Any] | None = None,
    negative: str | None = None,
    cfg: float = 1.0,
    seed: int = 5,
    family: str = "as trained",
    strength: float = 1.0,
    out: str = "edit.safetensors",
) -> Graph:
    """An edit of one network, from files of the tests' nodes. Without a source: the model alone, at an empty latent `empty.safetensors`."""
    graph: Graph = {
        "model": {"class_type": "UNETLoader", "inputs": {"unet_name": model, "weight_dtype": "default"}},
        "text": {"class_type": "TestConditioning", "inputs": {"file": text}},
        "noise": {"class_type": "RandomNoise", "inputs": {"noise_seed": seed}},
        "euler": {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "euler"}},
    }
    last = "model"
    if lora is not None:
        graph["lora"] = {"class_type": "BygLoraLoader", "inputs": {"model": [last, 0], "strength": 1.0, **lora}}
        last = "lora"
    latent = ["empty", 0]
    if source is None:
        graph["empty"] = {"class_type": "TestLatent", "inputs": {"file": "empty.safetensors"}}
    else:
        graph["encoded"] = {"class_type": "TestLatent", "inputs": {"file": source}}
        graph["source"] = {
            "class_type": "BygSource",
            "inputs": {"model": [last, 0], "source": ["encoded", 0], "position": position, "strength": strength},
        }
        last, latent = "source", ["source", 1]
    if negative is None:
        graph["guider"] = {"class_type": "BasicGuider", "inputs": {"model": [last, 0], "conditioning": ["text", 0]}}
    else:
        graph["negative"] = {"class_type": "TestConditioning", "inputs": {"file": negative}}
        inputs = {"model": [last, 0], "positive": ["text", 0], "negative": ["negative", 0], "cfg": cfg}
        graph["guider"] = {"class_type": "CFGGuider", "inputs": inputs}
    times = {"model": [last, 0], "latent": latent, "steps": steps, "family": family}
    graph["times"] = {"class_type": "BygSchedule", "inputs": times}
    graph["sample"] = sample_node("noise", "guider", ["times", 0], latent)
    graph["save"] = {"class_type": "TestSave", "inputs": {"latent": ["sample", 0], "model": ["model", 0], "file": out}}
    return graph


def sample_node(noise: str, guider: str, sigmas: list[Any], latent: list[Any]) -> dict[str, Any]:
    """SamplerCustomAdvanced with `euler`."""
    inputs = {"noise": [noise, 0], "guider": [guider, 0], "sampler": ["euler", 0], "sigmas": sigmas, "latent_image": latent}
    return {"class_type": "SamplerCustomAdvanced", "inputs": inputs}
