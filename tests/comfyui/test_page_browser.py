"""ComfyUI's own page opens the workflows, as JSON and as the picture that is dropped on it, and sends what the server's form says."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image
from playwright.sync_api import Browser, Page

from benchmarks import comfyui_workflows as workflows
from tests.support.browser import browser as browser
from tests.support.comfyui import MARKS
from tests.support.comfyui_server import page_folder, serve, touch_weights

pytestmark = [*MARKS, pytest.mark.timeout(600)]
_PATIENCE = 120_000  # milliseconds
_OPEN = {
    "json": "async text => { await window.app.loadGraphData(JSON.parse(text)) }",
    "png": """async text => {
        const bytes = Uint8Array.from(atob(text), letter => letter.charCodeAt(0))
        await window.app.handleFile(new File([bytes], 'workflow.png', {type: 'image/png'}))
    }""",
}
_SENT = "async () => (await window.app.graphToPrompt()).output"
_OTHER_NAMES = {("SaveVideo", "codec")}  # `format.codec` since 2026; the server takes both


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, browser: Browser) -> Iterator[Page]:
    front = page_folder()
    if front is None:
        pytest.skip("COMFYUI_PYTHON has no comfyui-frontend-package")
    folder = tmp_path_factory.mktemp("comfyui")
    for task in workflows.TASKS:
        touch_weights(folder, task.weights)
    with serve(folder, front) as server:
        Image.new("RGB", (64, 64)).save(folder / "input" / "example.png")
        (folder / "input" / "source.mp4").touch()
        opened = browser.new_page()
        opened.set_default_timeout(_PATIENCE)
        opened.goto(server.address)
        opened.wait_for_function("!!(window.app?.graph && window.LiteGraph?.registered_node_types.BygSource)")
        yield opened
        opened.close()


@pytest.mark.parametrize("form", list(_OPEN))
@pytest.mark.parametrize("name", [task.name for task in workflows.TASKS])
def test_the_page_sends_what_it_is_given(page: Page, name: str, form: str) -> None:
    path = workflows.FOLDER / f"{name}.{form}"
    page.evaluate("() => window.app.graph.clear()")
    page.evaluate(_OPEN[form], base64.b64encode(path.read_bytes()).decode() if form == "png" else path.read_text(encoding="utf-8"))
    wanted = json.loads((workflows.FOLDER / f"{name}.api.json").read_text(encoding="utf-8"))
    page.wait_for_function("count => window.app.graph.nodes.length > count", arg=len(wanted))  # and a note
    sent: dict[str, Any] = page.evaluate(_SENT)
    assert {number: node["class_type"] for number, node in sent.items()} == {number: node["class_type"] for number, node in wanted.items()}
    for number, node in wanted.items():
        for key, value in node["inputs"].items():
            if (node["class_type"], key) not in _OTHER_NAMES:
                assert sent[number]["inputs"][key] == value, (node["class_type"], key)
