"""The workflows of `comfyui/workflows`: `python -m benchmarks.comfyui_workflows` writes them anew.

Of each task: `<name>.api.json` for the server, `<name>.json` for the page, `<name>.png` a picture of the graph that holds both.
Weights have the names of ComfyUI's own templates; LoRAs those that our recipes write.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

from benchmarks.comfyui_graphs import Graph, Out, compact
from byg_plugin.families import SPECS

FOLDER = Path(__file__).parent.parent / "comfyui" / "workflows"
AS_TRAINED, PARTNER = "as trained", "the other half of the pair"
_SCALE = 3  # pixels of the page that are one of the picture


@dataclass(frozen=True, kw_only=True)
class Task:
    """A family's files and texts."""

    name: str
    family: str
    model: str
    lora: str
    clip: tuple[str, ...]
    clip_type: str
    vae: str
    instruction: str
    note: str
    model_low: str | None = None

    @property
    def weights(self) -> dict[str, tuple[str, ...]]:
        """Names of its files by the folder of ComfyUI's `models`."""
        models = (self.model,) if self.model_low is None else (self.model, self.model_low)
        return {"diffusion_models": models, "text_encoders": self.clip, "vae": (self.vae,), "loras": (self.lora,)}


_IMAGE = "change the background to a snowy forest"
_CLIP = "make it winter, with snow on the ground"
_UMT5 = "umt5_xxl_fp8_e4m3fn_scaled.safetensors"
TASKS = (
    Task(
        name="flux_image_edit",
        family="flux",
        model="flux1-dev.safetensors",
        lora="byg_flux-ema.safetensors",
        clip=("clip_l.safetensors", "t5xxl_fp16.safetensors"),
        clip_type="flux",
        vae="ae.safetensors",
        instruction=_IMAGE,
        note="T5TokenizerOptions fills texts up to 512 tokens, as in training: FLUX.1 sees the padding. Of flux_image_24gb's LoRA: 256.",
    ),
    Task(
        name="flux2_klein_image_edit",
        family="flux2-klein-4b",
        model="flux-2-klein-base-4b-fp8.safetensors",
        lora="byg_flux2_klein_4b-ema.safetensors",
        clip=("qwen_3_4b.safetensors",),
        clip_type="flux2",
        vae="flux2-vae.safetensors",
        instruction=_IMAGE,
        note="For the 9B: `flux-2-klein-base-9b-fp8.safetensors`, `qwen_3_8b_fp8mixed.safetensors` and a LoRA of the 9B.",
    ),
    Task(
        name="z_image_edit",
        family="z-image",
        model="z_image_bf16.safetensors",
        lora="byg_z_image-ema.safetensors",
        clip=("qwen_3_4b.safetensors",),
        clip_type="lumina2",
        vae="ae.safetensors",
        instruction=_IMAGE,
        note="cfg is 6: Z-Image's own scale 5 counts from 0, ComfyUI's from 1.",
    ),
    Task(
        name="qwen_image_edit",
        family="qwen-image",
        model="qwen_image_fp8_e4m3fn.safetensors",
        lora="byg_qwen_image-ema.safetensors",
        clip=("qwen_2.5_vl_7b_fp8_scaled.safetensors",),
        clip_type="qwen_image",
        vae="qwen_image_vae.safetensors",
        instruction=_IMAGE,
        note="ByG Source also sets Qwen-Image's published guidance, which keeps the length of each token.",
    ),
    Task(
        name="krea2_image_edit",
        family="krea2",
        model="krea2_raw_fp8_scaled.safetensors",
        lora="byg_krea2-ema.safetensors",
        clip=("qwen3vl_4b_fp8_scaled.safetensors",),
        clip_type="krea2",
        vae="qwen_image_vae.safetensors",
        instruction=_IMAGE,
        note="Krea 2 Raw, before distillation; ComfyUI's templates have the Turbo alone. cfg is 4.5: Krea's scale 3.5 counts from 0.",
    ),
    Task(
        name="wan21_video_edit",
        family="wan2.1-t2v-1.3b",
        model="wan2.1_t2v_1.3B_fp16.safetensors",
        lora="byg_wan21.safetensors",
        clip=(_UMT5,),
        clip_type="wan",
        vae="wan_2.1_vae.safetensors",
        instruction=_CLIP,
        note="For the 14B: its base and a LoRA of it.",
    ),
    Task(
        name="wan22_video_edit",
        family="wan2.2-t2v-a14b",
        model="wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors",
        model_low="wan2.2_t2v_low_noise_14B_fp8_scaled.safetensors",
        lora="byg_wan22_video_high_noise.safetensors",
        clip=(_UMT5,),
        clip_type="wan",
        vae="wan_2.1_vae.safetensors",
        instruction=_CLIP,
        note="Two networks, two halves of the LoRA: the loader finds the low-noise half beside the high-noise one.",
    ),
    Task(
        name="wan22_5b_video_edit",
        family="wan2.2-ti2v-5b",
        model="wan2.2_ti2v_5B_fp16.safetensors",
        lora="byg_wan22_5b.safetensors",
        clip=(_UMT5,),
        clip_type="wan",
        vae="wan2.2_vae.safetensors",
        instruction=_CLIP,
        note="The 5B has a VAE of its own.",
    ),
)


