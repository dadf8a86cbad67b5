"""The in-process backend with a tiny random Qwen3-VL: the plumbing end to end. What it says is noise, and must be handled."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch
from PIL import Image

from dataset_tools.backend import Chat, encode_frame
from dataset_tools.backend_transformers import TransformersBackend
from dataset_tools.generate_edits import generate
from dataset_tools.judge import judge
from dataset_tools.settings import BackendSettings, GenerateSettings, JudgeSettings
from tests.support.evaluation import write_edits
from tests.support.tiny_vlm import write_vlm
from tests.support.tools_helpers import photos, records


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vlm(tmp_path_factory.mktemp("vlm"))


def settings(vlm: Path, **changes: object) -> BackendSettings:
    return BackendSettings(backend="transformers", model=str(vlm), device_map="cpu", dtype="float32", max_tokens=8, **changes)  # type: ignore[arg-type]


def chat(color: str | None, text: str = "what is it?") -> Chat:
    pictures = () if color is None else (encode_frame(Image.new("RGB", (32, 24), color), 1024),)
    return Chat(system="s", turns=(text,), pictures=pictures, seed=1)


def test_images_reach_the_model_and_answers_do_not_depend_on_the_batch(vlm: Path) -> None:
    backend = TransformersBackend(settings(vlm, temperature=0.0))
    chats = [chat("red"), chat("blue", "a longer question, so that the other one is padded"), chat(None)]
    alone = [backend.generate([one])[0].text for one in chats if one.pictures]
    together = [answer.text for answer in backend.generate(chats[:2])]
    assert alone == together and all(alone)
    assert backend.generate([chats[2]])[0].text
    seen = []
    tower = backend._network.model.visual.patch_embed
    tower.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    backend.generate([chat("red")])
    backend.generate([chat("blue")])
    assert len(seen) == 2 and not torch.equal(*seen)


def test_requests_are_batched_and_cut_answers_are_known(vlm: Path) -> None:
    backend = TransformersBackend(settings(vlm, batch_size=4))
    sizes: list[int] = []
    plain = backend.generate

    def counted(chats: list[Chat]) -> list:
        sizes.append(len(chats))
        return plain(chats)

    backend.generate = counted  # type: ignore[method-assign]

    async def ask() -> list:
        answers = await asyncio.gather(*(backend.complete(chat("red", f"question {k}")) for k in range(8)))
        await backend.close()
        return answers

    answers = asyncio.run(ask())
    assert len(answers) == 8 and sum(sizes) == 8 and max(sizes) == 4
    assert any(answer.cut for answer in answers)


def test_an_error_in_a_batch_reaches_everybody(vlm: Path) -> None:
    backend = TransformersBackend(settings(vlm))

    def broken(chats: list[Chat]) -> list:
        raise ValueError("out of memory with batch_size = 4")

    backend.generate = broken  # type: ignore[method-assign]

    async def ask() -> list:
        answers = await asyncio.gather(*(backend.complete(chat("red")) for _ in range(3)), return_exceptions=True)
        await backend.close()
        return answers

    assert [str(error) for error in asyncio.run(ask())] == ["out of memory with batch_size = 4"] * 3


def test_generate_edits_end_to_end(vlm: Path, tmp_path: Path) -> None:
    photos(tmp_path / "photos", 5)
    made = generate(
        GenerateSettings(
            images=str(tmp_path / "photos"),
            out=str(tmp_path / "t.jsonl"),
            backend="transformers",
            model=str(vlm),
            device_map="cpu",
            dtype="float32",
            max_tokens=12,
        )
    )
    assert made.new == 5
    rejects = records(tmp_path / "t.rejects.jsonl")
    assert len(rejects) + len(records(tmp_path / "t.jsonl")) == 5 and rejects
    for record in rejects:
        assert record["kind"] == "parse" and record["message"] and len(record["answers"]) == 2


def test_a_judge_end_to_end_with_questions_of_two_pictures_and_of_one_in_a_batch(vlm: Path, tmp_path: Path) -> None:
    model = {"backend": "transformers", "model": str(vlm), "device_map": "cpu", "dtype": "float32", "max_tokens": 12, "batch_size": 4}
    results = judge(JudgeSettings(edits=str(write_edits(tmp_path, 3)), out=str(tmp_path / "j.jsonl"), **model))  # type: ignore[arg-type]
    assert results.tally.accepted + results.tally.rejected == 6 and results.tally.rejected
    for record in records(tmp_path / "j.rejects.jsonl"):
        assert record["kind"] == "parse" and len(record["answers"]) == 2 and record["metric"] in ("vie_semantic", "vie_quality")


def test_no_such_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be loaded: .*give a folder or hub id"):
        TransformersBackend(settings(tmp_path / "nowhere"))
