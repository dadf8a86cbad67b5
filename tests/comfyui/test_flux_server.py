"""FLUX.1 of real width in ComfyUI's own server: its latents are `edit.py`'s."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from byg_plugin.sampling import seeded_noise
from tests.support import comfyui_bases as bases
from tests.support.comfyui import MARKS
from tests.support.comfyui_server import Refused, Server, edit_graph, serve

pytestmark = [*MARKS, pytest.mark.timeout(900)]
H, W, STEPS, SEED = 8, 12, 3, 5
LAYERS = [
    "transformer_blocks.0.attn.to_q",
    "transformer_blocks.0.attn.add_v_proj",
    "transformer_blocks.0.ff.net.2",
    "single_transformer_blocks.0.attn.to_k",
    "single_transformer_blocks.0.proj_out",
]
FACTOR, SHIFT = 0.3611, 0.1159  # of FLUX.1's latents


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """A server with a base, a LoRA of each position and inputs; our network beside it."""
    folder = tmp_path_factory.mktemp("comfyui")
    network = bases.flux()
    text = {"t5": random(1, 1, bases.TEXT_TOKENS, bases.TEXT), "pooled": random(2, 1, bases.TEXT)}
    source = random(3, 1, 16, H, W)  # as the network sees it
    lora = bases.lora_of(network, LAYERS, 4)
    with serve(folder) as server:
        bases.save_base(network, "flux", folder / "models/diffusion_models/base.safetensors")
        for position in ("same", "kontext"):
            config = bases.config_of("flux", folder, conditioning={"position": position, "guidance": 3.5})
            save_file(lora, folder / f"models/loras/{position}.safetensors", bases.card_metadata(config))
        server.put("text.safetensors", cross=text["t5"], pooled=text["pooled"])
        server.put("source.safetensors", samples=source / FACTOR + SHIFT)
        server.put("two.safetensors", samples=torch.cat([source, source]) / FACTOR + SHIFT)
        server.put("large.safetensors", samples=random(6, 1, 16, H, W + 4))
        server.put("empty.safetensors", samples=torch.zeros(1, 16, H, W))
        yield SimpleNamespace(server=server, network=network, text=text, source=source, lora=lora, folder=folder)


def ours(world: SimpleNamespace, position: str, lora: float, *, with_source: bool = True) -> Tensor:
    config = bases.config_of("flux", world.folder, conditioning={"position": position, "guidance": 3.5})
    noise = seeded_noise((1, 16, 1, H, W), SEED, torch.device("cpu"))
    bases.merged(world.network, world.lora, lora)
    try:
        source = world.source.unsqueeze(2) if with_source else None
        return bases.edited(config, {"transformer": world.network}, noise, world.text, source, STEPS)[:, :, 0]
    finally:
        bases.merged(world.network, world.lora, -lora)


def theirs(server: Server, **graph: object) -> Tensor:
    server.run(edit_graph("base.safetensors", text="text.safetensors", steps=STEPS, seed=SEED, **graph))  # type: ignore[arg-type]
    return server.result("edit.safetensors")["scaled"]


@pytest.mark.parametrize("position", ["same", "kontext"])
def test_an_edit_without_lora_is_ours(world: SimpleNamespace, position: str) -> None:
    edit = theirs(world.server, source="source.safetensors", position=position)
    bases.close(edit, ours(world, position, 0.0))


@pytest.mark.parametrize("position", ["same", "kontext"])
def test_an_edit_with_lora_is_ours(world: SimpleNamespace, position: str) -> None:
    """The position comes from the card in the file."""
    lora = {"lora": f"{position}.safetensors"}
    edit, wanted = theirs(world.server, source="source.safetensors", position="as trained", lora=lora), ours(world, position, 1.0)
    assert (wanted - ours(world, position, 0.0)).abs().max() > 0.1, "the LoRA has no effect"
    bases.close(edit, wanted)


def test_the_position_can_be_plugged_in(world: SimpleNamespace) -> None:
    graph = edit_graph("base.safetensors", "source.safetensors", "text.safetensors", steps=STEPS, lora={"lora": "kontext.safetensors"})
    graph["source"]["inputs"]["position"] = ["lora", 2]
    world.server.run(graph)
    bases.close(world.server.result("edit.safetensors")["scaled"], ours(world, "kontext", 1.0))


def test_strength_0_of_the_lora_is_the_base(world: SimpleNamespace) -> None:
    plain = theirs(world.server, source="source.safetensors", position="same")
    off = theirs(world.server, source="source.safetensors", position="as trained", lora={"lora": "same.safetensors", "strength": 0.0})
    assert torch.equal(off, plain)


def test_strength_0_of_the_source_is_the_model_without_it(world: SimpleNamespace) -> None:
    """Also after edits: a patch of a clone leaves the model as it was."""
    text_to_image = theirs(world.server, source=None)
    bases.close(text_to_image, ours(world, "same", 0.0, with_source=False))
    assert torch.equal(theirs(world.server, source="source.safetensors", strength=0.0), text_to_image)
    assert (theirs(world.server, source="source.safetensors") - text_to_image).abs().max() > 0.1


def test_a_strength_between_mixes_velocities(world: SimpleNamespace) -> None:
    """One step is linear in the velocity."""
    graphs = [edit_graph("base.safetensors", "source.safetensors", "text.safetensors", steps=1, strength=s) for s in (0.0, 0.25, 1.0)]
    edits = []
    for graph in graphs:
        world.server.run(graph)
        edits.append(world.server.result("edit.safetensors")["scaled"])
    torch.testing.assert_close(edits[1], 0.75 * edits[0] + 0.25 * edits[2], rtol=0, atol=1e-4)
    assert (edits[2] - edits[0]).abs().max() > 0.1


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"source.source": None}, "Required input is missing"),
        ({"source.source": "large.safetensors"}, "sample ByG Source's own `latent`"),
        ({"source.source": "two.safetensors"}, "2 sources and 1 pictures"),
        ({"source.source": "empty.safetensors"}, "the source latent is empty"),
        ({"source.position": "bernini"}, "not one of this model's: same, kontext"),
        ({"source.position": "as trained"}, "choose the position"),
    ],
)
def test_bad_input_is_told_in_a_node(world: SimpleNamespace, changes: dict[str, str | None], says: str) -> None:
    graph = edit_graph("base.safetensors", "source.safetensors", "text.safetensors", steps=1)
    graph["empty"] = {"class_type": "TestLatent", "inputs": {"file": "empty.safetensors"}}
    graph["sample"]["inputs"]["latent_image"] = graph["times"]["inputs"]["latent"] = ["empty", 0]
    for key, value in changes.items():
        node, name = key.split(".")
        if value is None:
            del graph[node]["inputs"][name]
        elif name == "source":
            graph["encoded"]["inputs"]["file"] = value
        else:
            graph[node]["inputs"][name] = value
    with pytest.raises(Refused) as refused:
        world.server.run(graph)
    assert says in str(refused.value)


def test_a_lora_that_does_not_fit_is_told_in_its_node(world: SimpleNamespace) -> None:
    loras = world.folder / "models/loras"
    config = bases.config_of("flux", world.folder)
    names = {"narrow": {key: tensor[:, :-1] if "lora_A" in key else tensor for key, tensor in world.lora.items()}}
    names["unknown"] = {key.replace("transformer_blocks.0", "transformer_blocks.30"): tensor for key, tensor in world.lora.items()}
    for name, tensors in names.items():
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, loras / f"{name}.safetensors", bases.card_metadata(config))
    save_file(world.lora, loras / "foreign.safetensors", bases.card_metadata(config, family="krea2", position="same"))
    save_file(world.lora, loras / "bare.safetensors", {"format": "pt"})
    for name, says in (
        ("narrow", "5 of its 5 layers do not fit"),
        ("unknown", "5 of its 5 layers are not in the connected model"),
        ("foreign", "was trained for krea2"),
        ("bare", "has no ByG card"),
    ):
        with pytest.raises(Refused) as refused:
            theirs(world.server, source="source.safetensors", lora={"lora": f"{name}.safetensors"})
        assert "BygLoraLoader" in str(refused.value) and says in str(refused.value)


def test_an_edit_lora_without_a_source_makes_no_picture(world: SimpleNamespace) -> None:
    """The loader's model goes into the guider itself; a reference latent of ComfyUI's own is a source too."""
    graph = edit_graph("base.safetensors", None, "text.safetensors", steps=1, lora={"lora": "kontext.safetensors"})
    with pytest.raises(Refused, match="connect ByG Source"):
        world.server.run(graph)
    graph["encoded"] = {"class_type": "TestLatent", "inputs": {"file": "source.safetensors"}}
    graph["reference"] = {"class_type": "ReferenceLatent", "inputs": {"conditioning": ["text", 0], "latent": ["encoded", 0]}}
    graph["guider"]["inputs"]["conditioning"] = ["reference", 0]
    world.server.run(graph)


def test_two_loras_that_were_trained_otherwise_do_not_mix(world: SimpleNamespace) -> None:
    graph = edit_graph("base.safetensors", "source.safetensors", "text.safetensors", steps=1, lora={"lora": "kontext.safetensors"})
    inputs = {"model": ["lora", 0], "lora": "kontext.safetensors", "strength": 0.5}
    graph["second"] = {"class_type": "BygLoraLoader", "inputs": inputs}
    graph["source"]["inputs"].update(model=["second", 0], position="as trained")
    world.server.run(graph)
    inputs["lora"] = "same.safetensors"
    with pytest.raises(Refused, match="same.safetensors .flux, same. does not go with the LoRA that is loaded before it .flux, kontext."):
        world.server.run(graph)


def test_inputs_of_another_type_are_refused_before_all(world: SimpleNamespace) -> None:
    """ByG Source checks them itself, because ComfyUI leaves all to a node that lets the loader's position in."""
    for name, value, says in (
        ("model", ["encoded", 0], "model takes MODEL, not LATENT"),
        ("source", ["lora", 0], "source takes LATENT, not MODEL"),
        ("position", ["lora", 4], "position takes ByG LoRA Loader's position, not FLOAT"),
    ):
        graph = edit_graph("base.safetensors", "source.safetensors", "text.safetensors", steps=1, lora={"lora": "same.safetensors"})
        graph["source"]["inputs"][name] = value
        with pytest.raises(Refused, match=says):
            world.server.run(graph)


def test_a_lora_that_was_trained_on_is_read_anew(world: SimpleNamespace) -> None:
    """ComfyUI keeps what a node gave as long as its inputs are the same."""
    path = world.folder / "models/loras/again.safetensors"
    metadata = bases.card_metadata(bases.config_of("flux", world.folder))
    save_file({key: torch.zeros_like(tensor) for key, tensor in world.lora.items()}, path, metadata)
    before = theirs(world.server, source="source.safetensors", position="as trained", lora={"lora": "again.safetensors"})
    save_file(world.lora, path, metadata)
    after = theirs(world.server, source="source.safetensors", position="as trained", lora={"lora": "again.safetensors"})
    assert (after - before).abs().max() > 0.1
