"""Real classes of transformers as critics: their own processors' ids, their own forward's logits, and what is refused before any weight."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModelForImageTextToText, Qwen2Config

from byg_plugin.critics import vlm
from byg_plugin.critics.questions import Question, questions
from dataset_tools.backend_transformers import load_processor
from tests.support.critic_runs import NATIVE, picture, tensor
from tests.support.tiny_critics import KINDS, critic_config, critic_folder, template, tiny_critic_vlm, tokenizer, write_critic

EDIT, REST = questions("make it blue")
REMOVAL = questions("remove the dog", "remove")[0]


def images(kind: str, count: int = 2) -> list[Any]:
    height, width = NATIVE[kind]
    return [picture(height, width).rotate(90 * turn) if height == width else picture(height, width + 8 * turn) for turn in range(count)]


def seen(judge: vlm.Vlm, kind: str, question: Question) -> torch.Tensor:
    return judge.logits(question, [judge.features(tensor(image)) for image in images(kind, len(question.pictures))])


def own_answer(kind: str, question: Question) -> torch.Tensor:
    """Logits of No and Yes of the model's own forward, given what its image processor makes."""
    folder = critic_folder(kind)
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    shown = images(kind, len(question.pictures))
    inputs = dict(processor(images=[shown] if kind == "llava_onevision" else shown, return_tensors="pt"))
    described = vlm.describe(critic_config(folder))
    sizes = [described.view.see(tensor(image)).tokens for image in shown]
    prompt = described.dialogue.prompt(question, sizes)
    ids = torch.tensor([prompt.ids])
    if "image_grid_thw" in inputs:
        inputs["mm_token_type_ids"] = (ids == model.config.image_token_id).int()
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), **inputs).logits[0, -1, [prompt.no, prompt.yes]]


@pytest.mark.parametrize("kind", KINDS)
def test_the_answer_is_that_of_the_models_own_forward(kind: str):
    judge = tiny_critic_vlm(kind)
    ours, theirs = seen(judge, kind, EDIT), own_answer(kind, EDIT)
    assert (ours - theirs).abs().max() <= 1e-5 and ours.dtype == torch.float32
    assert (ours - seen(judge, kind, REST)).abs().max() > 1e-4, "the question matters"


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "llava_onevision"])  # which shows a single picture in crops too
def test_so_it_is_of_a_single_picture(kind: str):
    assert (seen(tiny_critic_vlm(kind), kind, REMOVAL) - own_answer(kind, REMOVAL)).abs().max() <= 1e-5


def test_the_ids_are_those_of_the_models_own_processor():
    """What a processor makes of a template with pictures, up to the answer."""
    folder = critic_folder("qwen3_vl")
    described = vlm.describe(critic_config(folder))
    shown = images("qwen3_vl")
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": EDIT.text}]
    processor = load_processor(str(folder))
    processor.image_token, processor.image_token_id = "<|image|>", described.config.image_token_id
    text = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True)
    theirs = processor(text=[text], images=[shown], return_tensors="pt").input_ids[0]
    sizes = [described.view.see(tensor(image)).tokens for image in shown]
    assert list(described.dialogue.prompt(EDIT, sizes).ids) == theirs.tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_recomputing_its_layers_changes_nothing_but_what_is_kept(kind: str):
    saved: dict[bool, int] = {}
    gradients, values = [], []
    for recompute in (False, True):
        judge = tiny_critic_vlm(kind, gradient_checkpointing=recompute)
        assert not judge.model.training and not any(p.requires_grad for p in judge.model.parameters())
        shown = [tensor(image) for image in images(kind)]
        leaf = shown[1].requires_grad_()
        count = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, count=count: count.append(t.numel()) or t, lambda t: t):
            answer = judge.logits(EDIT, [judge.features(shown[0]), judge.features(leaf)])
        values.append(answer.detach())
        gradients.append(torch.autograd.grad(answer[1] - answer[0], leaf)[0])
        saved[recompute] = sum(count)
        assert all(p.grad is None for p in judge.model.parameters())
    assert torch.equal(*values) and (gradients[0] - gradients[1]).abs().max() <= 1e-6 * gradients[0].abs().max()
    assert gradients[0].abs().max() > 0 and saved[True] < saved[False] / 2


