"""Tiny random vision-language models of the real classes in real folders, with a tokenizer that has the answers as tokens."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from byg_plugin.config.critic import CriticConfig
from byg_plugin.critics import vlm
from tests.support.tiny import kept

SPECIAL = (
    "<|pad|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|image|>",
    "<|vision_end|>",
    "<|video|>",
    "<img>",
    "</img>",
    "<unk>",
)
MERGES = [("Y", "e"), ("Ye", "s"), ("N", "o")]
BEGUN = "{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
"""What some models say before any answer."""


def template(wrapped: bool, begun: str = "") -> str:
    """A chat template; `wrapped`: it puts marks around a picture."""
    picture = "<|vision_start|><|image|><|vision_end|>" if wrapped else "<|image|>\n"
    return (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n" + begun + "{% for c in m.content %}{% if c.type == 'image' %}"
        f"{picture}{{% else %}}{{{{ c.text }}}}{{% endif %}}{{% endfor %}}<|im_end|>\n{{% endfor %}}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


def tokenizer(chat: str, merges: list[tuple[str, str]] | None = None) -> PreTrainedTokenizerFast:
    """Bytes, and the two answers as tokens of their own."""
    merges = MERGES if merges is None else merges
    words = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in merges)]
    backend = Tokenizer(models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=merges, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        additional_special_tokens=list(SPECIAL[1:9]),
        chat_template=chat,
    )


VOCABULARY = len(SPECIAL) + 256 + len(MERGES)
_IDS = {name: index for index, name in enumerate(SPECIAL)}
_LANGUAGE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 4096,
}
_ROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
_MARKS = {
    "image_token_id": _IDS["<|image|>"],
    "video_token_id": _IDS["<|video|>"],
    "vision_start_token_id": _IDS["<|vision_start|>"],
    "vision_end_token_id": _IDS["<|vision_end|>"],
}


def _qwen3() -> Any:
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 4, "out_hidden_size": 32}
    vision |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
    text = _LANGUAGE | {"head_dim": 16, "rope_parameters": _ROPE}
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision, **_MARKS))


def _qwen25() -> Any:
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 4, "out_hidden_size": 32}
    vision |= {"window_size": 16, "fullatt_block_indexes": [1]}
    text = _LANGUAGE | {"rope_parameters": _ROPE}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **_MARKS))


def _internvl() -> Any:
    vision = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    vision |= {"patch_size": [4, 4], "image_size": [32, 32]}
    text = _LANGUAGE | {"model_type": "qwen2"}
    return InternVLForConditionalGeneration(InternVLConfig(text_config=text, vision_config=vision, image_token_id=_IDS["<|image|>"]))


def _llava() -> Any:
    vision = {"model_type": "siglip_vision_model", "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    vision |= {"intermediate_size": 48, "patch_size": 4, "image_size": 32, "vision_use_head": False}
    text = _LANGUAGE | {"model_type": "qwen2"}
    config = LlavaOnevisionConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=_IDS["<|image|>"],
        video_token_index=_IDS["<|video|>"],
        image_grid_pinpoints=[[32, 32], [32, 64], [64, 32]],
    )
    return LlavaOnevisionForConditionalGeneration(config)


def _patches(**changes: Any) -> Any:
    return Qwen2VLImageProcessorPil(
        patch_size=4, temporal_patch_size=2, merge_size=2, size={"shortest_edge": 64, "longest_edge": 4096}, **changes
    )


_SQUARE = {"size": {"height": 32, "width": 32}}
KINDS: dict[str, tuple[Callable[[], Any], Callable[[], Any], bool]] = {
    "qwen3_vl": (_qwen3, _patches, True),
    "qwen2_5_vl": (_qwen25, _patches, True),
    "internvl": (_internvl, lambda: GotOcr2ImageProcessorPil(**_SQUARE), False),
    "llava_onevision": (
        _llava,
        lambda: LlavaOnevisionImageProcessorPil(**_SQUARE, image_grid_pinpoints=[[32, 32], [32, 64], [64, 32]]),
        False,
    ),
}


def write_critic(folder: Path, kind: str, **of_tokenizer: Any) -> Path:
    """Model, image processor, tokenizer and chat template."""
    model, processor, wrapped = KINDS[kind]
    torch.manual_seed(0)
    made = model()
    for parameter in made.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    made.save_pretrained(folder)
    processor().save_pretrained(folder)
    tokenizer(of_tokenizer.pop("chat", None) or template(wrapped), **of_tokenizer).save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["model_type"] == kind
    return folder


@lru_cache(maxsize=len(KINDS))
def critic_folder(kind: str) -> Path:
    """One folder for the whole run; nobody may write into it."""
    return kept(f"critic-{kind}", lambda folder: write_critic(folder, kind))


def critic_config(path: Path | str, **values: Any) -> CriticConfig:
    """A float32 critic on the CPU."""
    return CriticConfig.model_validate({"path": str(path), "dtype": "float32", "device": "cpu"} | values)


def tiny_critic_vlm(kind: str, **values: Any) -> vlm.Vlm:
    """The model that a folder holds."""
    config = critic_config(critic_folder(kind), **values)
    return vlm.load(config, vlm.describe(config), torch.device("cpu"))
