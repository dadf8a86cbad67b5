"""Graphs of ComfyUI in its two forms: what its server runs, and what its page shows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# Inputs in the order of the page: those in capitals are connected, others are widgets (a connected widget stands among both).
# Outputs by name and type.
Kind = tuple[dict[str, str], dict[str, str]]
MODEL, CLIP, VAE, IMAGE, LATENT, CONDITIONING = "MODEL", "CLIP", "VAE", "IMAGE", "LATENT", "CONDITIONING"
SIGMAS, GUIDER, NOISE, SAMPLER, VIDEO = "SIGMAS", "GUIDER", "NOISE", "SAMPLER", "VIDEO"
KINDS: dict[str, Kind] = {
    "UNETLoader": ({"unet_name": "combo", "weight_dtype": "combo"}, {"MODEL": MODEL}),
    "CLIPLoader": ({"clip_name": "combo", "type": "combo", "device": "combo"}, {"CLIP": CLIP}),
    "DualCLIPLoader": ({"clip_name1": "combo", "clip_name2": "combo", "type": "combo", "device": "combo"}, {"CLIP": CLIP}),
    "T5TokenizerOptions": ({"clip": CLIP, "min_padding": "int", "min_length": "int"}, {"CLIP": CLIP}),
    "VAELoader": ({"vae_name": "combo"}, {"VAE": VAE}),
    "LoadImage": ({"image": "combo"}, {"IMAGE": IMAGE, "MASK": "MASK"}),
    "LoadVideo": ({"file": "combo"}, {"VIDEO": VIDEO}),
    "GetVideoComponents": ({"video": VIDEO}, {"images": IMAGE, "audio": "AUDIO", "fps": "FLOAT"}),
    "CLIPTextEncode": ({"text": "string", "clip": CLIP}, {"CONDITIONING": CONDITIONING}),
    "FluxGuidance": ({"conditioning": CONDITIONING, "guidance": "float"}, {"CONDITIONING": CONDITIONING}),
    "VAEEncode": ({"pixels": IMAGE, "vae": VAE}, {"LATENT": LATENT}),
    "VAEDecode": ({"samples": LATENT, "vae": VAE}, {"IMAGE": IMAGE}),
    "RandomNoise": ({"noise_seed": "int", "control_after_generate": "page"}, {"NOISE": NOISE}),
    "DisableNoise": ({}, {"NOISE": NOISE}),
    "BasicGuider": ({"model": MODEL, "conditioning": CONDITIONING}, {"GUIDER": GUIDER}),
    "CFGGuider": ({"model": MODEL, "positive": CONDITIONING, "negative": CONDITIONING, "cfg": "float"}, {"GUIDER": GUIDER}),
    "SamplerCustomAdvanced": (
        {"noise": NOISE, "guider": GUIDER, "sampler": SAMPLER, "sigmas": SIGMAS, "latent_image": LATENT},
        {"output": LATENT, "denoised_output": LATENT},
    ),
    "SaveImage": ({"images": IMAGE, "filename_prefix": "string"}, {}),
    "CreateVideo": ({"images": IMAGE, "fps": "float", "audio": "AUDIO"}, {"VIDEO": VIDEO}),
    "SaveVideo": ({"video": VIDEO, "filename_prefix": "string", "format": "combo", "codec": "combo"}, {}),
    "PreviewAny": ({"source": "*"}, {"STRING": "STRING"}),
    "MarkdownNote": ({"text": "string"}, {}),
    "BygLoraLoader": (
        {"model": MODEL, "lora": "combo", "strength": "float", "model_low": MODEL, "lora_low": "combo", "strength_low": "float"},
        {
            "model": MODEL,
            "model_low": MODEL,
            "position": "COMBO",
            "guidance": "FLOAT",
            "cfg": "FLOAT",
            "cfg_low": "FLOAT",
            "steps": "INT",
            "shift": "FLOAT",
            "report": "STRING",
            "sampler": SAMPLER,
        },
    ),
    "BygSource": (
        {"model": MODEL, "source": LATENT, "position": "combo", "strength": "float", "model_low": MODEL},
        {"model": MODEL, "latent": LATENT, "model_low": MODEL},
    ),
    "BygSchedule": (
        {"model": MODEL, "latent": LATENT, "steps": "int", "family": "combo"},
        {"sigmas": SIGMAS, "sigmas_high": SIGMAS, "sigmas_low": SIGMAS},
    ),
    "BygSize": (
        {"image": IMAGE, "model": MODEL, "family": "combo", "resolution": "int"},
        {"image": IMAGE, "width": "INT", "height": "INT"},
    ),
    "BygSizeBack": ({"edit": IMAGE, "original": IMAGE}, {"IMAGE": IMAGE}),
}
NOTE = "MarkdownNote"
_COLUMN, _ROW, _GAP, _WIDTH = 400, 26, 70, 330  # pixels of the page


@dataclass(frozen=True)
class Out:
    """An output of a node."""

    node: int
    slot: int


@dataclass
class Node:
    """One node of a graph: values and connections by the inputs' names."""

    kind: str
    title: str | None
    column: int
    inputs: dict[str, Any]
    rows: int