def test_a_weight_that_is_not_finite_is_refused(tmp_path: Path):
    folder = shutil.copytree(critic_folder("qwen3_vl"), tmp_path / "critic")
    model = AutoModelForImageTextToText.from_pretrained(folder)
    model.lm_head.weight.data[3, 2] = float("nan")
    model.save_pretrained(folder)
    config = critic_config(folder)
    with pytest.raises(ValueError, match="lm_head.weight holds NaN"):
        vlm.load(config, vlm.describe(config), torch.device("cpu"))


def damaged(folder: Path, how: str) -> None:
    (path,) = folder.glob("*.safetensors")
    if how == "cut off":
        path.write_bytes(path.read_bytes()[:-1000])
        return
    tensors = load_file(path)
    name = min(name for name in tensors if "visual" in name and name.endswith("weight"))
    if how == "missing":
        del tensors[name]
    else:
        tensors[name] = torch.zeros(2, 3)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("how", "said"),
    [("missing", r"1 weights are missing, e\.g\. .*visual"), ("cut off", "cannot be loaded"), ("of another shape", "cannot be loaded")],
)
def test_damaged_weights_are_refused_by_the_key(tmp_path: Path, how: str, said: str):
    folder = shutil.copytree(critic_folder("qwen3_vl"), tmp_path / "critic")
    damaged(folder, how)
    config = critic_config(folder)
    with pytest.raises(ValueError, match=rf"critic\.path = .*critic: {said}"):
        vlm.load(config, vlm.describe(config), torch.device("cpu"))


def test_a_full_device_is_no_damage(monkeypatch: pytest.MonkeyPatch):
    described = vlm.describe(critic_config(critic_folder("qwen3_vl")))

    def full(*inputs: Any, **options: Any) -> None:
        raise torch.cuda.OutOfMemoryError("full")

    monkeypatch.setattr(described.kind, "from_pretrained", full)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        vlm.load(critic_config(described.path), described, torch.device("cpu"))


# --- what is refused, without reading a weight ---


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A critic without weights."""
    return shutil.copytree(critic_folder("qwen3_vl"), tmp_path / "critic", ignore=shutil.ignore_patterns("*.safetensors"))


def refusal(folder: Path, **values: Any) -> str:
    with pytest.raises(ValueError) as caught:
        vlm.describe(critic_config(folder, **values))
    return str(caught.value)


def test_a_folder_without_weights_can_be_described_and_not_loaded(folder: Path):
    config = critic_config(folder)
    with pytest.raises(ValueError, match=r"critic\.path = .*: cannot be loaded"):
        vlm.load(config, vlm.describe(config), torch.device("cpu"))


def test_a_model_of_text_alone(folder: Path):
    Qwen2Config().save_pretrained(folder)
    assert "holds a qwen2, which takes no pictures; choose one of qwen2_vl" in refusal(folder)


def test_a_model_whose_pixels_are_not_ours(folder: Path):
    (folder / "config.json").write_text(json.dumps({"model_type": "llava_next"}), encoding="utf-8")
    assert "a llava_next, which takes pictures by a processor that is not written in torch here" in refusal(folder)


def test_a_processor_that_does_something_else(folder: Path):
    path = next(path for path in folder.glob("*processor_config.json"))
    written = json.loads(path.read_text(encoding="utf-8"))
    (written.get("image_processor") or written)["do_normalize"] = False
    path.write_text(json.dumps(written), encoding="utf-8")
    assert "prepares pictures in another way than a qwen3_vl usually has" in refusal(folder)


def test_a_tokenizer_without_yes_and_no(folder: Path):
    tokenizer(template(True), merges=[]).save_pretrained(folder)
    assert "has no single tokens for the answers Yes and No" in refusal(folder)


def test_no_chat_template(folder: Path):
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    path = folder / "tokenizer_config.json"
    written = json.loads(path.read_text(encoding="utf-8"))
    written.pop("chat_template", None)
    path.write_text(json.dumps(written), encoding="utf-8")
    assert "has no chat template" in refusal(folder)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template(True)}), encoding="utf-8")
    vlm.describe(critic_config(folder))


TEXTS_ALONE = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' }}{% endfor %}"


def tokenizers_template(folder: Path, template: Any) -> None:
    """The one inside the tokenizer's own file."""
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {"chat_template": template}), encoding="utf-8")


@pytest.mark.parametrize("chat", [TEXTS_ALONE, "{% for m in messages %", "{{ raise_exception('no pictures') }}"])
def test_a_chat_template_that_cannot_write_pictures(folder: Path, chat: str):
    tokenizers_template(folder, chat)
    assert "its chat template cannot write a question with pictures" in refusal(folder)


