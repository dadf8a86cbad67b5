"""Wan's text-to-video checkpoints."""

from __future__ import annotations

from typing import Any

from byg_plugin.families.spec import FamilySpec, MusubiSpec

# The negative prompt that Wan's own pipelines use where none is given.
NEGATIVE = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，"
    "多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)


def _wan(*, steps: int, **own: Any) -> FamilySpec:
    """What the checkpoints share; `steps`: of the published sampler (UniPC)."""
    common: dict[str, Any] = {
        "implementation": "byg_plugin.models.wan:WanFamily",
        "lora_layout": "wan",
        "positions": ("same", "bernini"),
        "frame_multiple": 4,
        "guidance": "classifier_free",
        "negative": NEGATIVE,
        "text_encoders": ("t5",),
        "text_in_sequence": False,
        "solvers": ("unipc", "unipc_diffusers"),
        "fps": 16,
        "native": 632,  # 832 x 480
        "vae_tiling": True,
        "diffusers": (0, 35),
        "modelspec": ("wan2.1", "https://github.com/Wan-Video/Wan2.1"),  # of 2.2 too
        # Where the paper's video recipe differs from that of images.
        "defaults": {
            "dataset": {"frames": 81},
            "objective": {
                "t_distribution": "logit_normal",
                "t_shift": 12.0,
                "rollout_schedule": "shifted",
                "identity_probability": 0.1,
                "ema_decay": 0.0,
            },
            "sample": {"steps": steps},
        },
    }
    return FamilySpec(**common | own)


def _musubi(task: str, most_swapped: int) -> MusubiSpec:
    """`most_swapped`: all blocks but the one that computes."""
    return MusubiSpec(
        adapter="byg_plugin.musubi.wan:WanOnMusubi",
        decided={"task": task},
        network_module="networks.lora_wan",
        text_encoders=("t5",),
        most_swapped=most_swapped,
    )


SPECS = (
    _wan(name="wan2.2-t2v-a14b", boundary=0.875, shift=12.0, steps=40, guidance_scales=(4.0, 3.0), musubi=_musubi("t2v-A14B", 39)),
    _wan(name="wan2.1-t2v-14b", shift=5.0, steps=50, guidance_scales=(5.0, 5.0), musubi=_musubi("t2v-14B", 39)),
    _wan(name="wan2.1-t2v-1.3b", shift=8.0, steps=50, guidance_scales=(6.0, 6.0), musubi=_musubi("t2v-1.3B", 29)),
    # 1280 x 704 natively; musubi-tuner has no 5B.
    _wan(name="wan2.2-ti2v-5b", shift=5.0, steps=50, guidance_scales=(5.0, 5.0), fps=24, native=950),
)
