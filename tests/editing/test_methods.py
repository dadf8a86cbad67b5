"""Baselines by edit.py: the same tuples, seeds, sizes and manifest as the trained editor's."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from byg_plugin import edit, sampling
from byg_plugin.config.loading import parse_config
from byg_plugin.config.sections import Config
from byg_plugin.data.buckets import to_tensor
from byg_plugin.data.tuples import EditTuple
from byg_plugin.editing.copies import Copies
from byg_plugin.editing.jobs import Job
from byg_plugin.editing.manifest import read_manifest
from byg_plugin.editing.methods import Base, FlowEdit, Lora
from byg_plugin.editing.pipeline import EditPipeline
from byg_plugin.families import named
from byg_plugin.images import to_pil
from byg_plugin.lora.card import LoraCard
from byg_plugin.models import make_family
from tests.support.clip_files import encode, shades
from tests.support.editing import CPU, difference, photo
from tests.support.tiny import make_host, model_folder, tiny_config, tiny_texts, workspace
from tests.support.tiny_flux2 import flux2_folder
from tests.support.tiny_qwen import krea2_folder, qwen_folder
from tests.support.tiny_wan import A14B, T2V, wan_config, wan_folder, wan_latents, wan_texts
from tests.support.tiny_zimage import zimage_folder

TUPLES = ("--tuples", workspace() / "tuples.jsonl")
FOLDERS = {
    "flux": model_folder,
    "flux2-klein-4b": flux2_folder,
    "z-image": zimage_folder,
    "qwen-image": qwen_folder,
    "krea2": krea2_folder,
    A14B: wan_folder,
    T2V: lambda: wan_folder(1),
}


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    sections = {
        "model": {"path": str(model_folder()), "dtype": "float32", "device": "cpu"},
        "dataset": {"tuples": "unused", "cache_dir": "unused", "image_root": str(workspace()), "resolution": 64},
        "conditioning": {"max_text_tokens": 8},
        "train": {"steps": 1, "mixed_precision": "no"},
        "sample": {"steps": 2},
        "output": {"dir": "unused"},
    }
    lines = [f"[{name}]\n" + "\n".join(f"{k} = {json.dumps(v)}" for k, v in values.items()) for name, values in sections.items()]
    (tmp_path / "run.toml").write_text("\n".join(lines), encoding="utf-8")
    return tmp_path / "run.toml"


def run(monkeypatch: pytest.MonkeyPatch, method: str, *words: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["edit.py", "--method", method, *map(str, words)])
    edit.main()


def config_of(family: str, **sections: dict[str, Any]) -> Config:
    raw: dict[str, dict[str, Any]] = {
        "model": {"family": family, "path": str(FOLDERS[family]()), "dtype": "float32", "device": "cpu"},
        "dataset": {"tuples": "t", "cache_dir": "c", "resolution": 64},
        "conditioning": {"max_text_tokens": 8},
        "train": {"steps": 1, "mixed_precision": "no"},
        "output": {"dir": "o"},
    }
    return parse_config(raw | sections)


def test_the_methods_make_the_same_items_with_the_same_seeds_and_sizes(
    toml: Path, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    common = ("--config", toml, *TUPLES, "--seed", 5)
    own = {"lora": ("--lora", lora), "base": ("--batch-size", 2), "copy": (), "flowedit": ("--steps", 3, "--batch-size", 2)}
    made = {}
    for method, words in own.items():
        run(monkeypatch, method, *common, *words, "--out", tmp_path / method)
        made[method] = sorted(read_manifest(tmp_path / method), key=lambda one: one.edit.name)
        before = {path: path.stat().st_mtime_ns for path in (tmp_path / method).iterdir()}
        run(monkeypatch, method, *common, *words, "--out", tmp_path / method, "--skip-done")
        assert {path: path.stat().st_mtime_ns for path in (tmp_path / method).iterdir()} == before
    for method, edits in made.items():
        assert [(one.id, one.edit.name, one.seed, one.size, one.source) for one in edits] == [
            (one.id, one.edit.name, one.seed, one.size, one.source) for one in made["lora"]
        ]
        for one in edits:
            with Image.open(one.edit) as image, Image.open(one.side_by_side) as pair:
                assert image.size == one.size and pair.size == (2 * one.size[0] + 4, one.size[1])
                assert json.loads(image.text["byg"])["method"] == one.settings["method"] == method
        assert (edits[0].card == LoraCard()) == (method != "lora")
    for one in made["copy"]:
        source = Image.open(one.side_by_side).crop((0, 0, *one.size))
        assert difference(source, Image.open(one.edit)) == 0
    first = {method: Image.open(edits[0].edit) for method, edits in made.items()}
    assert min(difference(first["copy"], first[method]) for method in ("lora", "base", "flowedit")) > 0
    assert made["base"][0].settings | {"version": ""} == {
        **dict.fromkeys(("lora", "strength", "cfg_high_noise", "cfg_low_noise", "negative")),
        **{"method": "base", "steps": 2, "schedule": "shifted", "guidance": 3.5, "solver": "auto", "version": ""},
        **{"base": model_folder().name, "dtype": "float32", "quantization": "none"},
    }
    settings = made["flowedit"][0].settings
    assert {name: settings[name] for name in ("steps", "n_max", "n_min", "n_avg", "source_guidance", "target_guidance", "guidance")} == {
        **{"steps": 3, "n_max": 3, "n_min": 0, "n_avg": 1, "source_guidance": 1.5, "target_guidance": 5.5, "guidance": None}
    }


def test_the_base_paints_the_target_caption_from_the_seed_alone():
    config = config_of("flux")
    pipe = EditPipeline.from_base(config, Base())
    (_, one), (_, other) = (pipe.batch([photo(0)], [text], seeds=[3], steps=2)[0] for text in ("photo of a dog", "photo of a cat"))
    assert difference(one, other) > 0
    blank = Image.new("RGB", (64, 64), "white")
    (_, again), (_, elsewhere) = (
        pipe.batch([source], ["photo of a dog"], seeds=[seed], steps=2)[0] for source, seed in ((blank, 3), (blank, 4))
    )
    assert difference(one, again) == 0 and difference(one, elsewhere) > 0
    family = make_family(config)
    network = next(network for _, network in family.load_transformers(torch.float32))
    text = family.encode_texts(family.load_text_encoders(CPU), ["photo of a dog"])
    noise = sampling.seeded_noise((1, 16, 1, 8, 8), 3, CPU)
    nodes = sampling.sampling_nodes(family, 2, "shifted", tuple(noise.shape))
    latents = sampling.sample(lambda x, t, text, source: family.velocity(network, x, t, text, source), noise, text, None, nodes)
    assert difference(to_pil(family.decode_latents(family.load_vae(CPU), latents)[0, :, 0]), one) <= 1


@pytest.mark.parametrize("family", FOLDERS)
def test_flowedit_of_one_caption_twice_is_the_source_on_every_family(family: str):
    config, one, other = config_of(family), "photo of a dog", "a cat in the snow at a house"
    scale = named(family).flowedit.target_guidance
    method = FlowEdit.of(config.model.spec, steps=2, n_max=2, source_guidance=scale)
    pipe = EditPipeline.from_base(config, method, resolution=64)
    ends: list[torch.Tensor] = []
    decode = pipe.family.decode_latents
    pipe.family.decode_latents = lambda vae, latents: ends.append(latents) or decode(vae, latents)
    for words in ((one, one), (one, other)):
        ((source, _),) = pipe.batch([photo(0)], [words], seeds=[1])
    pipe._method = FlowEdit.of(config.model.spec, steps=2, n_max=2)
    pipe.batch([photo(0)], [(one, one)], seeds=[1])
    latents = pipe.family.encode_pixels(pipe._vae, to_tensor(source)[None, :, None])
    assert torch.equal(ends[0], latents) and not torch.equal(ends[1], latents)
    assert not torch.equal(ends[2], latents), "the two guidance scales are used"


def test_flowedits_edit_does_not_depend_on_its_neighbours():
    config = config_of("flux")
    pipe = EditPipeline.from_base(config, FlowEdit.of(config.model.spec, steps=3, n_min=1, n_avg=2))
    pairs = [("photo of a dog", "photo of a cat"), ("photo of a house", "photo of a beach")]
    together = pipe.batch([photo(0), photo(0)], pairs, seeds=[1, 2])
    alone = [pipe.batch([photo(0)], [pair], seeds=[seed])[0] for pair, seed in zip(pairs, (1, 2), strict=True)]
    assert max(difference(one[1], other[1]) for one, other in zip(together, alone, strict=True)) <= 1
    assert difference(together[0][1], together[1][1]) > 1


def test_a_guidance_beside_the_text_stands_above_the_configured_one(tmp_path: Path):
    model = {"path": str(model_folder())}
    host, text = make_host(tiny_config(tmp_path, model=model)), tiny_texts(2, 1)
    other = make_host(tiny_config(tmp_path, model=model, conditioning={"guidance": 1.5}))
    noisy, t = torch.randn(2, 16, 1, 4, 4, generator=torch.Generator().manual_seed(1)), torch.tensor([0.3, 0.8])
    with host.base() as velocity, other.base() as wanted:
        found = sampling.at_guidance(velocity, text, 1.5, host.family, None)(noisy, t)
        assert torch.equal(found, wanted(noisy, t, text, None)) and not torch.equal(found, velocity(noisy, t, text, None))


def test_classifier_free_guidance_of_a_branch(tmp_path: Path):
    host, text, negative = make_host(wan_config(tmp_path)), wan_texts(2, 1), wan_texts(1, 2)
    noisy, t = wan_latents(2, 3), torch.tensor([0.9, 0.9])
    with host.base() as velocity:
        v, v_negative = (
            velocity(noisy, t, text, None),
            velocity(noisy, t, wan_texts(1, 2) | {"umt5": negative["umt5"].expand(2, -1, -1)}, None),
        )
        found = sampling.at_guidance(velocity, text, 3.5, host.family, negative)(noisy, t)
    assert (found - (v_negative + 3.5 * (v - v_negative))).abs().max() < 1e-5


def test_clips_by_every_method_that_takes_them(tmp_path: Path):
    source = encode(tmp_path / "in.mp4", shades(6, (64, 64)))
    config = config_of(A14B)
    for method, words in ((Base(), "photo of a dog"), (FlowEdit.of(config.model.spec, steps=2), ("photo of a dog", "photo of a cat"))):
        pipe = EditPipeline.from_base(config, method, resolution=64)
        before, after, _ = pipe.clip(source, words, steps=2)
        assert len(before) == len(after) == 5 and {frame.size for frame in after} == {before[0].size}
        assert max(map(difference, before, after)) > 0


def test_published_settings_and_their_share_of_other_steps():
    flux, wan, zimage = (FlowEdit.of(named(name)) for name in ("flux", A14B, "z-image"))
    assert (flux.schedule_steps, flux.n_max, flux.n_min, flux.n_avg, flux.source_guidance, flux.target_guidance) == (28, 24, 0, 1, 1.5, 5.5)
    assert (wan.schedule_steps, wan.n_max, wan.source_guidance, wan.target_guidance) == (50, 33, 3.5, 13.5)
    assert (zimage.source_guidance, zimage.target_guidance) == (2.5, 12.5), "in its own formula, which counts from 0"
    assert [FlowEdit.of(named("flux"), steps=steps).n_max for steps in (1, 7, 14, 56)] == [1, 6, 12, 48]


@pytest.mark.parametrize(
    ("method", "words", "says"),
    [
        ("lora", (*TUPLES,), "--lora is missing"),
        ("base", ("--lora", "l.safetensors", *TUPLES), "--method base has no use for --lora: leave"),
        (
            "copy",
            ("--steps", 3, "--strength", 1, "--show-unguided", *TUPLES),
            "--method copy has no use for --steps, --strength, --show-unguided: leave it out",
        ),
        ("copy", ("--device", "cpu", *TUPLES), "--method copy has no use for --device"),
        ("flowedit", ("--guidance", 3, "--solver", "euler", *TUPLES), "--method flowedit has no use for --solver, --guidance"),
        ("kontext", ("--model", "a/b", "--schedule", "uniform", *TUPLES), "--method kontext has no use for --schedule"),
        ("lora", ("--lora", "l.safetensors", "--n-max", 3, *TUPLES), "--method lora has no use for --n-max"),
        ("lora", ("--source-guidance", 0, "--n-min", 0, *TUPLES), "--method lora has no use for --n-min, --source-guidance"),
        ("base", ("--strength", 0, *TUPLES), "--method base has no use for --strength"),
        ("copy", ("--guidance", 0, *TUPLES), "--method copy has no use for --guidance"),
        ("flowedit", ("--cfg-high", 0, *TUPLES), "--method flowedit has no use for --cfg-high"),
        ("base", ("--source", photo(), "--instruction", "add"), "--method base edits by captions, not by an instruction: give --tuples"),
        ("flowedit", ("--source", photo(), "--instruction", "add"), "--method flowedit edits by captions"),
        ("kontext", (*TUPLES,), "--method kontext: give --model"),
        ("kontext", ("--model", "a/b", "--batch-size", 2, *TUPLES), "--batch-size 2: --method kontext edits images one by one"),
        ("flowedit", ("--n-min", 5, "--n-max", 3, *TUPLES), "--n-min 5, --n-max 3, --steps 28: each is at most the next"),
        ("flowedit", ("--n-max", 9, "--steps", 8, *TUPLES), "--n-min 0, --n-max 9, --steps 8"),
        ("base", ("--cfg-high", 3, *TUPLES), r"cfg_high_noise \(--cfg-high\) = 3.0: not for flux"),
        ("flowedit", ("--negative", "blur", *TUPLES), r"negative \(--negative\) = 'blur': not for flux"),
    ],
)
def test_what_a_method_has_no_use_for_or_lacks(
    toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, words: tuple[Any, ...], says: str
):
    with pytest.raises(ValueError, match=says):
        run(monkeypatch, method, "--config", toml, *words, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("method", ["base", "copy", "flowedit"])
def test_a_baseline_without_a_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str):
    with pytest.raises(ValueError, match=f"--method {method}: give --config"):
        run(monkeypatch, method, "--model", "a/b", *TUPLES, "--out", tmp_path / "out")


def test_a_scale_below_the_familys_least_is_told():
    with pytest.raises(ValueError, match="--source-guidance 0.5 is below 1, which is no guidance for wan2.1-t2v-1.3b"):
        FlowEdit.of(named(T2V), source_guidance=0.5)
    assert FlowEdit.of(named("flux"), source_guidance=0.5).source_guidance == 0.5


def test_each_method_reads_its_own_texts_in_its_order():
    texts = {"src_caption": "before", "tgt_caption": "after", "reverse_instruction": "back"}
    item = EditTuple(id="1", source=photo(), instruction="change", **texts)
    job = Job(source=photo(), instruction="change", name="a", item=item)
    found = [job.words(method.reads) for method in (Lora, Base, FlowEdit, Copies)]
    assert found == ["change", "after", ("before", "after"), ()]