def graph_of(task: Task) -> Graph:
    """Load, read the source, encode, sample, decode: columns from left to right."""
    spec, graph = SPECS[task.family], Graph()
    graph.add("MarkdownNote", 0, title="How to use", text=_how_to(task))
    loaded, vae, clip = _models(graph, task)
    picture, fps = _read(graph, spec.takes_clips)
    size = graph.add("BygSize", 2, title="ByG Size", image=picture, model=loaded["model"], family=AS_TRAINED, resolution=0)
    encoded = graph.add("VAEEncode", 2, pixels=size["image"], vae=vae)["LATENT"]
    low = {"model_low": loaded["model_low"]} if task.model_low else {}
    source = graph.add("BygSource", 2, title="ByG Source", model=loaded["model"], source=encoded, position=AS_TRAINED, strength=1.0, **low)
    graph.add("PreviewAny", 2, title="What was loaded", source=loaded["report"])
    times = graph.add(
        "BygSchedule", 3, title="ByG Schedule", model=source["model"], latent=source["latent"], steps=loaded["steps"], family=AS_TRAINED
    )
    guiders = _guiders(graph, task, clip, loaded, source)
    sampled = _sampled(graph, guiders, loaded["sampler"], times, source["latent"])
    edit = graph.add("VAEDecode", 5, samples=sampled, vae=vae)["IMAGE"]
    if spec.takes_clips:
        video = graph.add("CreateVideo", 5, images=edit, fps=fps)["VIDEO"]
        graph.add("SaveVideo", 5, video=video, filename_prefix="byg/edit", format="auto", codec="auto")
    else:
        back = graph.add("BygSizeBack", 5, title="ByG Size Back", edit=edit, original=picture)["IMAGE"]
        graph.add("SaveImage", 5, images=back, filename_prefix="byg/edit")
    return graph


def _models(graph: Graph, task: Task) -> tuple[dict[str, Out], Out, Out]:
    model = graph.add("UNETLoader", 0, unet_name=task.model, weight_dtype="default")["MODEL"]
    pair: dict[str, Any] = {"lora_low": PARTNER, "strength_low": 1.0}
    if task.model_low:
        pair["model_low"] = graph.add("UNETLoader", 0, unet_name=task.model_low, weight_dtype="default")["MODEL"]
    vae = graph.add("VAELoader", 0, vae_name=task.vae)["VAE"]
    if len(task.clip) == 2:
        first, second = task.clip
        clip = graph.add("DualCLIPLoader", 0, clip_name1=first, clip_name2=second, type=task.clip_type, device="default")["CLIP"]
        clip = graph.add("T5TokenizerOptions", 1, clip=clip, min_padding=1, min_length=SPECS[task.family].text_limit)["CLIP"]
    else:
        clip = graph.add("CLIPLoader", 0, clip_name=task.clip[0], type=task.clip_type, device="default")["CLIP"]
    return graph.add("BygLoraLoader", 1, title="ByG LoRA Loader", model=model, lora=task.lora, strength=1.0, **pair), vae, clip


def _read(graph: Graph, clips: bool) -> tuple[Out, Out | None]:
    """The picture, or the clip's pictures and their rate."""
    if not clips:
        return graph.add("LoadImage", 1, title="Source", image="example.png")["IMAGE"], None
    video = graph.add("LoadVideo", 1, title="Source", file="source.mp4")["VIDEO"]
    parts = graph.add("GetVideoComponents", 1, video=video)
    return parts["images"], parts["fps"]