def test_the_processors_template_stands_above_the_tokenizers_of_texts_alone(folder: Path):
    tokenizers_template(folder, TEXTS_ALONE)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template(True)}), encoding="utf-8")
    assert vlm.describe(critic_config(folder)).dialogue.template == template(True)


def test_of_several_templates_it_is_the_default(folder: Path):
    other = {"name": "tool_use", "template": TEXTS_ALONE}
    tokenizers_template(folder, [other, {"name": "default", "template": template(True)}])
    assert vlm.describe(critic_config(folder)).dialogue.template == template(True)


@pytest.mark.parametrize(
    ("size", "said"),
    [(65, "image_size = 65: .* sees pictures of 8 x 8 to 4,096 pixels"), (4096, "choose one between")],
)
def test_a_size_beyond_the_models_limit(folder: Path, size: int, said: str):
    with pytest.raises(ValueError, match=said):
        vlm.describe(critic_config(folder, image_size=size))


def test_more_tokens_than_its_sequence(folder: Path):
    path = folder / "config.json"
    written = json.loads(path.read_text(encoding="utf-8"))
    written["text_config"]["max_position_embeddings"] = 600
    path.write_text(json.dumps(written), encoding="utf-8")
    assert "critic.image_size = 448: two pictures are 128 tokens, and with a question of 512" in refusal(folder)
    vlm.describe(critic_config(folder, image_size=32))


@pytest.mark.parametrize("kind", ["internvl", "llava_onevision"])
def test_a_size_for_a_model_of_one_square(kind: str):
    assert "sees squares of 32 pixels alone; leave it out" in refusal(critic_folder(kind), image_size=48)
    vlm.describe(critic_config(critic_folder(kind), image_size=32))


def test_no_such_place(tmp_path: Path):
    assert "nowhere: cannot be loaded" in refusal(tmp_path / "nowhere")


def test_a_transformers_that_is_too_old(folder: Path, monkeypatch: pytest.MonkeyPatch):
    from transformers import Qwen3VLForConditionalGeneration

    def forward(self: Any, input_ids: Any, pixel_values: Any) -> None: ...

    monkeypatch.setattr(Qwen3VLForConditionalGeneration, "forward", forward)
    assert "install transformers 5.23 or later" in refusal(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("image_mean", None),
        ("image_mean", "grey"),
        ("image_mean", [0.5, 0.5]),
        ("image_std", [0, 0, 0]),
        ("image_std", [0.5, "a", 0.5]),
        ("rescale_factor", 1.0),
        ("resample", 0),
        ("size", {"longest_edge": 4096}),
        ("size", {"shortest_edge": "a", "longest_edge": 4096}),
        ("patch_size", 7),
        ("patch_size", 0),
        ("merge_size", None),
        ("merge_size", 4),
        ("temporal_patch_size", 1),
        ("size", {"height": 32, "width": 32}),
        ("size", {"shortest_edge": 4096, "longest_edge": 64}),
    ],
)
def test_an_image_processor_that_no_such_model_has(folder: Path, key: str, value: Any):
    """Told before any weight is read: some would come out later as another shape, some never."""
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {key: value}), encoding="utf-8")
    said = refusal(folder)
    assert key in said or "cannot be loaded" in said


@pytest.mark.parametrize(
    "size", [{"shortest_edge": 64, "longest_edge": 4096}, {"height": 28, "width": 14}, {"height": 28.5, "width": 28.5}]
)
@pytest.mark.parametrize("kind", ["internvl", "llava_onevision"])
def test_a_square_that_is_none(kind: str, size: dict[str, float], tmp_path: Path):
    path = write_critic(tmp_path, kind) / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {"size": size}), encoding="utf-8")
    said = refusal(tmp_path)
    assert "size = {" in said or "cannot be loaded" in said


@pytest.mark.parametrize("text", ["5", "[1]", '{"model_type": "qwen3_vl", "text_config": {"max_position_embeddings": null}}'])
def test_a_damaged_configuration(folder: Path, text: str):
    (folder / "config.json").write_text(text, encoding="utf-8")
    assert str(folder) in refusal(folder)


@pytest.mark.parametrize("chat", ["{{ 1 / 0 }}", "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}"])
def test_a_chat_template_that_cannot_be_written(tmp_path: Path, chat: str):
    assert "its chat template cannot write a question" in refusal(write_critic(tmp_path, "qwen3_vl", chat=chat))
