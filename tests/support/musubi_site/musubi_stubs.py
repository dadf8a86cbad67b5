"""musubi-tuner on a CPU: a stand-in for torchvision (whose wheels want the torch they were built with), and tiny models.

The stand-in is only visible once the host is being imported: transformers looks for torchvision too and would believe in it.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from typing import Any

_NAMES = ("torchvision", "torchvision.transforms", "torchvision.transforms.functional", "torchvision.utils", "torchvision.io")
TINY_TEXT_TOKENS = 8
TINY_WAN = {"dim": 24, "ffn_dim": 32, "freq_dim": 16, "num_heads": 2, "num_layers": 4, "text_len": TINY_TEXT_TOKENS}
TINY_FLUX = {"hidden_size": 32, "num_heads": 2, "depth": 2, "depth_single_blocks": 2, "axes_dim": [4, 6, 6]}

TINY_FLUX2 = {"hidden_size": 32, "num_heads": 2, "depth": 2, "depth_single_blocks": 2, "axes_dim": [4, 4, 4, 4], "context_in_dim": 48}
TINY_QWEN = {"attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 24, "axes_dims_rope": (4, 6, 6)}
TINY_KREA2 = {"features": 64, "tdim": 16, "txtdim": 24, "heads": 4, "kvheads": 2, "layers": 2, "txtheads": 2, "txtkvheads": 2}
TINY_ZIMAGE = {"ROPE_AXES_DIMS": [4, 6, 6], "ROPE_AXES_LENS": [256, 64, 64]}
TINY_ZIMAGE |= {f"DEFAULT_TRANSFORMER_{name}": 2 for name in ("N_LAYERS", "N_REFINER_LAYERS", "N_HEADS", "N_KV_HEADS")}
TINY_ZIMAGE |= {"DEFAULT_TRANSFORMER_DIM": 32, "DEFAULT_TRANSFORMER_CAP_FEAT_DIM": 16}


class _Anything(types.ModuleType):
    """A module that has every name; of them, these tests use `utils.make_grid` alone."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname in _NAMES and "musubi_tuner" in sys.modules:
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> types.ModuleType:
        from transformers.utils import import_utils

        asked = getattr(import_utils, "is_torchvision_available", None)
        if asked is not None and hasattr(asked, "cache_clear"):
            assert not hasattr(asked, "cache_info") or asked.cache_info().currsize, (
                "transformers must have looked before the stand-in is there"
            )
        return _Anything(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        # Previews are saved one at a time: a grid of one picture is the picture.
        module.utils = types.SimpleNamespace(make_grid=lambda pictures, nrow: pictures[0])


def install() -> None:
    """Serve the stand-in, unless a torchvision that works is there."""
    if importlib.util.find_spec("torchvision") is None:
        sys.meta_path.append(_Finder())


def look_first() -> None:
    """transformers and what is built on it settle whether there is a torchvision."""
    import accelerate  # noqa: F401
    import diffusers  # noqa: F401
    import transformers.utils

    transformers.utils.is_torchvision_available()


def shrink() -> None:
    """The host's names for real models mean tiny ones."""
    import dataclasses

    from musubi_tuner.flux import flux_models, flux_utils
    from musubi_tuner.wan.configs import WAN_CONFIGS

    for name in ("t2v-1.3B", "t2v-14B", "t2v-A14B"):
        WAN_CONFIGS[name].update(TINY_WAN)
    spec = flux_models.configs_flux_dev_context
    params = dataclasses.replace(spec.params, context_in_dim=24, vec_in_dim=20, **TINY_FLUX)
    autoencoder = dataclasses.replace(spec.ae_params, ch=32, num_res_blocks=1)
    flux_models.configs_flux_dev_context = dataclasses.replace(spec, params=params, ae_params=autoencoder)
    from musubi_tuner.flux_2 import flux2_utils

    klein = flux2_utils.FLUX2_MODEL_INFO["klein-base-4b"]
    tiny = dataclasses.replace(klein.params, **TINY_FLUX2)
    flux2_utils.FLUX2_MODEL_INFO["klein-base-4b"] = dataclasses.replace(klein, params=tiny)
    _shrink_qwen_image()
    _shrink_krea2()
    _shrink_zimage()
    flux_utils.load_t5xxl, flux_utils.load_clip_l = load_t5, load_clip


def _shrink_qwen_image() -> None:
    from musubi_tuner.qwen_image import qwen_image_model as host

    plain = host.QwenImageTransformer2DModel
    if plain.__module__ != host.__name__:
        return

    class Tiny(plain):  # type: ignore[misc, valid-type]
        def __init__(self, **sizes: Any):
            super().__init__(**sizes | TINY_QWEN)

    host.QwenImageTransformer2DModel = Tiny


def _shrink_krea2() -> None:
    try:
        from musubi_tuner.krea2 import krea2_utils
    except ImportError:  # before v0.3.4
        return
    vars(krea2_utils.single_mmdit_large_wide).update(TINY_KREA2)


def _shrink_zimage() -> None:
    try:
        from musubi_tuner.zimage import zimage_config
    except ImportError:  # not in every version
        return
    vars(zimage_config).update(TINY_ZIMAGE)


def load_t5(path: str, dtype: Any, device: Any, disable_mmap: bool = False) -> Any:
    """A tiny T5 for `flux_utils.load_t5xxl`."""
    import torch
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(3)
    size = {"vocab_size": 64, "d_model": 24, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    return tokenizer("$A </s>"), T5EncoderModel(T5Config(feed_forward_proj="gated-gelu", **size)).eval().to(device, dtype)


def load_clip(path: str, dtype: Any, device: Any, disable_mmap: bool = False) -> Any:
    """A tiny CLIP for `flux_utils.load_clip_l`."""
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(4)
    size = {"hidden_size": 20, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "projection_dim": 20}
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "max_position_embeddings": 77}
    return tokenizer("<pad> $A </s>"), CLIPTextModel(CLIPTextConfig(vocab_size=64, **size, **ends)).eval().to(device, dtype)


def tokenizer(template: str) -> Any:
    """Letters for words."""
    import string

    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", *string.ascii_letters])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(""), "isolated")
    ends = [(name, vocabulary[name]) for name in ("<pad>", "</s>")]
    made.post_processor = processors.TemplateProcessing(single=template, special_tokens=ends)
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