@dataclass
class Graph:
    """A graph that is built node by node."""

    nodes: list[Node] = field(default_factory=list)

    def add(self, kind: str, column: int, *, title: str | None = None, **inputs: Any) -> dict[str, Out]:
        """Its outputs by name. Widgets of the page that are not given are connected."""
        wanted, outputs = KINDS[kind]
        assert inputs.keys() <= wanted.keys(), (kind, inputs.keys() - wanted.keys())
        rows = 2 + max(len(wanted), len(outputs)) + (len(str(inputs.get("text", ""))) // 40 if "text" in inputs else 0)
        self.nodes.append(Node(kind, title, column, inputs, rows))
        return {name: Out(len(self.nodes), slot) for slot, name in enumerate(outputs)}

    def for_server(self) -> dict[str, Any]:
        """The form of the HTTP API. Notes are no part of it."""
        graph = {}
        for number, node in enumerate(self.nodes, start=1):
            if node.kind == NOTE:
                continue
            page_only = {name for name, kind in KINDS[node.kind][0].items() if kind == "page"}
            inputs = {name: _linked(value) for name, value in node.inputs.items() if name not in page_only}
            graph[str(number)] = {"class_type": node.kind, "inputs": inputs, "_meta": {"title": node.title or node.kind}}
        return graph

    def for_page(self) -> dict[str, Any]:
        """The form that the page saves and opens."""
        links: list[list[Any]] = []
        nodes = [self._page_node(number, node, links) for number, node in enumerate(self.nodes, start=1)]
        for identity, origin, slot, *_ in links:
            outputs = nodes[origin - 1]["outputs"][slot]
            outputs["links"] = [*(outputs["links"] or []), identity]
        _place(self.nodes, nodes)
        return {
            "last_node_id": len(nodes),
            "last_link_id": len(links),
            "nodes": nodes,
            "links": links,
            "groups": [],
            "config": {},
            "extra": {},
            "version": 0.4,
        }

    def _page_node(self, number: int, node: Node, links: list[list[Any]]) -> dict[str, Any]:
        wanted, outputs = KINDS[node.kind]
        slots: list[dict[str, Any]] = []
        values: list[Any] = []
        for name, kind in wanted.items():
            value = node.inputs.get(name)
            is_widget = kind.islower()
            if is_widget:
                values.append(_default(kind) if isinstance(value, Out) else value)
            if isinstance(value, Out) or not is_widget:
                slots.append(self._slot(number, len(slots), name, kind, value, links))
        if node.kind == "LoadImage":
            values.append("image")  # its button for uploads
        if node.kind == "LoadVideo":
            values.append("image")
        return {
            "id": number,
            "type": node.kind,
            "pos": [0, 0],
            "size": [_WIDTH, node.rows * _ROW],
            "flags": {},
            "order": number - 1,
            "mode": 0,
            "inputs": slots,
            "outputs": [{"name": name, "type": kind, "links": None} for name, kind in outputs.items()],
            "properties": {} if node.kind == NOTE else {"Node name for S&R": node.kind},
            "widgets_values": values,
            **({"title": node.title} if node.title else {}),
        }

    def _slot(self, number: int, slot: int, name: str, kind: str, value: Any, links: list[list[Any]]) -> dict[str, Any]:
        made: dict[str, Any] = {"name": name, "type": kind.upper(), "link": None}
        if kind.islower():
            made["widget"] = {"name": name}
        if isinstance(value, Out):
            output = list(KINDS[self.nodes[value.node - 1].kind][1].values())[value.slot]
            links.append([len(links) + 1, value.node, value.slot, number, slot, output])
            made["link"] = len(links)
        return made


def _linked(value: Any) -> Any:
    return [str(value.node), value.slot] if isinstance(value, Out) else value


def _default(kind: str) -> Any:
    """Of a widget whose value comes by a connection."""
    return {"int": 0, "float": 0.0}.get(kind, "")


def _place(nodes: list[Node], page: list[dict[str, Any]]) -> None:
    """Columns from left to right, in each one node under the other."""
    below: dict[int, int] = {}
    for node, made in zip(nodes, page, strict=True):
        top = below.get(node.column, 0)
        made["pos"] = [node.column * _COLUMN, top]
        below[node.column] = top + node.rows * _ROW + _GAP


def compact(value: Mapping[str, Any]) -> str:
    """JSON for a file that people compare line by line."""
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"