def _guiders(graph: Graph, task: Task, clip: Out, loaded: dict[str, Out], source: dict[str, Out]) -> list[Out]:
    """One, or of two networks each its own."""
    spec = SPECS[task.family]
    text = graph.add("CLIPTextEncode", 3, title="Instruction", clip=clip, text=task.instruction)["CONDITIONING"]
    if spec.guidance == "embedding":
        text = graph.add("FluxGuidance", 3, conditioning=text, guidance=loaded["guidance"])["CONDITIONING"]
        return [graph.add("BasicGuider", 4, model=source["model"], conditioning=text)["GUIDER"]]
    negative = graph.add("CLIPTextEncode", 3, title="Negative, as published", clip=clip, text=spec.negative)["CONDITIONING"]
    suffixes = ("", "_low") if task.model_low else ("",)
    return [
        graph.add("CFGGuider", 4, model=source[f"model{end}"], positive=text, negative=negative, cfg=loaded[f"cfg{end}"])["GUIDER"]
        for end in suffixes
    ]


def _sampled(graph: Graph, guiders: list[Out], chosen: Out, times: dict[str, Out], latent: Out) -> Out:
    noise = graph.add("RandomNoise", 4, noise_seed=0, control_after_generate="fixed")["NOISE"]
    parts = [times["sigmas"]] if len(guiders) == 1 else [times["sigmas_high"], times["sigmas_low"]]
    for guider, sigmas in zip(guiders, parts, strict=True):
        sampler = {"noise": noise, "guider": guider, "sampler": chosen, "sigmas": sigmas, "latent_image": latent}
        latent = graph.add("SamplerCustomAdvanced", 5, **sampler)["output"]
        noise = graph.add("DisableNoise", 4)["NOISE"] if guider is not guiders[-1] else noise
    return latent


def _how_to(task: Task) -> str:
    what = "clip" if SPECS[task.family].takes_clips else "picture"
    return (
        f"**Edit a {what} with a LoRA of byg_plugin**\n\n"
        f"1. Choose the LoRA in *ByG LoRA Loader* and the {what} in *Source*.\n"
        "2. Write what to change in *Instruction*.\n"
        "3. *ByG LoRA Loader* knows how the LoRA was trained: position, guidance, sampler and steps come from it. It says what does not "
        "fit.\n"
        "4. *ByG Source* gives the model the source, and the empty latent that is sampled. Leave out denoising strengths below 1.\n\n"
        f"{task.note}\n\n"
        "The loader's sampler with the times of *ByG Schedule* is what `edit.py` does; seeds are its seeds."
    )


def files_of(task: Task) -> dict[str, str]:
    """Names and texts of a task's JSON files."""
    graph = graph_of(task)
    return {f"{task.name}.api.json": compact(graph.for_server()), f"{task.name}.json": compact(graph.for_page())}


def picture_of(page: dict[str, Any], server: dict[str, Any], path: Path) -> None:
    """The graph as boxes and lines, with both forms in the text chunks by which ComfyUI's page opens a picture."""
    right = max(node["pos"][0] + node["size"][0] for node in page["nodes"])
    bottom = max(node["pos"][1] + node["size"][1] for node in page["nodes"])
    image = Image.new("RGB", ((right + 60) // _SCALE * 2, (bottom + 90) // _SCALE * 2), "#202020")
    draw, unit = ImageDraw.Draw(image), 2 / _SCALE

    def at(x: float, y: float) -> tuple[float, float]:
        return (x + 30) * unit, (y + 45) * unit

    boxes = {node["id"]: node for node in page["nodes"]}
    for _, origin, slot, target, position, _ in page["links"]:
        a, b = boxes[origin], boxes[target]
        start = at(a["pos"][0] + a["size"][0], a["pos"][1] + 14 + 20 * slot)
        draw.line([start, at(b["pos"][0], b["pos"][1] + 14 + 20 * position)], fill="#7799bb", width=1)
    for node in page["nodes"]:
        (x, y), (w, h) = node["pos"], node["size"]
        colour = "#5a4a1a" if node["type"] == "MarkdownNote" else "#274a2f" if node["type"].startswith("Byg") else "#353535"
        draw.rectangle([at(x, y), at(x + w, y + h)], fill=colour, outline="#888888")
        draw.text(at(x + 8, y + 6), node.get("title", node["type"]), fill="white")
    info = PngInfo()
    info.add_text("prompt", json.dumps(server))
    info.add_text("workflow", json.dumps(page))
    image.save(path, pnginfo=info, optimize=True)


def write() -> None:
    """All files of all tasks."""
    for task in TASKS:
        for name, text in files_of(task).items():
            (FOLDER / name).write_text(text, encoding="utf-8")
        graph = graph_of(task)
        picture_of(graph.for_page(), graph.for_server(), FOLDER / f"{task.name}.png")


if __name__ == "__main__":
    write()
