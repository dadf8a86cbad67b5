"""The workflows that users open are current, whole and open in ComfyUI's page."""

from __future__ import annotations

import json
from typing import Any

import pytest
from PIL import Image

from benchmarks import comfyui_workflows as workflows
from benchmarks.comfyui_graphs import KINDS, NOTE
from byg_plugin.families import SPECS
from comfyui.nodes import NODE_CLASS_MAPPINGS

TASKS = {task.name: task for task in workflows.TASKS}
each = pytest.mark.parametrize("name", list(TASKS))


@each
def test_files_are_current(name: str) -> None:
    for file, text in workflows.files_of(TASKS[name]).items():
        assert (workflows.FOLDER / file).read_text(encoding="utf-8") == text, "run: python -m benchmarks.comfyui_workflows"


@each
def test_the_picture_holds_both_forms(name: str) -> None:
    chunks = Image.open(workflows.FOLDER / f"{name}.png").text  # type: ignore[attr-defined]
    assert json.loads(chunks["prompt"]) == read(f"{name}.api.json")
    assert json.loads(chunks["workflow"]) == read(f"{name}.json")


def test_every_kind_of_family_has_one() -> None:
    architectures = {SPECS[task.family].lora_layout for task in workflows.TASKS}
    assert architectures == {spec.lora_layout for spec in SPECS.values()}
    stems = {path.name.split(".")[0] for path in workflows.FOLDER.iterdir()}
    assert stems == set(TASKS), "files without a task"


def read(name: str) -> Any:
    return json.loads((workflows.FOLDER / name).read_text(encoding="utf-8"))


@each
def test_links_of_the_page_hold_on_both_sides(name: str) -> None:
    page = read(f"{name}.json")
    nodes = {node["id"]: node for node in page["nodes"]}
    for identity, origin, slot, target, position, kind in page["links"]:
        output, entry = nodes[origin]["outputs"][slot], nodes[target]["inputs"][position]
        assert identity in output["links"] and entry["link"] == identity
        assert kind == output["type"] and (entry["type"] in (kind, "*") or "widget" in entry)
    assert sum(len(output["links"] or []) for node in page["nodes"] for output in node["outputs"]) == len(page["links"])
    assert sum(node["type"] == NOTE for node in page["nodes"]) >= 1, "no note"


@each
def test_both_forms_are_one_graph(name: str) -> None:
    server, page = read(f"{name}.api.json"), read(f"{name}.json")
    links = {(str(target), origin, slot) for _, origin, slot, target, _, _ in page["links"]}
    assert links == {
        (number, int(value[0]), value[1]) for number, node in server.items() for value in node["inputs"].values() if isinstance(value, list)
    }
    assert {str(node["id"]): node["type"] for node in page["nodes"] if node["type"] != NOTE} == {
        k: v["class_type"] for k, v in server.items()
    }


@each
def test_sources_and_schedules_reach_the_samplers(name: str) -> None:
    """Nobody samples a model without the source."""
    server = workflows.graph_of(TASKS[name]).for_server()
    guiders = [node for node in server.values() if node["class_type"].endswith("Guider")]
    assert len(guiders) == (2 if TASKS[name].model_low else 1)
    for guider in guiders:
        assert server[guider["inputs"]["model"][0]]["class_type"] == "BygSource"
    first = next(node for node in server.values() if node["class_type"] == "SamplerCustomAdvanced")
    assert first["inputs"]["latent_image"][0] == next(key for key, node in server.items() if node["class_type"] == "BygSource")


@pytest.mark.parametrize("kind", list(NODE_CLASS_MAPPINGS))
def test_our_nodes_are_described_as_they_are(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    from types import SimpleNamespace

    monkeypatch.setitem(sys.modules, "folder_paths", SimpleNamespace(get_filename_list=lambda folder: []))
    node = NODE_CLASS_MAPPINGS[kind]
    declared = node.INPUT_TYPES()
    names = [*declared["required"], *declared.get("optional", {})]
    inputs, outputs = KINDS[kind]
    assert list(inputs) == names
    assert list(outputs) == list(getattr(node, "RETURN_NAMES", node.RETURN_TYPES))
    assert len(node.RETURN_TYPES) == len(outputs)
