"""A folder of photos that a package ships, with captions -> tuples by rules -> validate -> caches -> three training steps."""

from __future__ import annotations

from pathlib import Path

import skimage
from PIL import Image

from byg_plugin.data.tuples import read_tuples
from tests.support.tiny import curve, fill_caches, make_trainer, run_config
from tests.support.tools_helpers import run

# What the photos show; one that no rule serves is among them.
CAPTIONS = {
    "astronaut.png": "a photo of an astronaut in an orange suit",
    "coffee.png": "a white cup of coffee on a wooden board",
    "chelsea.png": "a photo of a brown cat",
    "rocket.jpg": "a white rocket in a field",
    "motorcycle_left.png": "a photo of a motorcycle in a workshop",
    "coins.png": "many coins",
}


def test_photos_to_a_trained_lora(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for name, caption in CAPTIONS.items():
        with Image.open(Path(skimage.__file__).parent / "data" / name) as image:
            image.thumbnail((160, 160))
            image.save(photos / name)
        (photos / name).with_suffix(".txt").write_text(caption, encoding="utf-8")

    tuples = tmp_path / "tuples.jsonl"
    done = run("generate_edits", "--images", photos, "--out", tuples, "--backend", "rules")
    assert done.returncode == 0 and "5 accepted" in done.stdout and "1 no_rule" in done.stdout, done.stderr
    done = run("validate", tuples)
    assert done.returncode == 0 and "5 records, 5 usable tuples" in done.stdout, done.stdout

    config = run_config(
        tmp_path / "out",
        dataset={"tuples": str(tuples), "cache_dir": str(tmp_path / "cache"), "validation_items": 1},
        train={"steps": 3, "save_every": 0},
        objective={"identity_warmup_steps": 1},
    )
    assert len(read_tuples(config.dataset)) == 5
    fill_caches(config)
    lora = make_trainer(config).run()
    assert lora.is_file() and [entry["step"] for entry in curve(tmp_path / "out")] == [1, 2, 3]
